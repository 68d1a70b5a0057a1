//! What booting costs, from exec of the VMM to its exit: `cargo bench --bench boot`.
//!
//! Outside it makes the guests and calls itself in `scripts/kvm-host --icount`, where the clock advances one
//! nanosecond per executed instruction: what a clock says there is an instruction count of VMM, host kernel and guest
//! together. Repeatable to 0.1 % with expedited RCU (series "expedited"); series "default" has the host's RCU waits.
//! docs/benchmarks.md has the results and says what they cannot tell.

mod common;

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use microvm::sys::smaps::taken;

use common::{Result, Row, cache, in_counting_host, root, run, table};

/// What Firecracker's guests are given in shared baselines; the reference rows use it, too.
const MEMORY: &str = "128M";

fn main() -> Result<()> {
    in_counting_host(make_guests, inside)
}

fn make_guests(work: &Path) -> Result<()> {
    for kernel in ["tuned", "reference"] {
        run(root().join("guest-kernels/build"), &[kernel])?;
        fs::copy(cache().join("kernels").join(kernel).join("vmlinux"), work.join(kernel))?;
    }
    let (initrd, init) = (work.join("initrd"), root().join("guest-kernels/bench-init"));
    let flags = ["--output", initrd.to_str().unwrap(), "--init", init.to_str().unwrap()];
    run(root().join("guest-kernels/initramfs"), &flags)?;
    Ok(fs::write(work.join("first"), resets_at_once(fs::read(work.join("reference"))?))?)
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

fn inside(work: &Path) -> Result<()> {
    let path = |name: &str| work.join(name).display().to_string();
    let boot = |kernel: &str, initrd: bool| -> Vec<String> {
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
    let row = |name: &str, args| Row { name: name.into(), args, is_vm: true };
    table(&[
        Row { is_vm: false, ..row("microvm --version", vec![path("microvm"), "--version".into()]) },
        row("reset at the first instruction", boot("first", false)),
        row("reference kernel, boot to init and reboot", boot("reference", true)),
        row("tuned kernel, boot to init and reboot", boot("tuned", true)),
        row("reset at the first instruction, --load map", mapped("first", false)),
        row("reference kernel, the same, --load map", mapped("reference", true)),
        row("tuned kernel, the same, --load map", mapped("tuned", true)),
    ])?;
    println!("\nVMM memory that is not guest memory (PSS): {} KiB", vmm_memory(&mapped("tuned", false))?);
    Ok(())
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
    // The kernel is mapped there, at the same distance from the guest's first byte as in the guest.
    let kernel = smaps.lines().find(|line| line.ends_with("/tuned")).ok_or("the kernel is not mapped")?;
    let start = u64::from_str_radix(kernel.split('-').next().unwrap_or_default(), 16)? - KERNEL_ADDRESS;
    Ok(taken(&smaps, std::slice::from_ref(&(start..start + (128 << 20)))).outside >> 10)
}
