//! Bad input: one line that names the flag or path, exit status 1 or 2, nothing left behind.

mod common;

use std::fs::{File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Host, Protocol, SPIN, elf, power_off, print, stderr};

#[track_caller]
fn assert_fails(output: &Output, status: i32, words: &[&str]) {
    common::assert_fails(output, status, words);
}

/// Boots a file of these bytes, and checks that it fails with `words` and leaves nothing behind.
#[track_caller]
fn bad_kernel(bytes: &[u8], words: &[&str]) {
    let host = Host::new();
    let kernel = host.file("kernel", bytes);
    let before = host.files();
    let output = host.boot(&kernel, &[]).output().unwrap();
    assert_fails(&output, 1, &[&["--kernel", "kernel"], words].concat());
    assert_eq!(host.files(), before);
}

/// A good kernel with a change in its first program header's field.
fn damaged(field: usize, value: u64) -> Vec<u8> {
    let mut file = elf(&power_off(), Protocol::Pvh);
    file[64 + field..72 + field].copy_from_slice(&value.to_le_bytes());
    file
}

const OFFSET: usize = 8;
const ADDRESS: usize = 24;
const FILE_SIZE: usize = 32;
const MEMORY_SIZE: usize = 40;

#[test]
fn kernels_that_are_none() {
    bad_kernel(b"", &["empty"]);
    bad_kernel(b"hello, this is a text and no kernel at all", &["not a kernel"]);
    bad_kernel(b"\x1f\x8b\x08\0\0\0\0\0", &["gzip", "gunzip"]);
    bad_kernel(&std::fs::read("/bin/true").unwrap(), &["ordinary program"]);
    bad_kernel(&elf(&power_off(), Protocol::Pvh)[..100], &["truncated"]);
    bad_kernel(&elf(&power_off(), Protocol::Pvh)[..0x1003], &["truncated"]);
}

#[test]
fn kernels_that_are_not_there() {
    let host = Host::new();
    for (path, words) in
        [("/nonexistent/vmlinux", "No such file"), ("/tmp", "is not a file"), ("/dev/null", "is not a file")]
    {
        let output = host.boot(Path::new(path), &[]).output().unwrap();
        assert_fails(&output, 1, &["--kernel", path, words]);
    }
}

#[test]
fn a_fifo_does_not_hang() {
    let host = Host::new();
    let fifo = host.dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert_fails(&host.boot(&fifo, &[]).output().unwrap(), 1, &["--kernel", "is not a file"]);
}

#[test]
fn a_sparse_file_of_4_gib() {
    let host = Host::new();
    let kernel = host.file("sparse", b"");
    File::options().write(true).open(&kernel).unwrap().set_len(4 << 30).unwrap();
    assert_fails(&host.boot(&kernel, &[]).output().unwrap(), 1, &["--kernel", "sparse"]);
    // As an initramfs it is too large for any guest.
    let good = host.kernel(&power_off());
    let output = host.boot(&good, &["--initrd", kernel.to_str().unwrap()]).output().unwrap();
    assert_fails(&output, 1, &["--initrd", "sparse", "needs"]);
}

#[test]
fn elf_segments_that_lie() {
    bad_kernel(&damaged(MEMORY_SIZE, 1 << 30), &["guest memory", "--memory"]);
    bad_kernel(&damaged(ADDRESS, 1 << 30), &["entry point"]);
    bad_kernel(&damaged(ADDRESS, u64::MAX - 64), &["wraps"]);
    bad_kernel(&damaged(OFFSET, u64::MAX - 3), &["wraps"]);
    bad_kernel(&damaged(MEMORY_SIZE, u64::MAX - 64), &["wraps"]);
    bad_kernel(&damaged(FILE_SIZE, 1 << 40), &["truncated"]);
    bad_kernel(&damaged(ADDRESS, 0x1000), &["first MiB"]);
    bad_kernel(&damaged(MEMORY_SIZE, u64::MAX - common::LOAD), &["guest memory", "18446744073709551615"]);
    bad_kernel(&damaged(MEMORY_SIZE, 0), &["anything to load"]);
    // The second header becomes a segment that lies over the first.
    let mut overlap = elf(&power_off(), Protocol::Pvh);
    overlap.copy_within(64..120, 120);
    bad_kernel(&overlap, &["overlaps"]);
}

#[test]
fn an_initramfs_that_does_not_fit() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let big = host.file("big", &vec![0; 20 << 20]);
    let output = host.boot(&kernel, &["--initrd", big.to_str().unwrap()]).output().unwrap();
    assert_fails(&output, 1, &["--initrd", "big", "23M", "--memory is 16M"]);
    let empty = host.file("empty", b"");
    let output = host.boot(&kernel, &["--initrd", empty.to_str().unwrap()]).output().unwrap();
    assert_fails(&output, 1, &["--initrd", "empty"]);
}

