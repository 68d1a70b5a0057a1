//! Real kernels: Debian's stock ones and the tuned one. They need hardware-grade KVM, so `scripts/test` runs them
//! with `--ignored` in `scripts/kvm-host`.

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Host, stderr, stdout};

/// `NAME/FILE` among the kernels that `guest-kernels/` made.
fn kernel(name: &str) -> PathBuf {
    let cache = std::env::var_os("MICROVM_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        base.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"))
            .join("microvm")
    });
    cache.join("kernels").join(name)
}

fn initrd(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/guests").join(format!("{name}.cpio"))
}

/// `microvm boot` of `name/file` with its initramfs, which runs `check WORDS`.
fn boot(name: &str, file: &str, words: &str, flags: &[&str]) -> Command {
    let mut command = Host::new().microvm(["boot", "--timeout", "120s", "--kernel"]);
    command.current_dir("/").arg(kernel(name).join(file)).arg("--initrd").arg(initrd(name));
    command.args(["--exit-code-port", "0xf4"]).args(flags);
    command.arg("--append").arg(format!("microvm.exit_code_port=0xf4 -- /bin/check {words}"));
    command
}

#[track_caller]
fn status(output: &Output, expected: i32) {
    assert_eq!(
        output.status.code(),
        Some(expected),
        "stderr: {}\nstdout: {}",
        stderr(output),
        stdout(output)
    );
}

