//! The host's end of the serial port: standard input and output, or a file.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::{SERIAL_GSI, SERIAL_LEN, SERIAL_PORT};
use crate::bus::{Bus, Overlap};
use crate::config::Serial;
use crate::devices::DeviceControl;
use crate::devices::legacy::{ConsoleOutput, SerialInput, serial_port};
use crate::metrics::{Counter, Metric, Registry};
use crate::sandbox::{Confined, Kept, SandboxError, ThreadKind};
use crate::sys::terminal::{RawMode, Stdin, stdin_kind};
use crate::vm::{KvmError, Vm};

use super::boot_files::BootFiles;
use super::builder::new_event;
use super::end::End;
use super::run::EndSlot;

/// The serial port's other end cannot be set up.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The output file.
    #[error("--serial file={path} cannot be written")]
    File {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A FIFO without a reader.
    #[error("--serial file={0} is a FIFO that no process reads: start its reader first")]
    NoReader(PathBuf),
    /// Printing would overwrite what is booted.
    #[error("--serial file={0} is the kernel or the initramfs: give another path")]
    BootFile(PathBuf),
    /// A descriptor or a thread.
    #[error("the console cannot be set up")]
    Io(#[from] io::Error),
    /// The interrupt.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The ports.
    #[error(transparent)]
    Bus(#[from] Overlap),
}

/// `Ctrl-A`: the next key is for microvm.
const ESCAPE: u8 = 1;
/// Keys that wait for a guest which does not read; more are dropped, so that `Ctrl-A x` is always seen.
const MAX_PENDING_KEYS: usize = 4096;
/// The serial port's name in the list of devices.
const ID: &str = "com1";
const OUTPUT_BYTES: Metric = Metric::counter(
    "microvm_serial_output_bytes_total",
    "Bytes that the guest has printed on the serial port.",
);
const INPUT_BYTES: Metric =
    Metric::counter("microvm_serial_input_bytes_total", "Bytes that the guest was sent on the serial port.");
/// How long the last output may take to get out after the guest's end.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// Ample for a loop around `write`.
const STACK: usize = 64 << 10;

/// The host's end of the serial port.
pub struct Console {
    output: Arc<ConsoleOutput>,
    /// Where it goes to, until the writer has it.
    out: Option<File>,
    /// Disconnected once all output is written.
    written: Option<Receiver<Infallible>>,
    input: Option<Input>,
    terminal: Option<RawMode>,
}

struct Input {
    stdin: File,
    port: SerialInput,
    received: Counter,
    drained: Arc<EventFd>,
    pending: Vec<u8>,
    /// Only a terminal has escape keys: a file is passed on as it is.
    escapes: bool,
    escaped: bool,
    watching: bool,
}

impl Console {
    /// Puts COM1 on the bus and connects it, and its descriptors on the list of those that stay open. `None` where the
    /// guest has no serial port.
    ///
    /// # Errors
    /// The output file cannot be written or is one of the VM's own, or a descriptor is missing.
    pub fn new(
        config: &Serial,
        files: &BootFiles,
        vm: &Vm,
        ports: &mut Bus,
        metrics: &Registry,
        kept: &mut Kept,
    ) -> Result<Option<Self>, ConsoleError> {
        let out = match config {
            Serial::Null => return Ok(None),
            Serial::Stdio => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            Serial::File(path) => open_output(path, files)?,
        };
        let counters = metrics.group(&[("device", ID)]);
        let output = Arc::new(ConsoleOutput::new(counters.counter(OUTPUT_BYTES)));
        let received = counters.counter(INPUT_BYTES);
        let drained = new_event()?;
        let interrupt = vm.irqfd(SERIAL_GSI)?;
        kept.add("the serial port's output", &out);
        kept.add("the serial port's interrupt", &interrupt);
        kept.add("the serial port's input is used up", &*drained);
        let (port, serial_input) = serial_port(interrupt, output.clone(), drained.clone());
        ports.insert("COM1", SERIAL_PORT.into(), SERIAL_LEN.into(), Arc::new(Mutex::new(port)))?;
        let stdin = match config {
            Serial::Stdio => stdin_kind(),
            _ => Stdin::BackgroundTerminal,
        };
        let input = match stdin {
            // Reading it would stop the process (SIGTTIN).
            Stdin::BackgroundTerminal => None,
            kind => Some(Input {
                stdin: stdin_file()?.into(),
                port: serial_input,
                received: received.clone(),
                drained,
                pending: Vec::new(),
                escapes: kind == Stdin::Terminal,
                escaped: false,
                watching: false,
            }),
        };
        if let Some(input) = &input {
            kept.add("the serial port's input", &input.stdin);
        }
        Ok(Some(Self { output, out: Some(out), written: None, input, terminal: None }))
    }

    /// Starts the confined thread that writes the output.
    ///
    /// # Errors
    /// No thread can be had, or it cannot be confined.
    pub fn start_writer(&mut self, confined: Confined) -> Result<(), SandboxError> {
        if let Some(out) = self.out.take() {
            self.written = Some(start_writer(self.output.clone(), out, confined)?);
        }
        Ok(())
    }

    /// Makes the terminal raw. Last of all, so that an error before it finds the terminal as it was.
    ///
    /// # Errors
    /// The terminal has gone away.
    pub fn enter_raw_mode(&mut self) -> io::Result<()> {
        if self.input.as_ref().is_some_and(|i| i.escapes) {
            self.terminal = Some(RawMode::enter()?);
        }
        Ok(())
    }

    /// The serial port in the list of devices. It has nothing to change, and no work of its own to pause.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(SerialControl(self.output.clone()))
    }

    /// The buffer, to free a vCPU that waits for room in it.
    #[must_use]
    pub fn output(&self) -> Arc<ConsoleOutput> {
        self.output.clone()
    }

    /// Waits until the rest is written after the guest's end, unless nobody reads it within a second, and gives the
    /// terminal back.
    pub fn finish(self) {
        self.output.close();
        let written = self.written.map(|w| w.recv_timeout(LAST_OUTPUT));
        if written == Some(Err(RecvTimeoutError::Timeout)) {
            log::warn!("nobody read the end of the console's output within {LAST_OUTPUT:?}: dropped");
        }
    }
}

struct SerialControl(Arc<ConsoleOutput>);

impl DeviceControl for SerialControl {
    fn id(&self) -> &str {
        ID
    }

    fn kind(&self) -> &'static str {
        "serial"
    }

    fn describe(&self) -> Value {
        json!({ "unwritten_bytes": self.0.unwritten() })
    }
}

