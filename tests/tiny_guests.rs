//! Guests of a few instructions on this machine's own `/dev/kvm`, hardware or software.

mod common;

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Host, Protocol, SPIN, elf, out, own_stderr, power_off, print, smp, stderr, stdout};

/// Status of a guest that runs `code`.
#[track_caller]
fn status(code: &[u8], flags: &[&str]) -> Option<i32> {
    let output = Host::new().boot_code(code, flags);
    output.status.code()
}

#[test]
fn acpi_s5_switches_off() {
    assert_eq!(status(&power_off(), &[]), Some(0));
}

#[test]
fn every_reset_ends_the_vm() {
    assert_eq!(status(&out(0x64, 0xfe), &[]), Some(0));
    assert_eq!(status(&out(0x602, 1), &[]), Some(0));
    // mov eax, 0xffff0; jmp eax: the BIOS's reset vector.
    assert_eq!(status(&[0xb8, 0xf0, 0xff, 0x0f, 0x00, 0xff, 0xe0], &["--timeout", "5s"]), Some(0));
}

#[test]
fn a_panic_is_101() {
    let output = Host::new().boot_code(&out(0x505, 1), &[]);
    assert_eq!(output.status.code(), Some(101));
    assert!(stderr(&output).contains("panicked"));
}

#[test]
fn a_triple_fault_is_102() {
    // ud2, with an interrupt table of limit 0.
    let output = Host::new().boot_code(&[0x0f, 0x0b], &[]);
    assert_eq!(output.status.code(), Some(102));
    assert!(stderr(&output).contains("triple-faulted"), "{}", stderr(&output));
}

#[test]
fn a_timeout_is_124() {
    let begin = Instant::now();
    assert_eq!(status(&SPIN, &["--timeout", "200ms"]), Some(124));
    assert!(begin.elapsed() >= Duration::from_millis(200));
}

#[test]
fn the_guest_chooses_its_status() {
    let exit = |value| [out(0xf4, value), power_off()].concat();
    assert_eq!(status(&exit(42), &["--exit-code-port", "0xf4"]), Some(42));
    assert_eq!(status(&exit(127), &["--exit-code-port", "0xf4"]), Some(127));
    assert_eq!(status(&exit(200), &["--exit-code-port", "244"]), Some(0), "only 0 to 127 count");
    assert_eq!(status(&exit(42), &[]), Some(0), "no port, no status");
}

#[test]
fn both_protocols_enter_the_guest() {
    let host = Host::new();
    for protocol in [Protocol::Pvh, Protocol::Linux64] {
        let kernel = host.file("vmlinux", &elf(&[print("hello\n"), power_off()].concat(), protocol));
        let output = host.boot(&kernel, &[]).output().unwrap();
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "hello\n"), "{protocol:?}");
    }
}

#[test]
fn pvh_hands_over_the_start_info() {
    // cmp dword [ebx], 0x336ec578; jne spin; then off.
    let code = [vec![0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0x07], power_off(), SPIN.to_vec()].concat();
    assert_eq!(status(&code, &[]), Some(0));
}

#[test]
fn nobody_there_reads_as_ones() {
    // in al, 0x7f; cmp al, -1; jne spin; mov eax, [0xd0000000]; cmp eax, -1; jne spin; off
    let code = [
        vec![0xe4, 0x7f, 0x3c, 0xff, 0x75, 0x11],
        vec![0xa1, 0x00, 0x00, 0x00, 0xd0, 0x83, 0xf8, 0xff, 0x75, 0x07],
        power_off(),
        SPIN.to_vec(),
    ]
    .concat();
    assert_eq!(status(&code, &["--timeout", "5s"]), Some(0));
}

#[test]
fn string_output_is_many_bytes() {
    // mov esi, LOAD + 19; mov ecx, 5; mov dx, 0x3f8; rep outsb; jmp +5; "abcde"
    let code = [
        vec![
            0xbe, 0x13, 0x00, 0x20, 0x00, 0xb9, 5, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e, 0xeb, 5, 0x90,
        ],
        b"abcde".to_vec(),
        power_off(),
    ]
    .concat();
    // The jump skips the nop's byte and four letters: start the text one later.
    let output = Host::new().boot_code(&fix_jump(code), &[]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "abcde"));
}