/// Boots, expects `check exit 0` to end well, and returns what it printed.
#[track_caller]
fn facts(name: &str, file: &str, flags: &[&str]) -> HashMap<String, String> {
    let output = boot(name, file, "exit 0", flags).output().unwrap();
    status(&output, 0);
    let text = stdout(&output);
    let pairs = text.lines().filter_map(|l| l.trim().split_once('='));
    pairs.map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// Boots with each number of vCPUs and amount of memory, and checks that the guest sees them.
#[track_caller]
fn sees_its_machine(name: &str, file: &str, release: &str) {
    for (cpus, memory, mib) in [("1", "128M", 64..128), ("2", "256M", 180..256), ("4", "4G", 3700..4096)] {
        let facts = facts(name, file, &["--cpus", cpus, "--memory", memory]);
        assert!(facts["release"].starts_with(release), "{facts:?}");
        assert_eq!(facts["cpus"], cpus, "{facts:?}");
        assert!(mib.contains(&facts["memory_mib"].parse().unwrap()), "{facts:?}");
        assert_eq!(facts["clocksource"], "kvm-clock", "{facts:?}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn tuned_vmlinux_sees_its_machine() {
    sees_its_machine("tuned", "vmlinux", "6.1.");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn tuned_bzimage_boots() {
    assert_eq!(facts("tuned", "bzImage", &[])["cpus"], "1");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn stock_6_1_sees_its_machine() {
    sees_its_machine("stock-6.1", "bzImage", "6.1.");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn stock_6_1_loads_modules() {
    let modules = &facts("stock-6.1", "bzImage", &["--memory", "256M"])["modules"];
    for module in ["virtio_mmio", "virtio_blk", "pvpanic_mmio", "overlay"] {
        assert!(modules.contains(module), "no {module} among: {modules}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn stock_6_12_boots() {
    assert!(facts("stock-6.12", "bzImage", &["--memory", "256M"])["release"].starts_with("6.12."));
}

/// Reboot, power-off and a chosen status.
#[track_caller]
fn ends(name: &str, file: &str) {
    for (words, expected) in [("reboot", 0), ("poweroff", 0), ("exit 42", 42)] {
        let output = boot(name, file, words, &[]).output().unwrap();
        assert_eq!(output.status.code(), Some(expected), "{words}: {}{}", stdout(&output), stderr(&output));
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn tuned_ends_with_its_status() {
    ends("tuned", "vmlinux");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn stock_6_1_ends_with_its_status() {
    ends("stock-6.1", "bzImage");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_reboot_without_the_default_words_ends_the_vm() {
    let line = "console=ttyS0 quiet panic=-1";
    status(&boot("stock-6.1", "bzImage", "reboot", &["--cmdline", line]).output().unwrap(), 0);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_panic_is_101() {
    // Stock kernels have pvpanic as a module, which microvm-init loads; this one has no /proc/sysrq-trigger.
    let output = boot("stock-6.1", "bzImage", "panic", &[]).output().unwrap();
    status(&output, 101);
    let mut command = Host::new().microvm(["boot", "--timeout", "120s", "--kernel"]);
    // No initramfs and no disk: no root file system.
    status(&command.current_dir("/").arg(kernel("tuned").join("vmlinux")).output().unwrap(), 101);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn kernels_without_acpi_or_with_a_pit_boot() {
    for flags in [&["--pit"][..], &["--memory", "64M,backing=memfd"]] {
        assert_eq!(facts("tuned", "vmlinux", flags)["cpus"], "1", "{flags:?}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn the_console_takes_input() {
    let mut command = boot("tuned", "vmlinux", "cat", &[]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // What comes before the guest's driver is there is lost, as on a real line.
    read_until(&mut child, "ttyS0_irq=");
    child.stdin.take().unwrap().write_all(b"one\ntwo words\nend\n").unwrap();
    let output = child.wait_with_output().unwrap();
    status(&output, 0);
    for line in ["got one", "got two words", "got end"] {
        assert!(stdout(&output).contains(line), "{}", stdout(&output));
    }
}

/// Reads the guest's console until `text` has come.
fn read_until(child: &mut Child, text: &str) {
    let out = child.stdout.as_mut().unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(text) {
        assert_eq!(
            out.read(&mut byte).unwrap(),
            1,
            "ended before {text:?}: {}",
            String::from_utf8_lossy(&seen)
        );
        seen.push(byte[0]);
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_signal_stops_a_busy_guest() {
    let mut child =
        boot("tuned", "vmlinux", "spin", &["--cpus", "2"]).stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut child, "ttyS0_irq=");
    let begin = Instant::now();
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn the_timeline_counts_exits_and_marks() {
    let output = boot("tuned", "vmlinux", "exit 0", &["--timeline=json"]).output().unwrap();
    status(&output, 0);
    let json: serde_json::Value = serde_json::from_str(&stderr(&output)).unwrap();
    let phases = json["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|p| p["name"].as_str().unwrap()).collect();
    for name in ["guest-kernel", "guest-init", "workload-setup", "workload", "guest-end", "teardown"] {
        assert!(names.contains(&name), "no {name} in {names:?}");
    }
    let sum: u64 = phases.iter().filter_map(|p| p["exits"]["total"].as_u64()).sum();
    assert_eq!(json["exits"]["total"].as_u64(), Some(sum));
    let boot = phases.iter().find(|p| p["name"] == "guest-kernel").unwrap();
    assert!(boot["exits"]["total"].as_u64() > Some(50), "{boot}");
    assert!(boot["exits"]["kvm"]["port i/o"].as_u64() > Some(0), "{boot}");
}

/// Huge pages come from the host's pool, which root alone can fill.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn huge_pages_boot() {
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let before = std::fs::read_to_string(pool).unwrap();
    if std::fs::write(pool, "128").is_err() {
        eprintln!("skipped: only root can reserve huge pages");
        return;
    }
    for memory in ["256M,hugepages=2M", "256M,hugepages=2M,backing=memfd"] {
        assert_eq!(facts("tuned", "vmlinux", &["--memory", memory])["cpus"], "1", "{memory}");
    }
    std::fs::write(pool, before.trim()).unwrap();
}

/// With `--load map` kernel and initramfs stand in the address space as the files that they are.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_kernel_is_mapped_and_not_read() {
    let mut child =
        boot("tuned", "vmlinux", "spin", &["--load", "map"]).stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut child, "ttyS0_irq=");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    for name in ["vmlinux", "tuned.cpio"] {
        assert!(maps.lines().any(|l| l.ends_with(name)), "{name} is not mapped:\n{maps}");
    }
}

/// A folder that is writable in the emulated host, and short enough for a socket's path.
fn vsock_run(name: &str, file: &str, flags: &[&str]) {
    let dir = tempfile::TempDir::with_prefix_in("v", "/tmp").unwrap();
    let socket = dir.path().join("s");
    let mut host = Command::new("/usr/bin/python3");
    // The system's own: a wrapper of a version manager takes minutes in the emulated host.
    host.args(["-I", "-S", "-B"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/vsock.py"))
        .arg(&socket);
    let mut host = host.stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut host, "listening");
    let mut vm = Host::new().microvm(["boot", "--timeout", "900s", "--kernel"]);
    vm.current_dir("/").arg(kernel(name).join(file)).arg("--initrd").arg(initrd(name)).args(flags);
    vm.args(["--memory", "256M", "--exit-code-port", "0xf4", "--vsock"]);
    vm.arg(format!("cid=3,socket={}", socket.display()));
    vm.args(["--append", "microvm.exit_code_port=0xf4 -- /bin/vsock"]);
    let mut vm = vm.stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut vm, "serving");
    let host = host.wait_with_output().unwrap();
    assert!(host.status.success(), "{}", stdout(&host));
    let vm = vm.wait_with_output().unwrap();
    status(&vm, 0);
    let text = stdout(&vm);
    // The one whose program was killed; every other error would be another line.
    assert!(text.contains("sending ended"), "{text}");
    assert!(!text.contains("port "), "{text}");
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn vsock_with_stock_6_1() {
    vsock_run("stock-6.1", "bzImage", &["--cpus", "2"]);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn vsock_with_tuned() {
    vsock_run("tuned", "vmlinux", &[]);
}
