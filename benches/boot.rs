//! What booting costs, from exec of the VMM to its exit: `cargo bench --bench boot`.
//!
//! Outside it makes the guests and calls itself in `scripts/kvm-host --icount`, where the clock advances one
//! nanosecond per executed instruction: what a clock says there is an instruction count of VMM, host kernel and guest
//! together. Repeatable to 0.1 % with expedited RCU (series "expedited"); series "default" has the host's RCU waits.
//! docs/benchmarks.md has the results and says what they cannot tell.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs of each sample; the first is warm-up.
const RUNS: usize = 6;
/// What Firecracker's guests are given in shared baselines; the reference rows use it, too.
const MEMORY: &str = "128M";
const INSIDE: &str = "MICROVM_BENCH_INSIDE";

fn main() -> Result<()> {
    // Cargo runs this for `cargo test --benches`, too, where nothing is to be measured.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    match std::env::var_os(INSIDE) {
        Some(_) => inside(),
        None => outside(),
    }
}

fn outside() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let work = root.join("target/bench");
    fs::create_dir_all(&work)?;
    let run = |program: &str, args: &[&str]| -> Result<()> {
        let status = Command::new(root.join(program)).args(args).status()?;
        if status.success() { Ok(()) } else { Err(format!("{program} failed: {status}").into()) }
    };
    for kernel in ["tuned", "reference"] {
        run("guest-kernels/build", &[kernel])?;
        fs::copy(cache().join("kernels").join(kernel).join("vmlinux"), work.join(kernel))?;
    }
    let initrd = work.join("initrd");
    let init = root.join("guest-kernels/bench-init");
    run(
        "guest-kernels/initramfs",
        &["--output", initrd.to_str().unwrap(), "--init", init.to_str().unwrap()],
    )?;
    fs::write(work.join("first"), resets_at_once(fs::read(work.join("reference"))?))?;
    let status = Command::new(root.join("scripts/kvm-host"))
        .args(["--icount", "--memory", "2G", "--"])
        .arg(std::env::current_exe()?)
        .arg("--bench")
        .env(INSIDE, "1")
        .env("MICROVM_BENCH_WORK", &work)
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("the bench failed: {status}").into()) }
}

fn cache() -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    var("MICROVM_CACHE").unwrap_or_else(|| {
        var("XDG_CACHE_HOME").or(var("HOME").map(|h| h.join(".cache"))).unwrap_or_default().join("microvm")
    })
}

/// `mov al, 0xfe; out 0x64, al; hlt` at both entry points of a kernel.
fn resets_at_once(mut elf: Vec<u8>) -> Vec<u8> {
    let word = |elf: &[u8], at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let half = |elf: &[u8], at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let headers = word(&elf, 32) as usize;
    let programs: Vec<_> = (0..half(&elf, 56) as usize).map(|i| headers + i * 56).collect();
    let mut entries = vec![word(&elf, 24)];
    for p in &programs {
        let note = word(&elf, p + 8) as usize;
        let is_note = elf[*p..p + 4] == 4u32.to_le_bytes();
        // "Xen", type 18: the PVH entry.
        let area = &elf[note..(note + word(&elf, p + 32) as usize).min(elf.len())];
        if let Some(at) = area.windows(8).position(|w| w == b"\x12\0\0\0Xen\0").filter(|_| is_note) {
            entries.push(u32::from_le_bytes(area[at + 8..at + 12].try_into().unwrap()).into());
        }
    }
    for entry in entries {
        for p in &programs {
            let (offset, address, size) = (word(&elf, p + 8), word(&elf, p + 24), word(&elf, p + 32));
            if elf[*p..p + 4] == 1u32.to_le_bytes() && (address..address + size).contains(&entry) {
                let at = (offset + entry - address) as usize;
                elf[at..at + 5].copy_from_slice(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4]);
            }
        }
    }
    elf
}

/// One row: a name and a command.
struct Row {
    name: &'static str,
    args: Vec<String>,
}

