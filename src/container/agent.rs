//! `microvm-init` of a running container, asked from another process of the host (`crate::guest::wire`).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use crate::control::{Place, PlaceError, folders, socket_path};
use crate::guest::wire::{Kind, PORT, Request, read_frame, write_frame, write_json};
use crate::guest::{ProcessSpec, TerminalSize};
use crate::sys::signals::{Signal, Signals};
use crate::sys::terminal::{self, RawMode};

use super::relay::{self, Finish, Receiver};
use super::{Container, ContainerError, Isolation, State};

/// The socket of a container's socket device, in the folder of its control socket.
pub const SOCKET: &str = "vsock.sock";
/// A guest that runs answers at once; this is for a host that is busy: a hundred that ask at once take ten on a slow processor.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to a container's `microvm-init`.
pub struct Agent {
    name: String,
    stream: UnixStream,
}

impl Agent {
    /// Connects to a container that runs.
    ///
    /// # Errors
    /// It does not run or has no VM, or its guest does not answer.
    pub fn connect(container: &Container) -> Result<Self, ContainerError> {
        let name = container.record.name.clone();
        let isolation = container.record.isolation;
        if isolation != Isolation::Vm {
            return Err(ContainerError::OnHost { name, isolation });
        }
        if let State::Ended(_) = container.state()? {
            return Err(ContainerError::NotRunning(name));
        }
        match dial(&name) {
            Ok(stream) => Ok(Self { name, stream }),
            Err(source) => Err(unanswered(&name, source)),
        }
    }

    /// Asks, and waits until it is done.
    ///
    /// # Errors
    /// The guest refuses, or does not answer.
    pub fn ask(&mut self, request: &Request) -> Result<(), ContainerError> {
        self.send(request)?;
        self.answered()
    }

    /// Sends a request, whose answer is still to come.
    ///
    /// # Errors
    /// The guest does not take it.
    pub fn send(&mut self, request: &Request) -> Result<(), ContainerError> {
        write_json(&mut self.stream, Kind::Request, request).map_err(|e| self.failed(e))
    }

    /// Waits until a request is done.
    ///
    /// # Errors
    /// The guest refuses, or does not answer.
    pub fn answered(&mut self) -> Result<(), ContainerError> {
        let mut bytes = Vec::new();
        match read_frame(&mut self.stream, &mut bytes) {
            Ok(Some(Kind::Done)) => Ok(()),
            Ok(Some(Kind::Failed)) => Err(self.refused(&bytes)),
            Ok(_) => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(self.failed(e)),
        }
    }

    /// Copies what comes as frames of output to `to`, up to the empty one.
    ///
    /// # Errors
    /// The guest refuses or does not go on, or `to` fails.
    pub fn receive(&mut self, to: &mut impl Write) -> Result<(), ContainerError> {
        let mut bytes = Vec::new();
        loop {
            match read_frame(&mut self.stream, &mut bytes) {
                Ok(Some(Kind::Output)) if bytes.is_empty() => return self.answered(),
                Ok(Some(Kind::Output)) => {
                    let unwritten = |e| io::Error::other(format!("what it sends cannot be written: {e}"));
                    to.write_all(&bytes).map_err(|e| self.failed(unwritten(e)))?;
                }
                Ok(Some(Kind::Failed)) => return Err(self.refused(&bytes)),
                Ok(_) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Err(e) => return Err(self.failed(e)),
            }
        }
    }

    /// Copies all of `from` as frames of input, and waits until the guest has taken it.
    ///
    /// # Errors
    /// `from` fails, or the guest refuses or does not go on.
    pub fn supply(&mut self, from: &mut impl Read) -> Result<(), ContainerError> {
        let mut bytes = vec![0; crate::guest::wire::MAX_FRAME];
        loop {
            let len = from.read(&mut bytes).map_err(|e| self.failed(e))?;
            let kind = if len == 0 { Kind::InputEnd } else { Kind::Input };
            write_frame(&mut self.stream, kind, &bytes[..len]).map_err(|e| self.failed(e))?;
            if len == 0 {
                // Unpacking takes as long as it takes.
                self.stream.set_read_timeout(None).map_err(|e| self.failed(e))?;
                return self.answered();
            }
        }
    }

    fn failed(&self, source: io::Error) -> ContainerError {
        unanswered(&self.name, source)
    }

    fn refused(&self, bytes: &[u8]) -> ContainerError {
        let failure = relay::failure(bytes);
        ContainerError::Refused { name: self.name.clone(), message: failure.message, status: failure.status }
    }
}

fn unanswered(name: &str, source: io::Error) -> ContainerError {
    // How a socket says that its time is over (SO_RCVTIMEO in socket(7)).
    let source = match source.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::other(format!("it does not answer within {PATIENCE:?}: is it paused (microvm ps)?"))
        }
        _ => source,
    };
    ContainerError::Agent { name: name.into(), source }
}

