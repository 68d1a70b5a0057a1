//! The other end of a control socket, for `microvm ps` and `microvm ctl`.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::Value;
use thiserror::Error;

/// Longer than a VM takes for the slowest request.
const ANSWER_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Far more than the counters of any VM.
const MAX_ANSWER: usize = 16 << 20;
/// Read at once.
const CHUNK: usize = 16 << 10;

/// A VM that cannot be asked, or that refused.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No socket.
    #[error("there is no VM {0}: microvm ps lists those that run")]
    NoVm(String),
    /// A socket that nobody listens on.
    #[error("VM {name} is dead: its process has ended, and left {path} behind")]
    Dead {
        /// The VM.
        name: String,
        /// Its socket.
        path: PathBuf,
    },
    /// A file of another kind, which must not be taken for something that a VM left behind.
    #[error("{0} is no socket: give a VM's name, or the path of its control socket")]
    NotASocket(PathBuf),
    /// Another error of the socket.
    #[error("VM {name} cannot be asked through {path}")]
    Socket {
        /// The VM.
        name: String,
        /// Its socket.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Something that is no control socket.
    #[error("what listens on {0} is no microvm")]
    NoHttp(PathBuf),
    /// The VM's own words.
    #[error("VM {name}: {message}")]
    Refused {
        /// The VM.
        name: String,
        /// Why.
        message: String,
    },
}

/// A VM that can be asked once.
pub struct Client {
    name: String,
    path: PathBuf,
    stream: UnixStream,
}

impl Client {
    /// Connects to the VM called `name`, whose socket is `path`.
    ///
    /// # Errors
    /// There is none, or it is dead.
    pub fn connect(name: &str, path: PathBuf) -> Result<Self, ClientError> {
        match open(&path) {
            Ok(stream) => Ok(Self { name: name.into(), path, stream }),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => Err(ClientError::NoVm(name.into())),
            // ROFS: a file of a read-only file system is refused before it is asked whether it is a socket.
            Err(Errno::CONNREFUSED | Errno::ROFS) if !is_socket(&path) => Err(ClientError::NotASocket(path)),
            Err(Errno::CONNREFUSED) => Err(ClientError::Dead { name: name.into(), path }),
            Err(e) => Err(ClientError::Socket { name: name.into(), path, source: e.into() }),
        }
    }

    /// A descriptor of the VM's process, which turns readable when it ends. `None`: this host cannot say.
    #[must_use]
    pub fn process(&self) -> Option<OwnedFd> {
        let pid = socket_peercred(&self.stream).ok()?.pid;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    }

    /// Sends one request, and returns the body of the answer. `accept` is the media type to be had.
    ///
    /// # Errors
    /// The VM refuses, or does not answer in ten seconds.
    pub fn ask(
        mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        accept: &str,
    ) -> Result<String, ClientError> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = self.exchange(request.as_bytes());
        let answer = answer.map_err(|source| ClientError::Socket {
            name: self.name.clone(),
            path: self.path.clone(),
            source,
        })?;
        let (status, body) = split(&answer).ok_or(ClientError::NoHttp(self.path))?;
        if status == 200 {
            return Ok(body);
        }
        let message =
            serde_json::from_str(&body).ok().and_then(|v: Value| Some(v["error"].as_str()?.to_string()));
        let mut message = message.unwrap_or_else(|| format!("status {status}"));
        message.retain(|c| !c.is_control());
        Err(ClientError::Refused { name: self.name, message })
    }

    fn exchange(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        let end = Instant::now() + ANSWER_LIMIT;
        self.stream.write_all(request)?;
        let mut answer = Vec::new();
        let mut chunk = [0; CHUNK];
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {ANSWER_LIMIT:?}"));
        while answer.len() < MAX_ANSWER {
            // For the whole answer: one that comes byte by byte is none.
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => answer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(e) => return Err(e),
            }
        }
        Ok(answer)
    }
}

fn is_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Waits until a process has ended, but not longer than `limit`; says whether it has.
#[must_use]
pub fn wait_for_end(process: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit)).is_ok_and(|n| n > 0)
}

fn open(path: &Path) -> Result<UnixStream, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // It also bounds the wait for a place in a full backlog.
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_LIMIT))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Status and body of an answer.
fn split(answer: &[u8]) -> Option<(u16, String)> {
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(len) = head.parse(answer).ok()? else { return None };
    let mut body = String::from_utf8_lossy(&answer[len..]).into_owned();
    // It may end on a terminal. Neither JSON nor Prometheus' text has other control characters as they are.
    body.retain(|c| matches!(c, '\n' | '\t') || !c.is_control());
    Some((head.code?, body))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What a client makes of a server that does this with its connection.
    fn answer_of(serve: impl FnOnce(UnixStream) + Send + 'static) -> Result<String, ClientError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            // The request, which comes in one piece.
            let _ = stream.read(&mut [0; 1024]);
            serve(stream);
        });
        Client::connect("x", path).unwrap().ask("GET", "/vm", None, "*/*")
    }

    #[test]
    fn what_a_vm_says_does_nothing_to_a_terminal() {
        let send = |text: &'static [u8]| answer_of(move |mut stream| stream.write_all(text).unwrap());
        assert_eq!(send(b"HTTP/1.1 200 OK\r\n\r\na\x1b[2J\tb\n\xc2\x9bc").unwrap(), "a[2J\tb\nc");
        let refused = send(b"HTTP/1.1 400 No\r\n\r\n{\"error\": \"a\\u001b[2J\\nb\"}").unwrap_err();
        assert_eq!(refused.to_string(), "VM x: a[2Jb");
    }

    #[test]
    fn an_answer_that_never_ends_is_waited_for_as_long_as_one_that_never_comes() {
        let begin = Instant::now();
        let drip = |mut stream: UnixStream| {
            while stream.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        };
        let error = answer_of(drip).unwrap_err();
        assert!(matches!(error, ClientError::Socket { .. }), "{error}");
        assert!(begin.elapsed() < ANSWER_LIMIT + Duration::from_secs(2));
    }
}