/// Opens the file that the serial port prints to, and empties it.
fn open_output(path: &Path, files: &BootFiles) -> Result<File, ConsoleError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENXIO) => ConsoleError::NoReader(path.into()),
        _ => ConsoleError::File { path: path.into(), source },
    };
    // Not emptied before it is known to be no boot file. Opening a FIFO that nobody reads fails instead of waiting.
    let mut options = File::options();
    options.write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if files.contain(&metadata) {
        return Err(ConsoleError::BootFile(path.into()));
    }
    if metadata.is_file() {
        file.set_len(0).map_err(failed)?;
    }
    Ok(file)
}

/// Writes output in a thread of its own: a write may block for as long as a reader stalls (a terminal does so even
/// where `poll` says that it has room), and neither the event loop nor the VM's end may wait for that.
fn start_writer(
    output: Arc<ConsoleOutput>,
    out: File,
    confined: Confined,
) -> Result<Receiver<Infallible>, SandboxError> {
    let (writing, written) = mpsc::channel();
    confined.spawn(ThreadKind::Console, "console".into(), STACK, move || {
        while let Some(bytes) = output.take() {
            if let Err(e) = write_all(&out, &bytes) {
                log::warn!("the console's output cannot be written ({e}): dropped from here on");
                output.close();
            }
        }
        drop(writing);
    })?;
    Ok(written)
}

/// As [`Write::write_all`], also where whoever shares the descriptor with us made it non-blocking.
fn write_all(mut out: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&out, PollFlags::OUT)], None)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The console's part in the event loop: its input.
pub(super) struct ConsoleEvents {
    pub console: Console,
    pub end: EndSlot,
}

impl ConsoleEvents {
    fn read_in(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
        // Another process that shares the descriptor may have been faster; a read would then block.
        if !input.is_ready() {
            return;
        }
        let mut buffer = [0; 256];
        match input.stdin.read(&mut buffer) {
            // The end of input: the guest's line just stays silent.
            Ok(0) => return input.watch(ops, false),
            Ok(n) => {
                if input.take_keys(&buffer[..n]) {
                    self.end.set(End::Escape);
                }
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => {
                log::warn!("standard input cannot be read: {e}");
                return input.watch(ops, false);
            }
        }
        input.feed(ops);
    }
}

impl Input {
    /// Adds keys to what the guest gets. `true`: the user wants to leave.
    fn take_keys(&mut self, keys: &[u8]) -> bool {
        if !self.escapes {
            self.pending.extend_from_slice(keys);
            return false;
        }
        for key in keys {
            match (std::mem::take(&mut self.escaped), *key) {
                (true, b'x' | b'X') => return true,
                (false, ESCAPE) => self.escaped = true,
                (_, key) if self.pending.len() < MAX_PENDING_KEYS => self.pending.push(key),
                _ => {}
            }
        }
        false
    }

    /// Gives the guest what its FIFO takes. A file is read on only when all is given, so it is not taken in faster
    /// than the guest reads; a terminal always is, so that the user can leave.
    fn feed(&mut self, ops: &mut EventOps) {
        let sent = self.port.send(&self.pending);
        self.received.add(sent as u64);
        self.pending.drain(..sent);
        self.watch(ops, self.escapes || self.pending.is_empty());
    }

    fn is_ready(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.stdin, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
    }

    fn watch(&mut self, ops: &mut EventOps, on: bool) {
        if on == self.watching {
            return;
        }
        let event = Events::new(&self.stdin, EventSet::IN);
        let done = if on { ops.add(event) } else { ops.remove(event) };
        // A file cannot be watched. It is read whenever the guest has drained its FIFO.
        if done.is_ok() {
            self.watching = on;
        }
    }
}

impl MutEventSubscriber for ConsoleEvents {
    fn init(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
        if let Err(e) = ops.add(Events::new_raw(input.drained.as_raw_fd(), EventSet::IN)) {
            log::error!("the console cannot be watched: {e:?}");
        }
        input.watch(ops, true);
        if !input.watching {
            self.read_in(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
        if events.fd() == input.stdin.as_raw_fd() {
            self.read_in(ops);
        } else if events.fd() == input.drained.as_raw_fd() {
            let _ = input.drained.read();
            input.feed(ops);
            if input.pending.is_empty() && !input.watching {
                self.read_in(ops);
            }
        }
    }
}

fn stdin_file() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}
