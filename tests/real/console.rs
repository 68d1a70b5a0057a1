//! The virtio console (hvc0) of real kernels.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::common::{Host, in_child, own_session, stdout, terminal};
use super::{boot, read_until, status};

/// Debian's kernel has the driver as a module, the tuned one built in.
const KERNELS: [(&str, &str); 2] = [("stock-6.1", "bzImage"), ("tuned", "vmlinux")];
const STDIO: [&str; 2] = ["--console", "stdio"];

#[test]
#[ignore = "needs hardware-grade KVM"]
fn console_prints_and_takes_input() {
    for (name, file) in KERNELS {
        let mut command = boot(name, file, "cat", &STDIO);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Linux drops what comes while its driver starts, as on the serial port.
        read_until(&mut child, "ttyS0_irq=0");
        // No serial port: what is seen came by hvc0.
        child.stdin.take().unwrap().write_all(b"one\ntwo words\nend\n").unwrap();
        let output = child.wait_with_output().unwrap();
        status(&output, 0);
        let text = stdout(&output);
        for line in ["got one", "got two words", "got end"] {
            assert!(text.contains(line), "{name}: {text}");
        }
    }
}

/// The kernel's log goes to both; init's output to the one that a person looks at.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn console_stands_beside_the_serial_port() {
    let host = Host::new();
    for (name, file) in KERNELS {
        let path = host.dir.path().join("other");
        let other = format!("file={}", path.display());
        for (flags, shown) in
            [(["--console", other.as_str()], "console=hvc0 console=ttyS0"), (["--serial", &other], "")]
        {
            let flags = if shown.is_empty() { [&flags[..], &STDIO].concat() } else { flags.to_vec() };
            let output = boot(name, file, "cmdline", &flags).output().unwrap();
            status(&output, 0);
            let order = if shown.is_empty() { "console=ttyS0 console=hvc0" } else { shown };
            assert!(stdout(&output).contains(order), "{name} {flags:?}: {}", stdout(&output));
            let other = fs::read_to_string(&path).unwrap();
            assert!(!other.contains("release="), "{name} {flags:?}: {other}");
        }
    }
}

/// A VM on a terminal of its own, which it has as a shell's program in the foreground has it.
struct OnTerminal {
    ours: File,
    child: Child,
    seen: String,
}

impl OnTerminal {
    fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let (ours, theirs) = terminal();
        resize(&ours, rows, columns);
        let copy = || theirs.as_fd().try_clone_to_owned().unwrap();
        in_child(&mut command, own_session).stdin(copy()).stdout(copy());
        Self { child: command.spawn().unwrap(), ours, seen: String::new() }
    }

    /// What comes up to `text`, with it.
    #[track_caller]
    fn read_until(&mut self, text: &str) -> String {
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            let mut bytes = [0; 256];
            let count = self.ours.read(&mut bytes).unwrap_or(0);
            assert!(count > 0, "ended before {text:?}: {}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    /// Types lines until the guest says that its console has this size.
    #[track_caller]
    fn assert_size(&mut self, size: &str) {
        let mut answers = Vec::new();
        // The interrupt that tells of it and the key are two ways: the first answer may be of before.
        for _ in 0..20 {
            self.ours.write_all(b"?\r").unwrap();
            self.read_until("size ");
            let answer = self.read_until("\n").trim().to_string();
            if answer == size {
                return;
            }
            answers.push(answer);
        }
        panic!("never {size}: {answers:?}");
    }
}

fn resize(terminal: &File, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the size is valid for reading.
    assert_eq!(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn console_has_the_terminals_size() {
    for (name, file) in KERNELS {
        let mut vm = OnTerminal::start(boot(name, file, "size", &STDIO), 33, 101);
        vm.read_until("ttyS0_irq=0");
        vm.assert_size("33 101");
        for (rows, columns) in [(50, 132), (24, 80)] {
            resize(&vm.ours, rows, columns);
            vm.assert_size(&format!("{rows} {columns}"));
        }
        // The keys of the terminal work as with the serial port.
        vm.ours.write_all(b"\x01x").unwrap();
        assert_eq!(vm.child.wait().unwrap().code(), Some(130), "{name}");
    }
}

/// A guest that prints 4 MiB which nobody reads comes to its end, and is asked and paused meanwhile.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn console_flood_without_a_reader_ends() {
    let host = Host::new();
    for (name, file) in KERNELS {
        let metrics = host.dir.path().join("metrics.json");
        let mut command = boot(name, file, "flood", &STDIO);
        command.arg("--metrics").arg(&metrics).args(["--name", "flood"]);
        let run = host.dir.path().join("run");
        let _ = fs::create_dir(&run);
        let mut child = command
            .env("XDG_RUNTIME_DIR", &run)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        read_until(&mut child, "ttyS0_irq=0");
        for action in ["pause", "resume"] {
            let mut ctl = host.microvm(["ctl", "flood", action]);
            let output = ctl.env("XDG_RUNTIME_DIR", &run).output().unwrap();
            status(&output, 0);
        }
        assert_eq!(child.wait().unwrap().code(), Some(7), "{name}");
        let json: Value = serde_json::from_str(&fs::read_to_string(&metrics).unwrap()).unwrap();
        let value = |wanted: &str| {
            let metric = json["metrics"].as_array().unwrap().iter().find(|m| m["name"] == wanted);
            metric.unwrap()["samples"][0]["value"].as_u64().unwrap()
        };
        let (kept, dropped) =
            (value("microvm_console_output_bytes_total"), value("microvm_console_dropped_bytes_total"));
        // Pipe and buffer hold some.
        assert!(kept < 1 << 20 && dropped > 3 << 20 && kept + dropped >= 4 << 20, "{name}: {kept} {dropped}");
    }
}