/// The line of docs/vsock.md, and its answer.
fn dial(name: &str) -> io::Result<UnixStream> {
    // Not where another user could answer.
    let control = socket_path(name).map_err(io::Error::other)?;
    let mut stream = UnixStream::connect(control.with_file_name(SOCKET))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut line = Vec::new();
    // Byte by byte: what follows is not the line's.
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if line.len() > 32 || stream.read(&mut byte)? == 0 {
            return Err(io::Error::other("nothing in the guest listens"));
        }
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Runs another program in a container, with this process's streams, and returns its exit status.
///
/// # Errors
/// The container does not run, the program cannot be run, or this terminal cannot be made its own.
pub fn exec(container: &Container, process: ProcessSpec) -> Result<u8, ContainerError> {
    let mut agent = Agent::connect(container)?;
    let failed = |source| ContainerError::Agent { name: container.record.name.clone(), source };
    let (input, terminal) = (process.input, process.terminal);
    // Before there is any other thread, which would have the signals otherwise.
    let signals = Signals::new().map_err(failed)?;
    agent.send(&Request::Exec(process))?;
    let stream = &agent.stream;
    stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None)).map_err(failed)?;
    if input {
        let mut stream = stream.try_clone().map_err(failed)?;
        // It may wait for a key for ever; the process does not wait for it.
        thread::spawn(move || relay::send_input(&mut stream));
    }
    let session = Arc::new(OnceLock::new());
    let (passed, of) = (session.clone(), container.clone());
    // It waits for signals as long as the process is there.
    thread::spawn(move || pass_signals(signals, &of, &passed, terminal));
    let mut shown = Shown { terminal, session, raw: None };
    match relay::receive(&mut io::BufReader::new(stream), &mut shown) {
        Finish::Exited(status) => Ok(status),
        Finish::Failed(failure) => Err(ContainerError::Refused {
            name: container.record.name.clone(),
            message: failure.message,
            status: failure.status,
        }),
        // The container has ended, and with it everything in it.
        Finish::Lost => Ok(137),
    }
}

/// Shows what the program prints.
struct Shown {
    terminal: bool,
    /// Set when it runs.
    session: Arc<OnceLock<u32>>,
    raw: Option<RawMode>,
}

impl Receiver for Shown {
    fn started(&mut self, session: u32) {
        // Not before: until then Ctrl-C is this process's.
        if self.terminal && self.raw.is_none() {
            self.raw = RawMode::enter().inspect_err(|e| log::warn!("the terminal stays as it is: {e}")).ok();
        }
        let _ = self.session.set(session);
    }

    fn printed(&mut self, kind: Kind, bytes: &[u8]) {
        if relay::print(kind, bytes).is_err() {
            self.raw = None;
            // As any program whose reader has gone.
            std::process::exit(128 + libc::SIGPIPE);
        }
    }
}

/// Has this process's signals go to the program. One that it cannot have is for this process.
fn pass_signals(mut signals: Signals, container: &Container, session: &OnceLock<u32>, terminal: bool) {
    while let Some(signal) = signals.wait() {
        let session = session.get().copied();
        let request = match (signal, session) {
            (Signal::End(signal), None) => end_by(signal),
            (Signal::End(signal), Some(session)) => Request::Signal { session, signal },
            (Signal::Resize, session) => match session.zip(TerminalSize::here().filter(|_| terminal)) {
                Some((session, size)) => Request::Resize { session, size },
                None => continue,
            },
        };
        match (Agent::connect(container).and_then(|mut agent| agent.ask(&request)), signal) {
            (Err(ContainerError::Agent { name, source }), Signal::End(signal)) => {
                log::error!("container {name} does not take the signal: {source}");
                end_by(signal)
            }
            (Err(e), _) => log::warn!("{e}"),
            (Ok(()), _) => {}
        }
    }
}

fn end_by(signal: u8) -> ! {
    terminal::restore();
    std::process::exit(128 + i32::from(signal))
}

/// Removes what the VM of an ended container left in the folder of its sockets, where it was killed.
pub fn forget_vm(container: &Container) {
    forget(&container.record.name);
}

/// Removes what all dead VMs left there, and says how many these were.
///
/// # Errors
/// The folder cannot be read.
pub fn forget_dead_vms() -> Result<usize, PlaceError> {
    Ok(folders()?.iter().filter(|name| forget(name)).count())
}

/// That of a living VM stays.
fn forget(name: &str) -> bool {
    Place::forget(name).unwrap_or_else(|e| {
        log::warn!("what is left of the sockets of {name} stays: {e}");
        false
    })
}
