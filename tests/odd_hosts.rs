//! A host that is not kind: readers that stall, full devices, limits, signals that a parent ignores or blocks. The VM
//! ends as it should, in time, and the user can always leave.

mod common;

use std::ffi::c_int;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Host, SPIN, assert_fails, in_child, out, own_session, power_off, print, stderr, terminal};

/// Prints without end, faster than any reader: `rep outsb` of 1 KiB, again and again.
fn endless() -> Vec<u8> {
    // mov esi, LOAD; mov ecx, 1024; mov dx, 0x3f8; rep outsb; jmp back
    let code = [0xbe, 0, 0, 0x20, 0, 0xb9, 0, 4, 0, 0, 0x66, 0xba, 0xf8, 3, 0xf3, 0x6e, 0xeb, 0xee];
    [code.to_vec(), vec![b'x'; 1024]].concat()
}

/// Waits for `child` and says how it ended; it must within 6 seconds, which each test's limit is far below.
#[track_caller]
fn ends_in_time(mut child: Child) -> Option<i32> {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(6) {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("microvm hangs");
}

#[test]
fn a_reader_that_stalls_and_then_goes_away() {
    let host = Host::new();
    let mut command = host.boot(&host.kernel(&endless()), &["--timeout", "2s"]);
    // Standard input stays open and silent.
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let input = child.stdin.take();
    std::thread::sleep(Duration::from_millis(700));
    drop(child.stdout.take());
    assert_eq!(ends_in_time(child), Some(124));
    drop(input);
}

#[test]
fn a_terminal_that_nobody_reads() {
    let host = Host::new();
    let (_ours, theirs) = terminal();
    let mut command = host.boot(&host.kernel(&endless()), &["--timeout", "1s"]);
    assert_eq!(ends_in_time(command.stdout(theirs).spawn().unwrap()), Some(124));
}

/// Boots `code` on a terminal, types `keys`, then `Ctrl-A x`.
#[track_caller]
fn can_be_left(code: &[u8], keys: &[u8]) {
    let host = Host::new();
    let (mut ours, theirs) = terminal();
    let mut command = host.boot(&host.kernel(code), &["--timeout", "30s"]);
    let copy = || theirs.as_fd().try_clone_to_owned().unwrap();
    in_child(&mut command, own_session).stdin(copy()).stdout(copy());
    let child = command.spawn().unwrap();
    // The guest's first letter says that the terminal is raw.
    ours.read_exact(&mut [0]).unwrap();
    ours.write_all(keys).unwrap();
    ours.write_all(b"\x01x").unwrap();
    assert_eq!(ends_in_time(child), Some(130));
}

#[test]
fn the_user_can_leave_a_guest_that_reads_nothing() {
    let spin = [print("r"), SPIN.to_vec()].concat();
    can_be_left(&spin, b"");
    can_be_left(&spin, &[b'a'; 3000]);
    // In loopback the port takes no input at all.
    can_be_left(&[print("r"), out(0x3fc, 0x10), SPIN.to_vec()].concat(), b"a");
}

#[test]
fn a_standard_error_that_is_full_keeps_the_status() {
    let host = Host::new();
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    for (code, flags, expected) in [
        (vec![0x0f, 0x0b], &[][..], 102),
        (SPIN.to_vec(), &["--timeout", "300ms"], 124),
        (power_off(), &["--timeline"], 0),
        (power_off(), &["--memory", "1M"], 2),
    ] {
        let mut command = host.boot(&host.kernel(&code), flags);
        assert_eq!(command.stderr(full()).status().unwrap().code(), Some(expected), "{flags:?}");
    }
}

fn small_files() -> c_int {
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
    // SAFETY: the limit is valid for reading.
    unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }
}

#[test]
fn a_limit_on_file_sizes() {
    let host = Host::new();
    let mut command = host.boot(&host.kernel(&endless()), &["--timeout", "1s", "--serial", "file=log"]);
    assert_eq!(in_child(&mut command, small_files).status().unwrap().code(), Some(124));
    let mut command = host.boot(&host.kernel(&power_off()), &["--memory", "16M,backing=memfd"]);
    let output = in_child(&mut command, small_files).output().unwrap();
    assert_fails(&output, 1, &["memfd"]);
}

fn ignore_hangup() -> c_int {
    // SAFETY: ignoring runs no code.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    0
}

#[test]
fn nohup_is_kept() {
    let host = Host::new();
    let code = [print("r"), SPIN.to_vec()].concat();
    let mut command = host.boot(&host.kernel(&code), &["--timeout", "1s"]);
    let mut child = in_child(&mut command, ignore_hangup).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    Command::new("kill").args(["-s", "HUP", &child.id().to_string()]).status().unwrap();
    assert_eq!(ends_in_time(child), Some(124));
}

fn block_the_kick() -> c_int {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the set that it is given.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: the set is initialised; the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) }
}

#[test]
fn signals_that_a_parent_blocks() {
    let host = Host::new();
    let mut command = host.boot(&host.kernel(&SPIN), &["--timeout", "300ms"]);
    assert_eq!(ends_in_time(in_child(&mut command, block_the_kick).spawn().unwrap()), Some(124));
}

#[test]
fn a_kernel_that_is_cut_short_ends_its_guest_alone() {
    let host = Host::new();
    let mut code = [print("r"), SPIN.to_vec()].concat();
    code.resize(8192, 0x90);
    let kernel = host.kernel(&code);
    let mut command = host.boot(&kernel, &["--load", "map", "--timeout", "3s"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    OpenOptions::new().write(true).open(&kernel).unwrap().set_len(0).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(102), "{:?} {}", output.status, stderr(&output));
}

#[test]
fn the_serial_port_does_not_print_over_the_kernel() {
    let host = Host::new();
    let kernel = host.kernel(&[print("over"), power_off()].concat());
    let before = std::fs::read(&kernel).unwrap();
    let link = host.dir.path().join("link");
    std::os::unix::fs::symlink(&kernel, &link).unwrap();
    for path in [&kernel, &link] {
        let output = host.boot(&kernel, &["--serial", &format!("file={}", path.display())]).output().unwrap();
        assert_fails(&output, 1, &["--serial", "is the kernel"]);
        assert!(std::fs::read(&kernel).unwrap() == before);
    }
}

#[test]
fn a_serial_fifo_without_a_reader() {
    let host = Host::new();
    assert!(Command::new("mkfifo").arg(host.dir.path().join("fifo")).status().unwrap().success());
    let output = host.boot(&host.kernel(&power_off()), &["--serial", "file=fifo"]).output().unwrap();
    assert_fails(&output, 1, &["--serial", "fifo", "no process reads"]);
}

#[test]
fn a_configuration_without_end() {
    let output = Host::new().microvm(["boot", "--config", "/dev/zero"]).output().unwrap();
    assert_fails(&output, 2, &["--config /dev/zero", "1 MiB"]);
}

fn few_descriptors() -> c_int {
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 600 };
    // SAFETY: the structure lives for the call.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }
}

/// A vsock's connections are descriptors: the limit goes up as far as it may.
#[test]
fn a_low_limit_of_descriptors() {
    let host = Host::new();
    let kernel = host.kernel(&[print("u"), SPIN.to_vec()].concat());
    let mut command = host.boot(&kernel, &["--vsock", "cid=3,socket=v", "--timeout", "5s"]);
    let mut child = in_child(command.stdout(Stdio::piped()), few_descriptors).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let files = limits.lines().find(|l| l.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().nth(3), Some("600"), "{files}");
}
