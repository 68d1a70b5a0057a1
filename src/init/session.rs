//! A program and its streams, which its host has (`microvm::guest::wire`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

use microvm::guest::status::{NOT_STARTED, of_error};
use microvm::guest::wire::{Failure, Kind, MAIN_SESSION, read_frame, write_frame, write_json};
use microvm::guest::{ProcessSpec, TerminalSize};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::{container, programs, vsock};

/// Read from a program at once.
const CHUNK: usize = 32 << 10;
/// They relay, and hold their buffers on the heap.
const STACK: usize = 128 << 10;

/// What a session's program can be done to.
struct Session {
    pid: Pid,
    terminal: Option<Arc<File>>,
}

static SESSIONS: LazyLock<Mutex<HashMap<u32, Session>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU32 = AtomicU32::new(MAIN_SESSION + 1);

fn sessions() -> MutexGuard<'static, HashMap<u32, Session>> {
    SESSIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(status: u8, message: String) -> Failure {
    Failure { status, message }
}

/// Sends a session's program a signal.
pub fn signal(session: u32, number: u8) -> Result<(), Failure> {
    let sessions = sessions();
    let session = sessions.get(&session).ok_or_else(|| failure(NOT_STARTED, "it has ended".into()))?;
    let wrong = || failure(NOT_STARTED, format!("there is no signal {number}"));
    let signal = Signal::from_named_raw(number.into()).ok_or_else(wrong)?;
    programs::signal(session.pid, signal).map_err(|e| failure(NOT_STARTED, format!("signal {number}: {e}")))
}

/// Gives a session's terminal another size.
pub fn resize(session: u32, size: TerminalSize) -> Result<(), Failure> {
    let terminal = sessions().get(&session).and_then(|session| session.terminal.clone());
    let terminal = terminal.ok_or_else(|| failure(NOT_STARTED, "it has no terminal".into()))?;
    set_size(&terminal, size).map_err(|e| failure(NOT_STARTED, format!("the size of the terminal: {e}")))
}

fn set_size(terminal: &File, size: TerminalSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Runs the container's program to its end, and returns its status. The host has had all its output by then.
pub fn run_main(process: &ProcessSpec, stream: vsock::Stream) -> u8 {
    run(process, stream, MAIN_SESSION)
}

/// Runs another program to its end.
pub fn run_another(process: &ProcessSpec, stream: vsock::Stream) {
    run(process, stream, NEXT.fetch_add(1, Ordering::Relaxed));
}

fn run(process: &ProcessSpec, mut stream: vsock::Stream, number: u32) -> u8 {
    let status = match Started::new(process) {
        Ok(started) => match started.relay(&stream, number) {
            Ok(status) => {
                let _ = write_frame(&mut stream, Kind::Exited, &[status]);
                status
            }
            Err(e) => fail(&mut stream, &failure(NOT_STARTED, format!("a program's streams: {e}"))),
        },
        Err(failure) => fail(&mut stream, &failure),
    };
    // The host closes its end when it has passed everything on.
    let _ = vsock::end(&stream);
    let mut rest = Vec::new();
    while let Ok(Some(_)) = read_frame(&mut stream, &mut rest) {}
    status
}

fn fail(stream: &mut vsock::Stream, failure: &Failure) -> u8 {
    let _ = write_json(stream, Kind::Failed, failure);
    failure.status
}

/// A program that runs, and this side of its streams.
struct Started {
    pid: Pid,
    /// Has a byte once it has ended.
    status: File,
    input: Option<File>,
    /// Each with the kind of its frames.
    outputs: Vec<(Kind, File)>,
    terminal: Option<Arc<File>>,
}

impl Started {
    fn new(process: &ProcessSpec) -> Result<Self, Failure> {
        let name = process.args.first().map_or("no program", String::as_str);
        let streams = if process.terminal { Self::with_terminal(process) } else { Self::with_pipes(process) };
        streams.map_err(|e| failure(of_error(&e), format!("{name} cannot be run: {e}")))
    }

    fn with_pipes(process: &ProcessSpec) -> io::Result<Self> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC);
        let (input, to_input) = match process.input {
            true => pipe().map(|(read, write)| (Stdio::from(read), Some(File::from(write))))?,
            false => (Stdio::null(), None),
        };
        let ((output, its_output), (error, its_error)) = (pipe()?, pipe()?);
        let streams = [input, its_output.into(), its_error.into()];
        let (pid, status) = programs::start(|| container::start(process, streams))?;
        let outputs = vec![(Kind::Output, output.into()), (Kind::Error, error.into())];
        Ok(Self { pid, status, input: to_input, outputs, terminal: None })
    }

    fn with_terminal(process: &ProcessSpec) -> io::Result<Self> {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        unlockpt(&terminal)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let its = || ioctl_tiocgptpeer(&terminal, flags).map(Stdio::from);
        let streams = [its()?, its()?, its()?];
        let ours = File::from(terminal.try_clone()?);
        if let Some(size) = process.size {
            set_size(&ours, size)?;
        }
        let (pid, status) = programs::start(|| container::start(process, streams))?;
        let input = process.input.then(|| ours.try_clone()).transpose()?;
        let outputs = vec![(Kind::Output, ours.try_clone()?)];
        Ok(Self { pid, status, input, outputs, terminal: Some(Arc::new(ours)) })
    }

    /// Passes everything on until the program has ended, and returns its status.
    fn relay(self, stream: &vsock::Stream, number: u32) -> io::Result<u8> {
        let Self { pid, mut status, input, outputs, terminal } = self;
        sessions().insert(number, Session { pid, terminal });
        let relayed = (|| {
            write_frame(&mut &*stream, Kind::Started, &number.to_le_bytes())?;
            start_input(stream.try_clone()?, input)?;
            relay_outputs(stream, outputs, &status)
        })();
        let mut code = [NOT_STARTED];
        status.read_exact(&mut code)?;
        sessions().remove(&number);
        // A host that has gone away does not change what became of the program.
        relayed.or_else(|e| if e.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e) })?;
        Ok(code[0])
    }
}

