//! Real kernels: Debian's stock ones and the tuned one. They need hardware-grade KVM, so `scripts/test` runs them
//! with `--ignored` in `scripts/kvm-host`.

#[path = "real/apps.rs"]
mod apps;
#[path = "real/balloon.rs"]
mod balloon;
mod common;
#[path = "real/console.rs"]
mod console;
#[path = "real/container.rs"]
mod container;
#[path = "real/crowd.rs"]
mod crowd;
#[path = "real/isolation.rs"]
mod isolation;
#[path = "real/layers.rs"]
mod layers;
#[path = "real/life.rs"]
mod life;
#[path = "real/mixed.rs"]
mod mixed;
#[path = "real/net.rs"]
mod net;
#[path = "real/on_host.rs"]
mod on_host;
#[path = "real/registry.rs"]
mod registry;
#[path = "real/share.rs"]
mod share;
#[path = "real/terminal.rs"]
mod terminal;

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
    boot_with(name, file, "", words, flags)
}

/// The same with words for the kernel itself.
fn boot_with(name: &str, file: &str, kernel_words: &str, words: &str, flags: &[&str]) -> Command {
    let mut command = Host::new().microvm(["boot", "--kernel"]);
    command.current_dir("/").arg(kernel(name).join(file)).arg("--initrd").arg(initrd(name));
    if !flags.contains(&"--timeout") {
        command.args(["--timeout", "120s"]);
    }
    command.args(["--exit-code-port", "0xf4"]).args(flags);
    command.arg("--append").arg(format!("{kernel_words} microvm.exit_code_port=0xf4 -- /bin/check {words}"));
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

/// The device is there for both ways of discovery, and its interrupt comes: the kernel's generator has its bytes.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn the_guest_has_random_numbers() {
    for discovery in ["acpi", "cmdline"] {
        let output = boot("tuned", "vmlinux", "random", &["--discovery", discovery]).output().unwrap();
        assert!(stdout(&output).contains("hwrng=virtio_rng.0 64"), "{discovery}: {}", stdout(&output));
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
/// What a program prints up to `text`, with it.
#[track_caller]
fn read_until(child: &mut Child, text: &str) -> String {
    try_read_until(child, text).unwrap_or_else(|seen| panic!("ended before {text:?}: {seen}"))
}

/// The same; or all that it printed, where it ended before.
fn try_read_until(child: &mut Child, text: &str) -> Result<String, String> {
    let out = child.stdout.as_mut().unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(text.as_bytes()) {
        if out.read(&mut byte).unwrap() == 0 {
            return Err(String::from_utf8_lossy(&seen).into_owned());
        }
        seen.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&seen).into_owned())
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
    // An old host kernel's sandbox has a warning before it.
    let text = stderr(&output);
    let json: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
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

/// `check WORDS` with disks.
fn with_disks(name: &str, file: &str, words: &str, disks: &[String]) -> Output {
    let mut command = boot(name, file, words, &["--memory", "256M"]);
    command.args(disks.iter().flat_map(|d| ["--disk", d])).output().unwrap()
}

fn fact<'a>(output: &'a str, name: &str) -> &'a str {
    let line = output.lines().find_map(|l| l.trim().strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {name} in: {output}"))
}

fn sha256(file: &std::path::Path) -> String {
    let output = Command::new("sha256sum").stdin(std::fs::File::open(file).unwrap()).output().unwrap();
    stdout(&output).trim().into()
}

/// An ext4 file system with busybox, `check` and microvm-init.
fn ext4(host: &Host) -> PathBuf {
    let tree = host.dir.path().join("tree");
    for folder in ["bin", "sbin", "dev", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    let busybox = kernel("..").join("busybox-static/bin/busybox");
    let check = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/guest/check");
    let init = PathBuf::from(env!("CARGO_BIN_EXE_microvm-init"));
    for (from, to) in [(busybox, "bin/busybox"), (check, "bin/check"), (init, "sbin/init")] {
        std::fs::copy(&from, tree.join(to)).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    }
    let image = host.file("root.img", b"");
    std::fs::File::options().write(true).open(&image).unwrap().set_len(128 << 20).unwrap();
    let mkfs = Command::new("/sbin/mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&image).output().unwrap();
    status(&mkfs, 0);
    image
}

/// The file system is whole, and the file in it is what the guest says.
#[track_caller]
fn assert_clean(host: &Host, image: &std::path::Path, sum: &str) {
    status(&Command::new("/sbin/e2fsck").arg("-fn").arg(image).output().unwrap(), 0);
    let copy = host.dir.path().join("copy");
    let request = format!("dump /written {}", copy.display());
    status(&Command::new("/sbin/debugfs").args(["-R", &request]).arg(image).output().unwrap(), 0);
    assert_eq!(sha256(&copy), sum);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn disk_tuned_has_its_root_on_it() {
    let host = Host::new();
    let image = ext4(&host);
    let mut command = Host::new().microvm(["boot", "--timeout", "120s", "--root", "--kernel"]);
    command.current_dir("/").arg(kernel("tuned").join("vmlinux")).arg("--disk").arg(&image);
    command.args(["--exit-code-port", "0xf4", "--append"]);
    let output = command.arg("microvm.exit_code_port=0xf4 -- /bin/check disk-root").output().unwrap();
    status(&output, 0);
    assert_clean(&host, &image, fact(&stdout(&output), "sum"));
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn disk_stock_6_1_mounts_ext4() {
    let host = Host::new();
    let image = ext4(&host);
    let disk = image.display().to_string();
    let output = with_disks("stock-6.1", "bzImage", "disk-chroot", &[disk]);
    status(&output, 0);
    assert_clean(&host, &image, fact(&stdout(&output), "sum"));
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn disk_stock_6_1_reads_and_writes_what_the_host_has() {
    let host = Host::new();
    let bytes: Vec<u8> = (0..16u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for engine in ["uring", "threads", "threads,direct"] {
        let (from, to) = (host.file("from", &bytes), host.file("to", &vec![0; bytes.len()]));
        let disks = [
            format!("{},readonly,id=source,engine={engine}", from.display()),
            format!("{},engine={engine}", to.display()),
        ];
        let output = with_disks("stock-6.1", "bzImage", "disk-sum", &disks);
        if stderr(&output).contains("no direct I/O") || stderr(&output).contains("refuses io_uring") {
            continue;
        }
        status(&output, 0);
        let text = stdout(&output);
        assert_eq!((fact(&text, "sectors"), fact(&text, "serial")), ("32768", "source"));
        assert_eq!(fact(&text, "sum"), sha256(&from), "{engine}");
        assert!(std::fs::read(&to).unwrap() == bytes, "{engine}: the copy differs");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn disk_keeps_what_was_acknowledged_before_a_kill() {
    let host = Host::new();
    let image = host.file("image", &vec![0; 4 << 20]);
    let mut command = boot("tuned", "vmlinux", "disk-synced", &["--disk", image.to_str().unwrap()]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut child, "acknowledged 40");
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let later = stdout(&output).lines().filter(|l| l.trim().starts_with("acknowledged ")).count();
    let bytes = std::fs::read(&image).unwrap();
    // The last line may have been cut short.
    for i in 0..40 + later.saturating_sub(1) {
        assert!(bytes[i * 512..].starts_with(format!("write {i}\n").as_bytes()), "write {i} is lost");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn disk_on_a_full_host_disk_fails_and_the_vm_goes_on() {
    let host = Host::new();
    let small = host.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8M", "tmpfs"]).arg(&small).output();
    status(&mount.unwrap(), 0);
    let image = small.join("image");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let output = with_disks("tuned", "vmlinux", "disk-full", &[image.display().to_string()]);
    status(&Command::new("umount").arg(&small).output().unwrap(), 0);
    status(&output, 0);
    assert_eq!(fact(&stdout(&output), "still"), "here");
}

/// A thousand connections each way and more, with tests/host/vsock.py as the host's programs and
/// tests/guest/vsock.rs as the guest's.
fn vsock_run(name: &str, file: &str, flags: &[&str]) {
    // Writable in the emulated host, and short enough for a socket's path.
    let dir = tempfile::TempDir::with_prefix_in("v", "/tmp").unwrap();
    let (socket, metrics) = (dir.path().join("s"), dir.path().join("metrics.json"));
    // The system's own: a wrapper of a version manager takes minutes in the emulated host.
    let mut host = Command::new("/usr/bin/python3");
    host.args(["-I", "-S", "-B", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/vsock.py")]);
    let mut host = host.arg(&socket).stdout(Stdio::piped()).spawn().unwrap();
    read_until(&mut host, "listening");
    let mut vm = Host::new().microvm(["boot", "--timeout", "240s", "--kernel"]);
    vm.current_dir("/").arg(kernel(name).join(file)).arg("--initrd").arg(initrd(name)).args(flags);
    vm.args(["--memory", "256M", "--exit-code-port", "0xf4", "--metrics"]).arg(&metrics);
    vm.arg("--vsock").arg(format!("cid=3,socket={}", socket.display()));
    vm.args(["--append", "microvm.exit_code_port=0xf4 -- /bin/vsock"]);
    let vm = vm.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It is read from the start, so that it never waits for us, and ends by itself or by its time limit.
    let vm = std::thread::spawn(|| vm.wait_with_output().unwrap());
    let host = host.wait_with_output().unwrap();
    let vm = vm.join().unwrap();
    assert!(host.status.success(), "host: {}guest: {}{}", stdout(&host), stdout(&vm), stderr(&vm));
    status(&vm, 0);
    let text = stdout(&vm);
    println!("{}{text}", stdout(&host));
    // "sending ended": the one whose program was killed, and the one whose device was reset.
    for line in ["the host has sent all back", "nobody listens: ConnectionReset", "sending ended", "reset"] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    // The one that was idle when the device was reset; every other error would be another line.
    let errors: Vec<_> = text.lines().map(str::trim).filter(|l| l.starts_with("port ")).collect();
    assert_eq!(errors, ["port 6: ConnectionReset"]);
    assert!(!socket.exists(), "the socket is left behind");
    let counted = |name: &str| counter(&metrics, name);
    assert!(counted("microvm_vsock_connections_total") >= 2000);
    // The one that ended the program in the guest may be open still.
    assert!(counted("microvm_vsock_open_connections") <= 1);
    assert_eq!(counted("microvm_vsock_dropped_packets_total"), 0);
}

/// A counter of one series in a file of `--metrics`.
fn counter(file: &std::path::Path, name: &str) -> u64 {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let metrics = json["metrics"].as_array().unwrap();
    let metric = metrics.iter().find(|m| m["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    metric["samples"][0]["value"].as_u64().unwrap()
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