#[test]
fn a_command_line_that_is_too_long() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    for flag in ["--append", "--cmdline"] {
        let output = host.boot(&kernel, &[flag, &"x".repeat(5000)]).output().unwrap();
        assert_fails(&output, 2, &["--append", "2047"]);
    }
}

#[test]
fn vcpus_out_of_range() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    for cpus in ["0", "33", "1025"] {
        assert_fails(
            &host.boot(&kernel, &["--cpus", cpus]).output().unwrap(),
            2,
            &["--cpus", cpus, "1 to 32"],
        );
    }
    for cpus in ["-1", "two", "4294967296"] {
        assert_fails(&host.boot(&kernel, &[&format!("--cpus={cpus}")]).output().unwrap(), 2, &["--cpus"]);
    }
}

#[test]
fn memory_out_of_range() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    for (memory, status, words) in [
        ("0", 2, "at least 2M"),
        ("1M", 2, "at least 2M"),
        ("3T", 1, "this host has"),
        ("5T", 2, "at most"),
        ("99999999999999999999G", 2, "not a size"),
        ("16M,shared", 2, "allowed are"),
        ("16777217", 2, "multiple"),
    ] {
        assert_fails(
            &host.boot(&kernel, &["--memory", memory]).output().unwrap(),
            status,
            &["--memory", words],
        );
    }
}

#[test]
fn huge_pages_that_are_not_there() {
    let host = Host::new();
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.map_or(0, |n| n.trim().parse().unwrap_or(0)) >= 8 {
        eprintln!("skipped: this host has huge pages");
        return;
    }
    let kernel = host.kernel(&power_off());
    for memory in ["16M,hugepages=2M", "16M,hugepages=2M,backing=memfd"] {
        let output = host.boot(&kernel, &["--memory", memory]).output().unwrap();
        assert_fails(&output, 1, &["--memory", "free huge pages", "nr_hugepages"]);
    }
}

#[test]
fn a_kvm_device_that_is_none() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let plain = host.file("plain", b"x");
    for (path, words) in [
        ("/nonexistent", "no KVM"),
        (plain.to_str().unwrap(), "no KVM device"),
        ("/dev/null", "no KVM device"),
    ] {
        let output = host.boot(&kernel, &["--kvm-device", path]).output().unwrap();
        assert_fails(&output, 1, &[path, words]);
    }
}

#[test]
fn a_kvm_device_that_is_not_allowed() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let device = host.file("device", b"x");
    std::fs::set_permissions(&device, Permissions::from_mode(0o000)).unwrap();
    std::fs::set_permissions(host.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let program = host.dir.path().join("microvm");
    // By cp: a descriptor of ours would still be open for writing in a child that another test starts (ETXTBSY).
    let copied =
        std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_microvm")).arg(&program).status().unwrap();
    assert!(copied.success());
    let mut command = std::process::Command::new(program);
    if rustix::process::geteuid().is_root() {
        // Root may open anything: try it as nobody.
        command.uid(65534).gid(65534);
    }
    let command = command.args(["boot", "--kernel"]).arg(&kernel).arg("--kvm-device").arg(&device);
    assert_fails(&command.output().unwrap(), 1, &["device", "may not be opened", "usermod"]);
}