/// The jump over the text counts from behind itself.
fn fix_jump(mut code: Vec<u8>) -> Vec<u8> {
    code[17] = 6;
    code
}

#[test]
fn string_input_fills_guest_memory() {
    // mov edi, 0x300000; mov ecx, 3; mov dx, 0x7f; rep insb; cmp dword [0x300000], 0x00ffffff; jne spin; off
    let code = [
        vec![0xbf, 0, 0, 0x30, 0, 0xb9, 3, 0, 0, 0, 0x66, 0xba, 0x7f, 0, 0xf3, 0x6c],
        vec![0x81, 0x3d, 0, 0, 0x30, 0, 0xff, 0xff, 0xff, 0, 0x75, 0x07],
        power_off(),
        SPIN.to_vec(),
    ]
    .concat();
    assert_eq!(status(&code, &["--timeout", "5s"]), Some(0));
}

/// Echoes COM1 until a `q`.
fn echo() -> Vec<u8> {
    [
        // mov dx, 0x3fd; in al, dx; test al, 1; jz back
        vec![0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7],
        // mov dx, 0x3f8; in al, dx; out dx, al; cmp al, 'q'; jne back to the start
        vec![0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, b'q', 0x75, 0xed],
        power_off(),
    ]
    .concat()
}

#[test]
fn input_longer_than_the_fifo_arrives_whole() {
    let host = Host::new();
    let text = "0123456789abcdefghijklmnop".repeat(40) + "q";
    for from_file in [false, true] {
        let mut command = host.boot(&host.kernel(&echo()), &[]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = if from_file {
            let input = host.file("input", text.as_bytes());
            command.stdin(std::fs::File::open(input).unwrap()).output().unwrap()
        } else {
            let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
            child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        };
        assert_eq!((output.status.code(), stdout(&output)), (Some(0), text.clone()), "file: {from_file}");
    }
}

#[test]
fn signals_end_the_vm_in_order() {
    let host = Host::new();
    for (name, number) in [("TERM", 15), ("INT", 2), ("HUP", 1)] {
        let code = [print("up\n"), SPIN.to_vec()].concat();
        let mut child = host.boot(&host.kernel(&code), &[]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        let begin = Instant::now();
        std::process::Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(128 + number), "{name}");
        assert!(begin.elapsed() < Duration::from_secs(3), "{name} took {:?}", begin.elapsed());
    }
}

#[test]
fn a_reader_that_stops_does_not_stop_microvm() {
    // Prints without end: the guest has to wait, and microvm must stay reachable.
    let host = Host::new();
    let code = [print("x"), vec![0xeb, 0xf7]].concat();
    let mut child = host.boot(&host.kernel(&code), &[]).stdout(Stdio::piped()).spawn().unwrap();
    // Longer than a pipe and the buffer behind it last; nobody reads.
    std::thread::sleep(Duration::from_millis(1500));
    let memory = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let rss = memory.lines().find(|l| l.starts_with("VmRSS")).unwrap().to_string();
    let kib: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 64 << 10, "unread output piles up: {rss}");
    std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn a_closed_output_does_not_end_the_guest() {
    let host = Host::new();
    let code = [print("x"), power_off()].concat();
    let mut child = host.boot(&host.kernel(&code), &[]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_serial_port_goes_to_a_file_or_nowhere() {
    let host = Host::new();
    let kernel = host.kernel(&[print("to file\n"), power_off()].concat());
    let output = host.boot(&kernel, &["--serial", "file=console.log"]).output().unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), ""));
    assert_eq!(std::fs::read_to_string(host.dir.path().join("console.log")).unwrap(), "to file\n");
    let output = host.boot(&kernel, &["--serial", "null"]).output().unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), ""));
}