/// Passes input on in a thread of its own, which ends with the stream.
fn start_input(mut stream: vsock::Stream, input: Option<File>) -> io::Result<()> {
    let mut input = input;
    let relay = move || {
        let mut bytes = Vec::new();
        while let Ok(Some(kind)) = read_frame(&mut stream, &mut bytes) {
            match kind {
                // A program that reads no more loses the rest.
                Kind::Input if input.as_mut().is_some_and(|input| input.write_all(&bytes).is_err()) => {
                    input = None;
                }
                Kind::InputEnd => input = None,
                _ => {}
            }
        }
    };
    thread::Builder::new().name("input".into()).stack_size(STACK).spawn(relay).map(drop)
}

/// Passes output on until every stream is at its end, or the program has ended and what it printed is passed on: others may
/// hold the streams open for ever.
fn relay_outputs(
    mut stream: &vsock::Stream,
    mut outputs: Vec<(Kind, File)>,
    status: &File,
) -> io::Result<()> {
    let mut bytes = vec![0; CHUNK];
    while !outputs.is_empty() {
        let ready = wait_for(&outputs, status)?;
        let mut at_end = Vec::new();
        for (index, (kind, file)) in outputs.iter_mut().enumerate() {
            if ready.contains(&index) {
                let len = read(file, &mut bytes)?;
                if len == 0 {
                    at_end.push(index);
                } else {
                    write_frame(&mut stream, *kind, &bytes[..len])?;
                }
            }
        }
        let has_ended = ready.contains(&outputs.len());
        at_end.into_iter().rev().for_each(|index| drop(outputs.remove(index)));
        if has_ended {
            return outputs
                .into_iter()
                .try_for_each(|(kind, file)| relay_rest(stream, kind, file, &mut bytes));
        }
    }
    Ok(())
}

/// The places of those that can be read; behind them that of the status, where the program has ended.
fn wait_for(outputs: &[(Kind, File)], status: &File) -> io::Result<Vec<usize>> {
    let files = outputs.iter().map(|(_, file)| file.as_fd());
    let all: Vec<BorrowedFd<'_>> = files.chain([status.as_fd()]).collect();
    let mut polled: Vec<_> = all.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    Ok((0..polled.len()).filter(|index| !polled[*index].revents().is_empty()).collect())
}

/// What there is of an ended program. Its terminal is hung up with it (it led the terminal's session), so that ends by
/// itself; a pipe has what it has now.
fn relay_rest(mut stream: &vsock::Stream, kind: Kind, mut file: File, bytes: &mut [u8]) -> io::Result<()> {
    let is_terminal = rustix::termios::isatty(&file);
    let mut left = if is_terminal { u64::MAX } else { ioctl_fionread(&file)? };
    while left > 0 {
        let most = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let len = read(&mut file, &mut bytes[..most])?;
        if len == 0 {
            break;
        }
        write_frame(&mut stream, kind, &bytes[..len])?;
        left -= len as u64;
    }
    Ok(())
}

/// Nothing: the end. A terminal that nobody has open any more says EIO (pty(7)).
fn read(file: &mut File, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(bytes) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.raw_os_error() == Some(libc::EIO) => return Ok(0),
            other => return other,
        }
    }
}