#[test]
fn json_that_is_wrong() {
    let host = Host::new();
    for (text, words) in [
        (r#"{"kernel": {"path": "k"}, "cpu": 2}"#, "unknown field `cpu`"),
        (r#"{"kernel": {"path": "k"}, "cpus": "two"}"#, "invalid type"),
        (r#"{"kernel": {"path": "k"}, "memory": {"size": "many"}}"#, "is not a size"),
        (r#"{"kernel": {"path": "k"}, "timeout": "soon"}"#, "timeout"),
        (r#"{"kernel": "#, "EOF"),
        ("{}", "missing field `kernel`"),
        ("", "EOF"),
    ] {
        host.file("vm.json", text.as_bytes());
        let output = host.microvm(["boot", "--config", "vm.json"]).output().unwrap();
        assert_fails(&output, 2, &["--config vm.json", words]);
    }
    let output = host.microvm(["boot", "--config", "missing.json"]).output().unwrap();
    assert_fails(&output, 2, &["--config missing.json", "No such file"]);
}

#[test]
fn control_characters_stay_out_of_errors() {
    let host = Host::new();
    let output = host.boot(Path::new("no\nsuch\u{1b}[31m"), &[]).output().unwrap();
    assert_fails(&output, 1, &["--kernel no\\nsuch\\u{1b}[31m"]);
}

#[test]
fn empty_paths_in_json() {
    let host = Host::new();
    for (json, words) in [
        (r#"{"kernel": {"path": ""}}"#, "kernel.path"),
        (r#"{"kernel": {"path": "k"}, "serial": {"file": ""}}"#, "serial.file"),
        (r#"{"kernel": {"path": "k"}, "console": {"file": ""}}"#, "console.file"),
    ] {
        host.file("vm.json", json.as_bytes());
        assert_fails(&host.microvm(["boot", "--config", "vm.json"]).output().unwrap(), 2, &[words]);
    }
}

#[test]
fn a_path_that_json_cannot_hold() {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::OsStr::from_bytes(b"bad\xff");
    let host = Host::new();
    let output =
        host.microvm(["boot".as_ref(), "--print-config".as_ref(), "--kernel".as_ref(), path]).output();
    assert_fails(&output.unwrap(), 2, &["--print-config", "JSON"]);
}

#[test]
fn a_failed_start_leaves_no_output_file() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let before = host.files();
    let flags = ["--serial", "file=log", "--exit-code-port", "0x64"];
    assert_fails(&host.boot(&kernel, &flags).output().unwrap(), 1, &["--exit-code-port"]);
    assert_eq!(host.files(), before);
}

#[test]
fn usage_that_is_wrong() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    for (flags, words) in [
        (&["--serial", "file="][..], &["--serial", "stdio, null and file=PATH"][..]),
        (&["--serial", "tcp"], &["--serial"]),
        (&["--console", "file="], &["--console", "stdio, null and file=PATH"]),
        (&["--console", "hvc0"], &["--console"]),
        (&["--console", "stdio", "--serial", "stdio"], &["--console stdio", "null or file=PATH"]),
        (&["--console", "file=log", "--serial", "file=log"], &["--console file=log", "another path"]),
        (&["--timeout", "soon"], &["--timeout"]),
        (&["--timeout", "0s"], &["--timeout"]),
        (&["--timeout", "1M"], &["--timeout", "months"]),
        (&["--exit-code-port", "0x+4"], &["--exit-code-port"]),
        (&["--timeout", "580000000000y"], &["--timeout", "longer than a year"]),
        (&["--load", "lazy"], &["--load", "auto, map and copy"]),
        (&["--exit-code-port", "70000"], &["--exit-code-port"]),
        (&["--timeline=xml"], &["--timeline"]),
        (&["--no-such-flag"], &["--no-such-flag"]),
        (&["--append", "a\nb"], &["--append", "control character"]),
    ] {
        assert_fails(&host.boot(&kernel, flags).output().unwrap(), 2, words);
    }
    assert_fails(&host.microvm(["boot"]).output().unwrap(), 2, &["--kernel"]);
}

#[test]
fn a_status_port_that_is_taken() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    for port in ["0x3f8", "0x64", "0x80", "0x505", "0x600", "0x20", "0x40"] {
        let output = host.boot(&kernel, &["--exit-code-port", port]).output().unwrap();
        assert_fails(&output, 1, &["--exit-code-port", "another device"]);
    }
}

#[test]
fn an_output_file_that_cannot_be() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    for flag in ["--serial", "--console"] {
        let output = host.boot(&kernel, &[flag, "file=/nonexistent/log"]).output().unwrap();
        assert_fails(&output, 1, &[flag, "/nonexistent/log"]);
        let output = host.boot(&kernel, &[flag, "file=vmlinux"]).output().unwrap();
        assert_fails(&output, 1, &[flag, "is the kernel"]);
    }
}

#[test]
fn software_kvm_is_told_at_once() {
    let host = Host::new();
    let hardware = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    if hardware.split_whitespace().any(|w| w == "svm" || w == "vmx") {
        eprintln!("skipped: this host has hardware KVM");
        return;
    }
    let kernel = host.kernel(&power_off());
    let output = host.microvm([Path::new("boot"), Path::new("--kernel"), &kernel]).output().unwrap();
    assert_fails(&output, 1, &["software KVM", "scripts/kvm-host", "--allow-software-kvm"]);
}

#[test]
fn an_instruction_that_cannot_be_emulated() {
    let host = Host::new();
    let hardware = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    if hardware.split_whitespace().any(|w| w == "svm" || w == "vmx") {
        eprintln!("skipped: this host has hardware KVM, which runs it");
        return;
    }
    // popcnt eax, eax: valid, but a software KVM's interpreter does not know it.
    let output = host.boot_code(&[&[0xf3, 0x0f, 0xb8, 0xc0], &power_off()[..]].concat(), &[]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(102), "{text}");
    for word in ["f3 0f b8 c0", "RIP 0x200000", "scripts/kvm-host"] {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

/// Boots with `--disk DISK`, and checks that it fails with these words and leaves nothing behind.
#[track_caller]
fn bad_disk(host: &Host, disk: &str, status: i32, words: &[&str]) {
    let kernel = host.kernel(&power_off());
    let before = host.files();
    let output = host.boot(&kernel, &["--disk", disk]).output().unwrap();
    assert_fails(&output, status, &[&["--disk"], words].concat());
    assert_eq!(host.files(), before);
}

#[test]
fn disks_that_are_none() {
    let host = Host::new();
    host.file("empty", b"");
    host.file("short", &[0; 511]);
    bad_disk(&host, "missing.img", 1, &["missing.img", "No such file"]);
    bad_disk(&host, "/tmp", 1, &["/tmp", "neither a file nor a block device"]);
    bad_disk(&host, "/dev/null", 1, &["/dev/null", "neither a file nor a block device"]);
    bad_disk(&host, "empty", 1, &["empty", "0 bytes", "512"]);
    bad_disk(&host, "short", 1, &["short", "511 bytes", "512"]);
    let fifo = host.dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    bad_disk(&host, "fifo", 1, &["neither a file nor a block device"]);
    bad_disk(&host, "fifo,readonly", 1, &["neither a file nor a block device"]);
}

#[test]
fn a_disk_of_an_odd_length_loses_its_end() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    host.file("odd", &[0; 1000]);
    let output = host.boot(&kernel, &["--disk", "odd"]).env("RUST_LOG", "warn").output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("last 488 bytes"), "{}", stderr(&output));
}

#[test]
fn a_disk_that_cannot_be_opened() {
    let host = Host::new();
    let disk = host.file("disk", &[0; 512]);
    std::fs::set_permissions(&disk, Permissions::from_mode(0o444)).unwrap();
    let kernel = host.kernel(&power_off());
    // Root may open everything, so somebody else tries.
    std::fs::set_permissions(host.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let run = |options: &str| {
        let mut command = host.boot(&kernel, &["--disk", &format!("disk{options}")]);
        if !rustix::process::geteuid().is_root() {
            return command.output().unwrap();
        }
        // Nor may they come to a program in root's home.
        let program = host.dir.path().join("microvm");
        // By another process: a file that is open for writing in a child of another test cannot be run.
        assert!(Command::new("cp").arg(command.get_program()).arg(&program).status().unwrap().success());
        let mut other = Command::new(program);
        other
            .args(command.get_args())
            .current_dir(&host.dir)
            .stdin(Stdio::null())
            .uid(65534)
            .output()
            .unwrap()
    };
    assert_fails(&run(""), 1, &["--disk disk", "cannot be written to", ",readonly"]);
    std::fs::set_permissions(&disk, Permissions::from_mode(0o000)).unwrap();
    assert_fails(&run(",readonly"), 1, &["--disk disk", "Permission denied"]);
}

#[test]
fn a_disk_that_another_vm_has() {
    let host = Host::new();
    let disk = host.file("disk", &[0; 512]);
    let file = File::open(&disk).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for options in ["", ",readonly"] {
        bad_disk(&host, &format!("disk{options}"), 1, &["--disk disk", "in use by another VM"]);
    }
    drop(file);
    let kernel = host.kernel(&power_off());
    let twice = host.boot(&kernel, &["--disk", "disk", "--disk", "disk,id=again"]).output().unwrap();
    assert_fails(&twice, 1, &["--disk disk", "twice"]);
}

#[test]
fn a_boot_file_is_no_disk_to_write() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    host.file("initrd", &[7; 512]);
    for file in ["vmlinux", "initrd"] {
        let boot = |options| {
            host.boot(&kernel, &["--initrd", "initrd", "--disk", &format!("{file}{options}")])
                .output()
                .unwrap()
        };
        assert_fails(&boot(""), 1, &[&format!("--disk {file}"), "kernel or the initramfs", ",readonly"]);
        assert_eq!(boot(",readonly").status.code(), Some(0));
    }
}

#[test]
fn a_disk_is_not_emptied_for_an_output() {
    let host = Host::new();
    let disk = host.file("disk", &[7; 512]);
    let kernel = host.kernel(&power_off());
    for options in ["", ",readonly"] {
        let disk = format!("disk{options}");
        let serial = host.boot(&kernel, &["--disk", &disk, "--serial", "file=disk"]).output().unwrap();
        assert_fails(&serial, 1, &["--serial file=disk", "disk"]);
        let metrics = host.boot(&kernel, &["--disk", &disk, "--metrics", "disk"]).output().unwrap();
        assert_fails(&metrics, 1, &["--metrics disk", "disk"]);
    }
    // Nor is another VM's.
    let other = File::open(&disk).unwrap();
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for flags in [["--serial", "file=disk"], ["--metrics", "disk"]] {
        assert_fails(&host.boot(&kernel, &flags).output().unwrap(), 1, &["disk", "locked"]);
    }
    assert_eq!(std::fs::read(disk).unwrap(), [7; 512]);
}

#[test]
fn disk_options_that_are_none() {
    let host = Host::new();
    host.file("disk", &[0; 512]);
    let kernel = host.kernel(&power_off());
    for (options, status, words) in [
        (",ro", 2, &["\"ro\"", "readonly", "engine=uring", "iops=N"][..]),
        (",", 2, &["unknown option"]),
        (",engine=aio", 2, &["engine=aio", "engine=threads"]),
        (",iops=many", 2, &["iops=many", "whole number"]),
        (",iops=0", 2, &["iops=0", "1 or more"]),
        (",bandwidth=quick", 2, &["bandwidth", "quick", "128M"]),
        (",bandwidth=0", 2, &["bandwidth=0", "1 or more"]),
        (",id=", 2, &["id=\"\"", "1 to 20"]),
        (",id=a b", 2, &["id=\"a b\"", "1 to 20"]),
        (",id=123456789012345678901", 2, &["1 to 20"]),
    ] {
        bad_disk(&host, &format!("disk{options}"), status, words);
    }
    bad_disk(&host, "", 2, &["no path"]);
    assert_fails(&host.boot(&kernel, &["--root"]).output().unwrap(), 2, &["--root", "--disk PATH"]);
    let names = host.boot(&kernel, &["--disk", "disk,id=disk1", "--disk", "disk"]).output().unwrap();
    assert_fails(&names, 2, &["--disk disk", "disk1", "id=NAME"]);
}

#[test]
fn share_options_that_are_wrong() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    std::fs::create_dir(host.dir.path().join("d")).unwrap();
    let before = host.files();
    let long = format!("d,tag={}", "x".repeat(37));
    for (value, words) in [
        ("", &["no path"][..]),
        (",tag=t", &["no path"]),
        ("d", &["tag=TAG is missing"]),
        ("d,tag=t,ro", &["\"ro\"", "readonly"]),
        ("d,tag=t,readonly=yes", &["\"readonly=yes\""]),
        ("d,tag=t,tag=t", &["\"tag=t\"", "once"]),
        ("d,tag=t,uid=-1", &["uid=-1", "0 to 4294967294"]),
        ("d,tag=t,gid=4294967295", &["gid=4294967295", "0 to 4294967294"]),
        ("d,tag=", &["tag=\"\"", "1 to 36"]),
        ("d,tag=a b", &["tag=\"a b\"", "1 to 36"]),
        (&long, &["1 to 36"]),
    ] {
        let output = host.boot(&kernel, &["--share", value]).output().unwrap();
        assert_fails(&output, 2, &[&["--share"], words].concat());
    }
    let twice = host.boot(&kernel, &["--share", "d,tag=t", "--share", "d,tag=t,readonly"]).output().unwrap();
    assert_fails(&twice, 2, &["--share d", "another share has the tag t"]);
    let nine = (0..9).flat_map(|n| ["--share".into(), format!("d,tag=t{n}")]).collect::<Vec<_>>();
    let nine: Vec<_> = nine.iter().map(String::as_str).collect();
    assert_fails(&host.boot(&kernel, &nine).output().unwrap(), 2, &["9 shares", "at most 8"]);
    for (json, words) in [
        (r#"{"kernel": {"path": "k"}, "shares": ["d"]}"#, "tag=TAG is missing"),
        (r#"{"kernel": {"path": "k"}, "shares": [{"path": "d"}]}"#, "missing field `tag`"),
        (
            r#"{"kernel": {"path": "k"}, "shares": [{"path": "d", "tag": "t", "ro": true}]}"#,
            "unknown field `ro`",
        ),
    ] {
        host.file("vm.json", json.as_bytes());
        assert_fails(&host.microvm(["boot", "--config", "vm.json"]).output().unwrap(), 2, &[words]);
        std::fs::remove_file(host.dir.path().join("vm.json")).unwrap();
    }
    assert_eq!(host.files(), before);
}

#[test]
fn shares_that_are_none() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let folder = |name: &str, mode| {
        let path = host.dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    };
    host.file("plain", b"x");
    let fifo = host.dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    folder("closed", 0o000);
    folder("unlisted", 0o311);
    folder("fixed", 0o555);
    let before = host.files();
    for (path, words) in [
        ("missing", "No such file"),
        ("plain/x", "Not a directory"),
        ("fifo", "is neither a folder nor a file"),
        ("/dev/null", "is neither a folder nor a file"),
    ] {
        let output = host.boot(&kernel, &["--share", &format!("{path},tag=t")]).output().unwrap();
        assert_fails(&output, 1, &["--share", path, words]);
    }
    // Root may read and write everything while the VM is made.
    if !rustix::process::getuid().is_root() {
        for (value, words) in [
            ("closed,tag=t", "cannot be read"),
            ("unlisted,tag=t", "cannot be read"),
            ("fixed,tag=t", ",readonly"),
        ] {
            let output = host.boot(&kernel, &["--share", value]).output().unwrap();
            assert_fails(&output, 1, &["--share", words]);
        }
    }
    let output = host.boot(&kernel, &["--share", "fixed,tag=t,readonly"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(host.files(), before);
}

#[test]
fn vsock_options_that_are_wrong() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let long = format!("cid=3,socket={}", "x".repeat(97));
    let before = host.files();
    for (value, words) in [
        ("cid=0,socket=v", &["cid=0", "reserved"][..]),
        ("cid=1,socket=v", &["cid=1", "reserved"]),
        ("cid=2,socket=v", &["cid=2", "reserved"]),
        ("cid=4294967295,socket=v", &["cid=4294967295", "reserved"]),
        ("cid=4294967296,socket=v", &["cid=4294967296", "3 to 4294967294"]),
        ("cid=+3,socket=v", &["cid=+3", "3 to 4294967294"]),
        ("cid=,socket=v", &["cid=", "3 to 4294967294"]),
        ("cid=3", &["socket=PATH is missing"]),
        ("socket=v", &["cid=N is missing"]),
        ("cid=3,socket=", &["socket=PATH", "empty path"]),
        ("cid=3,socket=v,cid=3", &["cid=3", "give each once"]),
        ("cid=3,socket=v,mtu=5", &["mtu=5", "allowed are cid=N and socket=PATH"]),
        (&long, &["97 bytes", "at most 96"]),
    ] {
        let output = host.boot(&kernel, &["--vsock", value]).output().unwrap();
        assert_fails(&output, 2, &[&["--vsock"], words].concat());
    }
    for (json, words) in [
        (r#"{"kernel": {"path": "k"}, "vsock": {"cid": 2, "socket": "v"}}"#, "reserved"),
        (r#"{"kernel": {"path": "k"}, "vsock": {"cid": 3}}"#, "missing field `socket`"),
        (r#"{"kernel": {"path": "k"}, "vsock": {"cid": 3, "socket": "v", "uds": 1}}"#, "unknown field `uds`"),
    ] {
        host.file("vm.json", json.as_bytes());
        assert_fails(&host.microvm(["boot", "--config", "vm.json"]).output().unwrap(), 2, &[words]);
        std::fs::remove_file(host.dir.path().join("vm.json")).unwrap();
    }
    assert_eq!(host.files(), before);
}

#[test]
fn vsock_sockets_that_cannot_be() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    host.file("plain", b"x");
    let path = host.dir.path().join("busy");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let before = host.files();
    for (socket, words) in [
        ("missing/v", "its folder"),
        ("plain/v", "its folder"),
        ("plain", "no socket"),
        ("busy", "another program accepts connections"),
        (".", "cannot listen"),
    ] {
        let output = host.boot(&kernel, &["--vsock", &format!("cid=3,socket={socket}")]).output().unwrap();
        assert_fails(&output, 1, &[&format!("--vsock socket={socket}"), words]);
    }
    assert_eq!(host.files(), before);
}

#[test]
fn a_dead_vsock_socket_is_replaced_and_removed() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let path = host.dir.path().join("v");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let output = host.boot(&kernel, &["--vsock", "cid=3,socket=v"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("replaced"), "{}", stderr(&output));
    assert!(!path.exists(), "the socket is left behind");
    // Nor does a start that fails later leave one.
    let flags = ["--vsock", "cid=3,socket=v", "--exit-code-port", "0x64"];
    assert_fails(&host.boot(&kernel, &flags).output().unwrap(), 1, &["--exit-code-port"]);
    assert!(!path.exists(), "a failed start leaves its socket behind");
}

/// A VM that runs until it is killed.
struct Spinning(std::process::Child);

impl Spinning {
    fn start(host: &Host, flags: &[&str]) -> Self {
        let kernel = host.kernel(&[print("r"), SPIN.to_vec()].concat());
        let mut child = host.boot(&kernel, flags).stdout(std::process::Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(child)
    }

    /// With SIGKILL, so that it takes nothing with it.
    fn kill(mut self) {
        self.0.kill().unwrap();
        assert!(self.0.wait().unwrap().code().is_none());
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The socket belongs to one VM at a time; the CID is seen in its guest only, so VMs may share one.
#[test]
fn a_vsock_socket_of_a_running_vm_is_in_use_and_of_a_killed_one_is_not() {
    let host = Host::new();
    let first = Spinning::start(&host, &["--vsock", "cid=3,socket=v"]);
    let power_off_with = |socket: &str| {
        let flag = format!("cid=3,socket={socket}");
        host.boot(&host.kernel(&power_off()), &["--vsock", &flag]).output().unwrap()
    };
    assert_fails(&power_off_with("v"), 1, &["--vsock socket=v", "another program accepts connections"]);
    let other = power_off_with("w");
    assert_eq!((other.status.code(), stderr(&other).as_str()), (Some(0), ""));
    let path = host.dir.path().join("v");
    std::os::unix::net::UnixStream::connect(&path).expect("the first VM's socket is as it was");
    first.kill();
    assert!(path.exists());
    let next = power_off_with("v");
    assert_eq!(next.status.code(), Some(0), "{}", stderr(&next));
    assert!(stderr(&next).contains("replaced the socket that a dead VM left"), "{}", stderr(&next));
    assert!(!path.exists());
}

/// By a signal the VM ends as by itself.
#[test]
fn a_stopped_vm_removes_its_vsock_socket() {
    let host = Host::new();
    let mut vm = Spinning::start(&host, &["--vsock", "cid=3,socket=v"]);
    assert!(host.dir.path().join("v").exists());
    let pid = rustix::process::Pid::from_child(&vm.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(vm.0.wait().unwrap().code(), Some(143));
    assert!(!host.dir.path().join("v").exists());
}

#[test]
fn a_vsock_socket_where_the_control_socket_is() {
    let host = Host::new();
    let flags = ["--vsock", "cid=3,socket=v", "--control", "v"];
    let output = host.boot(&host.kernel(&power_off()), &flags).output().unwrap();
    assert_fails(&output, 1, &["--control v", "listens there already"]);
    assert!(!host.dir.path().join("v").exists());
}

#[test]
fn a_tap_that_is_not_there() {
    let host = Host::new();
    let output = host.boot(&host.kernel(&power_off()), &["--net", "tap=no-such-tap"]).output().unwrap();
    assert_fails(&output, 1, &["--net tap=no-such-tap", "no such interface", "ip tuntap add no-such-tap"]);
}

#[test]
fn an_interface_that_is_no_tap() {
    let host = Host::new();
    // "no tap", or no /dev/net/tun at all, or not for this user: whichever, it names the flag and what to do.
    let output = host.boot(&host.kernel(&power_off()), &["--net", "tap=lo"]).output().unwrap();
    assert_fails(&output, 1, &["--net tap=lo", "sudo"]);
}

/// passt reads what the guest sends. What the caller of `microvm` left open or told it is none of its business.
#[test]
fn passt_inherits_neither_descriptors_nor_the_environment() {
    let host = Host::new();
    let bin = host.dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let left_open = File::create(host.dir.path().join("left-open")).unwrap();
    // Rust closes what it opens on exec; others do not.
    rustix::io::fcntl_setfd(&left_open, rustix::io::FdFlags::empty()).unwrap();
    let kernel = host.kernel(&power_off());
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let log = host.dir.path().join("told");
    let passt = bin.join("passt");
    std::fs::write(&passt, format!("#!/bin/sh\n(env; ls -l /proc/$$/fd) >{}\nexit 1\n", log.display()))
        .unwrap();
    std::fs::set_permissions(&passt, Permissions::from_mode(0o755)).unwrap();
    let mut command = host.boot(&kernel, &["--net", "user"]);
    let output = command.env("PATH", path).env("SECRET", "hunter2").output().unwrap();
    assert_fails(&output, 1, &["--net user", "passt ended at once"]);
    let told = std::fs::read_to_string(log).unwrap();
    assert!(told.contains("PATH=") && told.contains("socket:"), "{told}");
    assert!(!told.contains("hunter2") && !told.contains("left-open"), "{told}");
}

#[test]
fn no_passt_installed() {
    let host = Host::new();
    let mut command = host.boot(&host.kernel(&power_off()), &["--net", "user"]);
    let output = command.env("PATH", "/nonexistent").output().unwrap();
    assert_fails(&output, 1, &["--net user", "no passt", "apt-get install passt"]);
}

/// It is in this folder, and hangs.
#[test]
fn a_passt_that_is_never_ready() {
    let host = Host::new();
    let passt = host.file("passt", b"#!/bin/sh\nexec sleep 1000\n");
    std::fs::set_permissions(&passt, Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", host.dir.path().display());
    let output =
        host.boot(&host.kernel(&power_off()), &["--net", "user"]).env("PATH", path).output().unwrap();
    assert_fails(&output, 1, &["--net user", "not ready", "10s"]);
}

#[test]
fn a_published_port_that_is_taken() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = [(tcp.local_addr().unwrap(), "tcp"), (udp.local_addr().unwrap(), "udp")];
    for (address, protocol) in taken {
        let port = format!("{address}:80/{protocol}");
        let output = host.boot(&kernel, &["--net", "user", "-p", &port]).output().unwrap();
        assert_fails(&output, 1, &["--publish", &port, "in use"]);
    }
    // All addresses are IPv6's, too: who has the port there would be taken for the guest by clients of "localhost".
    let Ok(other) = std::net::TcpListener::bind("[::1]:0") else { return };
    let port = format!("{}:80", other.local_addr().unwrap().port());
    let output = host.boot(&kernel, &["--net", "user", "-p", &port]).output().unwrap();
    assert_fails(&output, 1, &["--publish", &port, "in use"]);
}

/// Boots with these flags, and checks that it fails with these words.
#[track_caller]
fn bad_net(host: &Host, flags: &[&str], words: &[&str]) {
    let kernel = host.kernel(&power_off());
    assert_fails(&host.boot(&kernel, flags).output().unwrap(), 2, words);
}

#[test]
fn network_options_that_are_none() {
    let host = Host::new();
    for (net, words) in [
        ("", &["--net", "tap=NAME", "user"][..]),
        ("bridge", &["\"bridge\"", "tap=NAME", "user"]),
        ("tap", &["\"tap\"", "tap=NAME"]),
        ("user=me", &["\"user=me\"", "tap=NAME"]),
        ("user,", &["unknown option \"\"", "mac=MAC", "iops=N"]),
        ("tap=a,host-loopback", &["--net tap=a,host-loopback", "only user mode"]),
        ("user,host-loopback=1", &["\"host-loopback=1\"", "host-loopback"]),
        ("user,queues=2", &["\"queues=2\"", "mac=MAC", "bandwidth=SIZE"]),
        ("user,mac=1", &["mac \"1\"", "six pairs", "02:00:00:00:00:01"]),
        ("user,mac=+2:00:00:00:00:00", &["six pairs"]),
        ("user,mac=01:00:00:00:00:00", &["group", "first byte must be even"]),
        ("tap=a,vhost=yes", &["vhost=yes", "auto, on and off"]),
        ("user,vhost=on", &["--net vhost=on", "taps", "vhost=off"]),
        ("tap=a,vhost=on,iops=1", &["--net vhost=on", "without iops=N", "vhost=off"]),
        ("user,iops=many", &["iops=many", "whole numbers from 1"]),
        ("user,iops=+1", &["iops=+1", "whole numbers"]),
        ("user,iops=0", &["iops=0", "leave the limit out"]),
        ("user,bandwidth=quick", &["bandwidth", "quick", "128M"]),
        ("user,bandwidth=0", &["bandwidth=0", "leave the limit out"]),
        ("tap=", &["--net tap=", "1 to 15 bytes"]),
        ("tap=0123456789abcdef", &["0123456789abcdef", "1 to 15 bytes"]),
        ("tap=a/b", &["tap=a/b", "without spaces"]),
        ("tap=..", &["tap=..", "1 to 15 bytes"]),
    ] {
        bad_net(&host, &["--net", net], words);
    }
    bad_net(&host, &["--net", "tap=a", "--net", "tap=a"], &["--net tap=a", "twice"]);
    let mac = "user,mac=02:00:00:00:00:01";
    bad_net(&host, &["--net", mac, "--net", mac], &["mac=02:00:00:00:00:01", "twice"]);
}

#[test]
fn ports_that_cannot_be_published() {
    let host = Host::new();
    for port in ["80", "0:80", "80:0", "80:65536", "80:80/sctp", "here:80:80", "::1:80:80"] {
        bad_net(
            &host,
            &["--net", "user", "-p", port],
            &["--publish", port, "[ADDRESS:]HOST:GUEST", "8080:80"],
        );
    }
    bad_net(&host, &["--net", "tap=a", "-p", "8080:80"], &["--publish 8080:80", "add --net user"]);
    let twice = ["--net", "user", "-p", "8080:80", "-p", "127.0.0.1:8080:81"];
    bad_net(&host, &twice, &["--publish 127.0.0.1:8080:81", "twice"]);
}
