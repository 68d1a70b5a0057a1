//! The host's end of a console, of the serial port or the virtio one: standard input and output, or a file.

mod guest_end;
mod input;

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;

use crate::bus::Overlap;
use crate::config::HostEnd;
use crate::devices::legacy::ConsoleOutput;
use crate::devices::virtio::console::ConsolePort;
use crate::sandbox::{Confined, Kept, SandboxError, ThreadKind};
use crate::sys::lock::is_locked;
use crate::sys::terminal::{self, RawMode};
use crate::vm::KvmError;

use super::boot_files::BootFiles;

pub(super) use guest_end::{GuestEnd, Port};
pub(super) use input::ConsoleEvents;
use input::Input;

/// A console's host end cannot be set up.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The output file.
    #[error("{flag} file={path} cannot be written")]
    File {
        /// The flag.
        flag: &'static str,
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A FIFO without a reader.
    #[error("{0} file={1} is a FIFO that no process reads: start its reader first")]
    NoReader(&'static str, PathBuf),
    /// Printing would overwrite what is booted.
    #[error("{0} file={1} is the kernel or the initramfs: give another path")]
    BootFile(&'static str, PathBuf),
    /// It would be emptied.
    #[error("{0} file={1} is a running VM's disk, or another program has locked it: give another path")]
    Locked(&'static str, PathBuf),
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

/// How long the last output may take to get out after the guest's end.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// Ample for a loop around `write`.
const STACK: usize = 64 << 10;

/// The host's end of a console.
pub struct Console {
    output: Arc<ConsoleOutput>,
    /// Where it goes to, until the writer has it.
    out: Option<File>,
    /// Disconnected once all output is written.
    written: Option<Receiver<Infallible>>,
    input: Option<Input>,
    terminal: Option<RawMode>,
    size: Option<TerminalSize>,
}

impl Console {
    /// Connects `guest` as `end` says, and puts its descriptors on the list of those that stay open. `None` where the
    /// guest has no such console.
    ///
    /// # Errors
    /// The output file cannot be written or is one of the VM's own, or a descriptor is missing.
    pub fn open(
        end: &HostEnd,
        guest: Option<GuestEnd>,
        files: &BootFiles,
        kept: &mut Kept,
    ) -> Result<Option<Self>, ConsoleError> {
        let Some(guest) = guest else { return Ok(None) };
        let out = match end {
            HostEnd::Null => return Ok(None),
            HostEnd::Stdio => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            HostEnd::File(path) => open_output(guest.flag, path, files)?,
        };
        kept.add("a console's output", &out);
        kept.add("a console's input is used up", &*guest.drained);
        let has_terminal = *end == HostEnd::Stdio;
        let size = has_terminal.then(|| TerminalSize::of(&guest.port)).flatten();
        let output = guest.output.clone();
        let input = if has_terminal { Input::open(guest)? } else { None };
        if let Some(input) = &input {
            kept.add("a console's input", input);
        }
        Ok(Some(Self { output, out: Some(out), written: None, input, terminal: None, size }))
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
        if self.input.as_ref().is_some_and(Input::is_terminal) {
            self.terminal = Some(RawMode::enter()?);
        }
        Ok(())
    }

    /// What keeps the guest's console as large as the terminal, where both have a size.
    #[must_use]
    pub fn size(&self) -> Option<TerminalSize> {
        self.size.clone()
    }

    /// The buffer, to free a vCPU that waits for room in it.
    #[must_use]
    pub fn output(&self) -> Arc<ConsoleOutput> {
        self.output.clone()
    }

    /// From now on what the guest prints is dropped.
    pub fn close(&self) {
        self.output.close();
    }

    /// Waits until the rest is written after the guest's end, unless nobody reads it by `deadline`, and gives the
    /// terminal back.
    pub fn finish(self, deadline: Instant) {
        self.output.close();
        let left = deadline.saturating_duration_since(Instant::now());
        let written = self.written.map(|w| w.recv_timeout(left));
        if written == Some(Err(RecvTimeoutError::Timeout)) {
            log::warn!("nobody read the end of the console's output within {LAST_OUTPUT:?}: dropped");
        }
    }
}

/// Takes all consoles down, whose last output has [`LAST_OUTPUT`] for all of them together.
pub(super) fn finish_all(consoles: impl IntoIterator<Item = Console>) {
    let (deadline, consoles) = (Instant::now() + LAST_OUTPUT, consoles.into_iter().collect::<Vec<_>>());
    // All at once: the time is that of the slowest.
    consoles.iter().for_each(Console::close);
    consoles.into_iter().for_each(|console| console.finish(deadline));
}

/// The terminal's size on its way to the guest.
#[derive(Clone)]
pub struct TerminalSize(ConsolePort);

impl TerminalSize {
    /// For a port that knows sizes; tells it the first one.
    fn of(port: &Port) -> Option<Self> {
        let Port::Virtio(port) = port else { return None };
        let size = Self(port.clone());
        size.update();
        Some(size)
    }

    /// The terminal may have another size now.
    pub fn update(&self) {
        if let Some((columns, rows)) = terminal::size() {
            self.0.set_size(columns, rows);
        }
    }
}

/// Opens the file that a console prints to, and empties it.
fn open_output(flag: &'static str, path: &Path, files: &BootFiles) -> Result<File, ConsoleError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENXIO) => ConsoleError::NoReader(flag, path.into()),
        _ => ConsoleError::File { flag, path: path.into(), source },
    };
    // Not emptied before it is known to be no boot file and no disk. Opening a FIFO that nobody reads fails instead of
    // waiting.
    let mut options = File::options();
    options.write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if files.contain(&metadata) {
        return Err(ConsoleError::BootFile(flag, path.into()));
    }
    let kind = metadata.file_type();
    if (kind.is_file() || kind.is_block_device()) && is_locked(&file) {
        return Err(ConsoleError::Locked(flag, path.into()));
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