#[test]
fn the_timeline_has_the_guests_marks_in_order() {
    let marks: Vec<u8> = [0xe0, 0x55, 0xe2, 0xe1, 0xe3, 0xe3].iter().flat_map(|m| out(0x80, *m)).collect();
    let output = Host::new().boot_code(&[marks, power_off()].concat(), &["--timeline=json"]);
    let json: serde_json::Value = serde_json::from_str(&own_stderr(&output)).unwrap();
    assert_eq!(json["schema"], "microvm.timeline/1");
    let phases = json["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|p| p["name"].as_str().unwrap()).collect();
    let expected = [
        "start",
        "open-kvm",
        "memory",
        "kernel-mapped",
        "vm-made",
        "tables",
        "vcpus-made",
        "first-run",
        "guest-kernel",
        "workload-setup",
        "workload",
        "guest-end",
        "teardown",
    ];
    assert_eq!(names, expected);
    let sum: u64 = phases.iter().map(|p| p["duration_ns"].as_u64().unwrap()).sum();
    assert_eq!(json["total_ns"].as_u64(), Some(sum));
    assert_eq!(json["exits"]["user"]["port write"], 7, "{json}");
}

#[test]
fn the_human_timeline_has_a_row_for_each_phase() {
    let output = Host::new().boot_code(&power_off(), &["--timeline"]);
    let text = stderr(&output);
    for word in ["open-kvm", "kernel-mapped", "first-run", "teardown", "total", "VM exits"] {
        assert!(text.contains(word), "no {word} in:\n{text}");
    }
}

#[test]
fn memory_reaches_over_the_gap() {
    // 64-bit code: mov rax, 0x100000000 would need its page mapped; the memory map is what can be seen from here.
    for size in ["3G", "3584M", "4G"] {
        assert_eq!(status(&power_off(), &["--memory", size]), Some(0), "{size}");
    }
}

#[test]
fn memfd_memory_boots() {
    assert_eq!(status(&power_off(), &["--memory", "16M,backing=memfd"]), Some(0));
}

#[test]
fn an_initramfs_is_handed_over() {
    // PVH: the module list's address is at [ebx+16], the module's first 8 bytes are its address.
    // mov eax, [ebx+16]; mov eax, [eax]; cmp dword [eax], "init"; jne spin; off
    let code = [
        vec![0x8b, 0x43, 0x10, 0x8b, 0x00, 0x81, 0x38, b'i', b'n', b'i', b't', 0x75, 0x07],
        power_off(),
        SPIN.to_vec(),
    ]
    .concat();
    let host = Host::new();
    let initrd = host.file("initrd", b"initramfs");
    let output =
        host.boot(&host.kernel(&code), &["--timeout", "5s", "--initrd", initrd.to_str().unwrap()]).output();
    assert_eq!(output.unwrap().status.code(), Some(0));
}

#[test]
fn what_print_config_writes_boots() {
    let host = Host::new();
    let kernel = host.kernel(&[print("config\n"), power_off()].concat());
    let printed = host.boot(&kernel, &["--cpus", "2", "--print-config"]).output().unwrap();
    assert_eq!(printed.status.code(), Some(0));
    host.file("vm.json", &printed.stdout);
    let output = host.microvm(["boot", "--config", "vm.json"]).output().unwrap();
    assert_eq!(
        (output.status.code(), stdout(&output).as_str()),
        (Some(0), "config\n"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn many_vcpus_start_and_stop() {
    for cpus in ["2", "4", "32"] {
        assert_eq!(status(&power_off(), &["--cpus", cpus]), Some(0), "{cpus}");
    }
}

#[test]
fn every_vcpu_runs() {
    for cpus in [2u8, 4, 8] {
        // Each other vCPU: lock inc byte [0x7000]; cli; hlt
        let ap = [0xf0, 0xfe, 0x06, 0x00, 0x70, 0xfa, 0xf4];
        // cmp byte [0x7000], cpus - 1; jne back; off
        let bsp = [vec![0x80, 0x3d, 0x00, 0x70, 0, 0, cpus - 1, 0x75, 0xf7], power_off()].concat();
        let flags = ["--cpus", &cpus.to_string(), "--timeout", "10s"];
        assert_eq!(status(&smp(&ap, &bsp), &flags), Some(0), "{cpus}");
    }
}

#[test]
fn vcpus_that_print_at_once_end_in_time() {
    // mov dx, 0x3f8; mov al, 'A'; out dx, al; jmp back
    let ap = [0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xeb, 0xfd];
    let bsp = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, 0xeb, 0xfd];
    let begin = Instant::now();
    let output = Host::new().boot_code(&smp(&ap, &bsp), &["--cpus", "4", "--timeout", "1s"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(begin.elapsed() < Duration::from_secs(5));
    let text = stdout(&output);
    assert!(text.contains('A') && text.contains('B'), "only one of them printed");
}

/// Reads and writes ports and device addresses at random, in every width, until the time is up.
fn babble(seed: u32) -> Vec<u8> {
    let [a, b, c, d] = seed.to_le_bytes();
    [
        // mov esi, seed; again: imul esi, esi, 1664525; add esi, 1013904223
        vec![0xbe, a, b, c, d, 0x69, 0xf6, 0x0d, 0x66, 0x19, 0x00, 0x81, 0xc6, 0x5f, 0xf3, 0x6e, 0x3c],
        // mov edx, esi; shr edx, 16; mov eax, esi
        vec![0x89, 0xf2, 0xc1, 0xea, 0x10, 0x89, 0xf0],
        // out dx, al; out dx, ax; out dx, eax; in al, dx; in ax, dx; in eax, dx
        vec![0xee, 0x66, 0xef, 0xef, 0xec, 0x66, 0xed, 0xed],
        // mov edi, esi; or edi, 0x80000000; mov [edi], eax; mov ebx, [edi]; jmp again
        vec![0x89, 0xf7, 0x81, 0xcf, 0, 0, 0, 0x80, 0x89, 0x07, 0x8b, 0x1f, 0xeb, 0xd7],
    ]
    .concat()
}

#[test]
fn a_guest_that_babbles_harms_only_itself() {
    let host = Host::new();
    for seed in [1, 0xdead_beef, 0x1234_5678] {
        let flags =
            ["--timeout", "1s", "--serial", "file=console", "--exit-code-port", "0xf4", "--timeline=json"];
        let output = host.boot(&host.kernel(&babble(seed)), &flags).output().unwrap();
        let text = own_stderr(&output);
        // It may happen upon the reset line or upset itself; microvm must end in one of its documented ways.
        assert!(matches!(output.status.code(), Some(0..=127)), "{seed:#x}: {:?} {text}", output.status);
        let timeline =
            text.lines().find(|l| l.starts_with('{')).unwrap_or_else(|| panic!("{seed:#x}: {text}"));
        let json: serde_json::Value = serde_json::from_str(timeline).unwrap();
        assert!(json["exits"]["user"]["port write"].as_u64() > Some(20), "{seed:#x} was quiet: {json}");
        assert!(text.lines().count() <= 2, "the guest fills the log: {text}");
    }
}

/// `mov dword [address], value`
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Resets the virtio device at `base` and starts it with one queue of 16 descriptors at `table`, over and over.
fn restart_for_ever(base: u32, table: u32) -> Vec<u8> {
    let start = [
        [(0x70, 0), (0x70, 1), (0x70, 3)],
        [(0x24, 1), (0x20, 1), (0x70, 11)],
        [(0x38, 16), (0x80, table), (0x90, 0x30_1000)],
        [(0xa0, 0x30_2000), (0x44, 1), (0x70, 15)],
    ];
    let mut code: Vec<u8> = start.iter().flatten().flat_map(|(at, value)| store(base + at, *value)).collect();
    // jmp to the start
    let back = -(code.len() as i32 + 5);
    code.extend([&[0xe9][..], &back.to_le_bytes()].concat());
    code
}

/// The entropy source, and the disk behind it.
const RNG: u32 = 0xe000_0000;
const DISK: u32 = 0xe000_1000;

#[test]
fn a_driver_that_goes_wrong_after_each_reset_does_not_fill_the_log() {
    // The descriptor table is not aligned.
    let code = restart_for_ever(RNG, 0x30_0001);
    let output = Host::new().boot_code(&code, &["--verbose", "--timeout", "1s"]);
    let lines = stderr(&output).lines().filter(|line| line.contains("is not aligned")).count();
    assert!((1..=10).contains(&lines), "{lines} lines");
}

#[test]
fn a_host_short_of_descriptors_for_a_while_does_not_end_the_vm() {
    let host = Host::new();
    host.file("disk", &[0; 4096]);
    let code = [print("up\n"), restart_for_ever(DISK, 0x30_0000)].concat();
    let mut child = host
        .boot(&host.kernel(&code), &["--disk", "disk", "--timeout", "3s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    // All numbers below are in use: no descriptor is left, and soon there are enough again.
    for limit in ["3:", "1024:"] {
        let pid = child.id().to_string();
        let mut set = std::process::Command::new("prlimit");
        assert!(set.args(["--pid", &pid, &format!("--nofile={limit}")]).status().unwrap().success());
        std::thread::sleep(Duration::from_millis(500));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", stderr(&output));
}
