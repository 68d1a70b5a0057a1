//! Tiny guests, made in the test itself, and how to run `microvm` on them.
#![allow(dead_code, reason = "each test program uses its part")]

pub mod fake_registry;
pub mod images;
pub mod registry;

use std::ffi::{OsStr, OsString, c_int};
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Where the tiny guests are loaded and start.
pub const LOAD: u64 = 0x20_0000;

/// `out PORT, VALUE` by way of DX, which is the same in 32-bit and in 64-bit code.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Prints `text` on COM1.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|b| out(0x3f8, b)).collect()
}

/// ACPI's S5.
pub fn power_off() -> Vec<u8> {
    out(0x600, 0x34)
}

/// `jmp .`
pub const SPIN: [u8; 2] = [0xeb, 0xfe];

/// Starts every other vCPU with `ap` (16-bit code), then goes on with `bsp`.
pub fn smp(ap: &[u8], bsp: &[u8]) -> Vec<u8> {
    let apic = |register: u32, value: u32| {
        [&[0xc7, 0x05][..], &(0xfee0_0000 + register).to_le_bytes(), &value.to_le_bytes()].concat()
    };
    // mov ecx, 0x1000; dec ecx; jnz back
    let delay = vec![0xb9, 0, 0x10, 0, 0, 0x49, 0x75, 0xfd];
    let build = |source: u32| {
        [
            // mov esi, source; mov edi, 0x8000; mov ecx, len; rep movsb
            [&[0xbe][..], &source.to_le_bytes(), &[0xbf, 0, 0x80, 0, 0, 0xb9]].concat(),
            [&(ap.len() as u32).to_le_bytes()[..], &[0xf3, 0xa4]].concat(),
            // Local APIC on; INIT to all but self, then the start-up interrupt for page 8.
            apic(0xf0, 0x1ff),
            apic(0x300, 0x000c_4500),
            delay.clone(),
            apic(0x300, 0x000c_4608),
            bsp.to_vec(),
        ]
        .concat()
    };
    let source = LOAD as u32 + build(0).len() as u32;
    [build(source), ap.to_vec()].concat()
}

/// How a tiny guest is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Pvh,
    Linux64,
}

/// An ELF file with `code` as its one segment, page-aligned in the file.
pub fn elf(code: &[u8], protocol: Protocol) -> Vec<u8> {
    let mut file = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &LOAD.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let mut header = |i: usize, kind: u32, offset: u64, address: u64, size: u64, memory: u64| {
        put(64 + i * 56, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, size), (40, memory)] {
            put(64 + i * 56 + field, &value.to_le_bytes());
        }
    };
    header(0, 1, 0x1000, LOAD, code.len() as u64, code.len() as u64 + 0x1000);
    header(1, if protocol == Protocol::Pvh { 4 } else { 0 }, 0x200, 0, 20, 20);
    put(0x200, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    put(0x210, &(LOAD as u32).to_le_bytes());
    file.extend_from_slice(code);
    file
}

/// A folder of its own for each test, and what is run in it.
pub struct Host {
    pub dir: TempDir,
    /// For the control sockets of VMs that are killed, which stay behind.
    pub run: TempDir,
    /// What programs find in their environment besides.
    pub env: Vec<(String, OsString)>,
}

impl Host {
    pub fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), run: TempDir::new().unwrap(), env: Vec::new() }
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn kernel(&self, code: &[u8]) -> PathBuf {
        self.file("vmlinux", &elf(code, Protocol::Pvh))
    }

    /// Where images, kernels and containers are.
    pub fn data(&self) -> PathBuf {
        self.run.path().join("data")
    }

    /// Where running VMs have their sockets.
    pub fn runtime(&self) -> PathBuf {
        self.run.path().join("microvm")
    }

    /// `microvm ARGS`, with its own empty standard input.
    pub fn microvm<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_microvm"));
        command.args(args);
        command
    }

    /// A program in the same surroundings.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        // SAFETY: system calls alone, which is all that is allowed between fork and exec.
        unsafe { command.pre_exec(heed_signals) };
        command.env("XDG_RUNTIME_DIR", self.run.path()).env("MICROVM_DATA", self.data());
        command.envs(self.env.iter().cloned());
        command
    }

    /// `microvm boot` of `kernel` on whatever `/dev/kvm` is here, with a bound on its time.
    pub fn boot(&self, kernel: &Path, flags: &[&str]) -> Command {
        let mut command = self.microvm(["boot", "--allow-software-kvm"]);
        for (flag, value) in [("--memory", "16M"), ("--timeout", "60s")] {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command.arg("--kernel").arg(kernel).args(flags);
        command
    }

    /// Boots `code` by PVH and waits for its end.
    pub fn boot_code(&self, code: &[u8], flags: &[&str]) -> Output {
        self.boot(&self.kernel(code), flags).output().unwrap()
    }

    /// Files in the folder: what a failed run must not add to.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut all: Vec<_> =
            std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        all
    }
}

/// Runs `setup` in the child between fork and exec.
pub fn in_child(command: &mut Command, setup: fn() -> c_int) -> &mut Command {
    let checked = move || if setup() < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: each `setup` below makes system calls alone, which is all that is allowed after fork.
    unsafe { command.pre_exec(checked) }
}

/// A pseudo terminal: our side, and the program's.
pub fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let name = std::ptr::null_mut();
    // SAFETY: both integers are valid for writing; the name, mode and size are not asked for.
    let failed =
        unsafe { libc::openpty(&raw mut ours, &raw mut theirs, name, std::ptr::null(), std::ptr::null()) };
    assert_eq!(failed, 0);
    // SAFETY: open, new, and owned by nobody else.
    let ours = unsafe { File::from_raw_fd(ours) };
    // SAFETY: as above.
    (ours, unsafe { OwnedFd::from_raw_fd(theirs) })
}

/// A session of its own, with standard input as its terminal.
pub fn own_session() -> c_int {
    // SAFETY: takes no argument.
    unsafe { libc::setsid() };
    // SAFETY: the request takes an integer.
    unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }
}

/// Whoever runs the tests may ignore signals, as a shell does for what it puts in the background, and microvm keeps to
/// that.
fn heed_signals() -> std::io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: the default action runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    Ok(())
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// As [`stderr`], without the warning that an old host gets, as the emulated one does, of what the sandbox lacks there.
pub fn own_stderr(output: &Output) -> String {
    let text = stderr(output);
    text.split_inclusive('\n').filter(|line| !line.contains("the sandbox goes on without")).collect()
}

/// The run failed with `status` and exactly one line, which has each of `words`.
#[track_caller]
pub fn assert_fails(output: &Output, status: i32, words: &[&str]) {
    let text = own_stderr(output);
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert_eq!(text.lines().count(), 1, "not one line: {text}");
    assert!(text.starts_with("microvm: "), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}