fn inside() -> Result<()> {
    // A memory file system, so that no row pays for the file system that the host's files come through.
    let work = PathBuf::from("/tmp/bench");
    fs::create_dir_all(&work)?;
    for entry in fs::read_dir(std::env::var("MICROVM_BENCH_WORK")?)? {
        let entry = entry?;
        fs::copy(entry.path(), work.join(entry.file_name()))?;
    }
    let microvm = work.join("microvm");
    fs::copy(env!("CARGO_BIN_EXE_microvm"), &microvm)?;
    let boot = |kernel: &str, initrd: bool| -> Vec<String> {
        let path = |name: &str| work.join(name).display().to_string();
        let mut args = vec![path("microvm"), "boot".into(), "--memory".into(), MEMORY.into()];
        args.extend(["--kernel".into(), path(kernel)]);
        if initrd {
            args.extend(["--initrd".into(), path("initrd")]);
        }
        args
    };
    let mapped = |kernel: &str, initrd: bool| -> Vec<String> {
        boot(kernel, initrd).into_iter().chain(["--load".into(), "map".into()]).collect()
    };
    let rows = [
        Row { name: "microvm --version", args: vec![microvm.display().to_string(), "--version".into()] },
        Row { name: "reset at the first instruction", args: boot("first", false) },
        Row { name: "reference kernel, boot to init and reboot", args: boot("reference", true) },
        Row { name: "tuned kernel, boot to init and reboot", args: boot("tuned", true) },
        Row { name: "reset at the first instruction, --load map", args: mapped("first", false) },
        Row { name: "reference kernel, the same, --load map", args: mapped("reference", true) },
        Row { name: "tuned kernel, the same, --load map", args: mapped("tuned", true) },
    ];
    println!(
        "{:<12} {:<44} {:>10} {:>10} {:>10} {:>9}",
        "series", "from exec to exit", "median M", "min M", "max M", "VM exits"
    );
    for (series, expedited) in [("expedited", "1"), ("default", "0")] {
        fs::write("/sys/kernel/rcu_expedited", expedited)?;
        for row in &rows {
            let mut samples = (0..RUNS).map(|_| measure(&row.args)).collect::<Result<Vec<_>>>()?;
            samples.remove(0);
            samples.sort();
            let exits = if row.args.len() > 2 { exits(&row.args)? } else { String::new() };
            let millions = |d: Duration| d.as_nanos() as f64 / 1e6;
            println!(
                "{series:<12} {:<44} {:>10.2} {:>10.2} {:>10.2} {exits:>9}",
                row.name,
                millions(samples[samples.len() / 2]),
                millions(samples[0]),
                millions(samples[samples.len() - 1])
            );
        }
    }
    println!("\nVMM memory that is not guest memory (PSS): {} KiB", vmm_memory(&mapped("tuned", false))?);
    Ok(())
}

fn measure(args: &[String]) -> Result<Duration> {
    let begin = Instant::now();
    let mut command = Command::new(&args[0]);
    let status =
        command.args(&args[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    let took = begin.elapsed();
    if status.success() { Ok(took) } else { Err(format!("a sample failed ({status}): {args:?}").into()) }
}

/// VM exits of one more run. The timeline costs time, so no measured run has it.
fn exits(args: &[String]) -> Result<String> {
    let output =
        Command::new(&args[0]).args(&args[1..]).arg("--timeline=json").stdin(Stdio::null()).output()?;
    // The emulated host's kernel is old: the sandbox has a warning before it.
    let text = String::from_utf8(output.stderr)?;
    let json: serde_json::Value = serde_json::from_str(text.lines().last().ok_or("no timeline")?)?;
    Ok(json["exits"]["total"].to_string())
}

/// Guest address of a kernel's first segment (`CONFIG_PHYSICAL_START`).
const KERNEL_ADDRESS: u64 = 16 << 20;

/// PSS in KiB of a VMM with a booted guest, without the mappings that are guest memory. The kernel is mapped, so that
/// these can be told apart.
fn vmm_memory(args: &[String]) -> Result<u64> {
    let mut child = Command::new(&args[0])
        .args(&args[1..])
        // No init: the kernel panics, and without a reboot it stays.
        .args(["--cmdline", "console=ttyS0 panic=0 pci=off"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let result = wait_for_memory(&mut child);
    child.kill()?;
    child.wait()?;
    result
}

fn wait_for_memory(child: &mut std::process::Child) -> Result<u64> {
    use io::BufRead;
    let out = io::BufReader::new(child.stdout.take().ok_or("no output")?);
    // Well into the boot: the VMM has done all that it does.
    for line in out.lines() {
        if line?.contains("Memory:") {
            break;
        }
    }
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.id()))?;
    let mut mappings: Vec<(u64, u64, u64, bool)> = Vec::new();
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let hex = |s| u64::from_str_radix(s, 16);
            mappings.push((hex(start)?, hex(end)?, 0, line.ends_with("/tuned")));
        } else if let (Some(kib), Some(last)) = (line.strip_prefix("Pss:"), mappings.last_mut()) {
            last.2 = kib.trim().trim_end_matches(" kB").parse()?;
        }
    }
    let kernel = mappings.iter().find(|m| m.3).ok_or("the kernel is not mapped")?.0;
    let guest = kernel - KERNEL_ADDRESS..kernel - KERNEL_ADDRESS + (128 << 20);
    Ok(mappings.iter().filter(|m| !guest.contains(&m.0)).map(|m| m.2).sum())
}
