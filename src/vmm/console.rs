//! The host's end of the serial port: standard input and output, or a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::{SERIAL_GSI, SERIAL_LEN, SERIAL_PORT};
use crate::bus::{Bus, Overlap};
use crate::config::Serial;
use crate::devices::legacy::{ConsoleOutput, SerialInput, serial_port};
use crate::sys::terminal::{RawMode, Stdin, stdin_kind};
use crate::vm::{KvmError, Vm};

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
    /// A descriptor.
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
/// Writes of at most this many bytes do not block where `poll` has said that a pipe has room (POSIX `PIPE_BUF`).
const CHUNK: usize = 4096;
/// How long the last output may take to get out after the guest's end.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// The host's end of the serial port.
pub struct Console {
    output: Arc<ConsoleOutput>,
    out: Option<File>,
    unwritten: Vec<u8>,
    out_blocked: bool,
    input: Option<Input>,
    terminal: Option<RawMode>,
}

struct Input {
    stdin: File,
    port: SerialInput,
    drained: Arc<EventFd>,
    pending: Vec<u8>,
    /// Only a terminal has escape keys: a file is passed on as it is.
    escapes: bool,
    escaped: bool,
    watching: bool,
}

impl Console {
    /// Puts COM1 on the bus and connects it. `None` where the guest has no serial port.
    ///
    /// # Errors
    /// The output file cannot be written, or a descriptor is missing.
    pub fn new(config: &Serial, vm: &Vm, ports: &mut Bus) -> Result<Option<Self>, ConsoleError> {
        let out = match config {
            Serial::Null => return Ok(None),
            Serial::Stdio => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            Serial::File(path) => {
                File::create(path).map_err(|source| ConsoleError::File { path: path.clone(), source })?
            }
        };
        let output = Arc::new(ConsoleOutput::new()?);
        let drained = new_event()?;
        let (port, serial_input) = serial_port(vm.irqfd(SERIAL_GSI)?, output.clone(), drained.clone());
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
                drained,
                pending: Vec::new(),
                escapes: kind == Stdin::Terminal,
                escaped: false,
                watching: false,
            }),
        };
        Ok(Some(Self {
            output,
            out: Some(out),
            unwritten: Vec::new(),
            out_blocked: false,
            input,
            terminal: None,
        }))
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

    /// The buffer, to free a vCPU that waits for room in it.
    #[must_use]
    pub fn output(&self) -> Arc<ConsoleOutput> {
        self.output.clone()
    }

    /// Writes the rest after the guest's end, unless nobody reads it within a second, and gives the terminal back.
    pub fn finish(mut self) {
        self.unwritten.extend(self.output.take());
        let deadline = Instant::now() + LAST_OUTPUT;
        while !self.unwritten.is_empty() && self.ready(deadline.saturating_duration_since(Instant::now())) {
            self.write_chunk();
        }
    }

    /// Whether a chunk can be written now.
    fn ready(&self, timeout: Duration) -> bool {
        let Some(out) = &self.out else { return true };
        let timeout = Timespec::try_from(timeout).ok();
        poll(&mut [PollFd::new(out, PollFlags::OUT)], timeout.as_ref()).is_ok_and(|n| n > 0)
    }

    /// Writes one chunk. Where nobody reads any more, output is dropped and the guest goes on.
    fn write_chunk(&mut self) {
        let part = self.unwritten.len().min(CHUNK);
        let Some(out) = &mut self.out else { return self.unwritten.clear() };
        match out.write(&self.unwritten[..part]) {
            Ok(n) => drop(self.unwritten.drain(..n)),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => {
                log::warn!("the console's output cannot be written ({e}): dropped from here on");
                self.out = None;
            }
        }
    }
}

/// The console's part in the event loop.
pub(super) struct ConsoleEvents {
    pub console: Console,
    pub end: EndSlot,
}

impl ConsoleEvents {
    /// Writes what can be written without blocking; waits for the reader with the rest.
    fn write_out(&mut self, ops: &mut EventOps) {
        let console = &mut self.console;
        // What is still unwritten stays here, and the buffer behind it fills up: that makes the guest wait.
        if console.unwritten.is_empty() {
            console.unwritten = console.output.take();
        }
        while !console.unwritten.is_empty() && console.ready(Duration::ZERO) {
            console.write_chunk();
            if console.unwritten.is_empty() {
                console.unwritten = console.output.take();
            }
        }
        let blocked = !console.unwritten.is_empty();
        if let (true, Some(out)) = (blocked != console.out_blocked, &console.out) {
            let event = Events::new(out, EventSet::OUT);
            // A file cannot be watched, and need not: it is always ready.
            let _ = if blocked { ops.add(event) } else { ops.remove(event) };
            console.out_blocked = blocked;
        }
    }

    fn read_in(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
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
                (_, key) => self.pending.push(key),
            }
        }
        false
    }

    /// Gives the guest what its FIFO takes, and reads on only when all is given: standard input is not taken in
    /// faster than the guest reads.
    fn feed(&mut self, ops: &mut EventOps) {
        let sent = self.port.send(&self.pending);
        self.pending.drain(..sent);
        self.watch(ops, self.pending.is_empty());
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
        let mut add = |fd: RawFd| {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("the console cannot be watched: {e:?}");
            }
        };
        add(self.console.output.timer_fd());
        if let Some(input) = &self.console.input {
            add(input.drained.as_raw_fd());
        }
        if let Some(input) = &mut self.console.input {
            input.watch(ops, true);
            if !input.watching {
                self.read_in(ops);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.console.output.timer_fd() {
            self.console.output.timer_expired();
            self.write_out(ops);
        } else if let Some(input) = self.console.input.as_mut().filter(|i| i.drained.as_raw_fd() == fd) {
            let _ = input.drained.read();
            input.feed(ops);
            if input.pending.is_empty() && !input.watching {
                self.read_in(ops);
            }
        } else if self.console.out.as_ref().is_some_and(|out| out.as_raw_fd() == fd) {
            self.write_out(ops);
        } else {
            self.read_in(ops);
        }
    }
}

fn stdin_file() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}
