//! The host's side: the socket that programs connect to, and the line with which they name a guest's port.
//!
//! The convention is that of Firecracker and Cloud Hypervisor: `CONNECT <port>\n`, answered by `OK <host port>\n` when
//! the guest has accepted. Guest connections to the host's port P go to the socket `PATH_P`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::net::{RecvFlags, recv};

use crate::sys::socket_file::connect_now;

use super::socket_file::{HostSocketError, SocketFile};

/// The listening socket.
#[derive(Debug)]
pub struct HostSocket {
    listener: OwnedFd,
    path: PathBuf,
    /// Streams of this process that wait for the guest, each at a port of the host.
    inside: Mutex<Vec<(u32, UnixStream)>>,
}

impl HostSocket {
    /// Listens at `path`. The file of a socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Something is there, or the folder is not.
    pub fn bind(path: &Path) -> Result<(Self, SocketFile), HostSocketError> {
        let (listener, file) = SocketFile::make(path)?;
        Ok((Self { listener, path: path.into(), inside: Mutex::default() }, file))
    }

    /// Has the guest's next connection to the host's `port` meet `stream`, which is this process's own. Several at one port
    /// are met in this order, each once.
    ///
    /// # Errors
    /// The stream cannot be made one that does not block.
    pub fn meet(&self, port: u32, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).push((port, stream));
        Ok(())
    }

    fn take_inside(&self, port: u32) -> Option<UnixStream> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let place = inside.iter().position(|(at, _)| *at == port)?;
        Some(inside.remove(place).1)
    }

    /// What to wait on for programs that connect.
    #[must_use]
    pub fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// Where programs connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connects to the program that serves `port` for the guest. Never waits.
    ///
    /// # Errors
    /// Nobody listens there, or its queue is full.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        if let Some(stream) = self.take_inside(port) {
            return Ok(stream);
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect_now(Path::new(&path)).map(UnixStream::from)
    }
}

/// The longest line: `CONNECT 4294967295\r\n` and some blanks.
const MAX_LINE: usize = 32;

/// How a program's first line stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Not all of it is there.
    Partial,
    /// The guest's port. The line has been taken; what follows is data.
    Port(u32),
    /// No such line, and there will be none.
    Bad,
}

/// Reads the first line where it is whole, and nothing behind it: that is the guest's.
pub fn read_line(stream: impl AsFd) -> Line {
    let mut bytes = [0; MAX_LINE];
    let len = match recv(&stream, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((len, _)) => len,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Line::Partial,
        Err(_) => return Line::Bad,
    };
    let Some(end) = bytes[..len].iter().position(|b| *b == b'\n') else {
        return if len == 0 || len == MAX_LINE { Line::Bad } else { Line::Partial };
    };
    // It was there a moment ago, and nobody else reads.
    match recv(&stream, &mut bytes[..=end], RecvFlags::DONTWAIT) {
        Ok((taken, _)) if taken == end + 1 => parse_line(&bytes[..end]).map_or(Line::Bad, Line::Port),
        _ => Line::Bad,
    }
}

/// The port of `CONNECT <port>`.
fn parse_line(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    // Rust would take a sign.
    let good = word.eq_ignore_ascii_case("connect") && words.next().is_none() && !port.starts_with('+');
    good.then(|| port.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn line(bytes: &[u8]) -> Line {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(bytes).unwrap();
        read_line(&b)
    }

    #[test]
    fn lines_are_read_as_others_read_them() {
        assert_eq!(line(b"CONNECT 52\n"), Line::Port(52));
        assert_eq!(line(b"connect 4294967295\r\nmore"), Line::Port(u32::MAX));
        for partial in [&b"CON"[..], b"CONNECT 52"] {
            assert_eq!(line(partial), Line::Partial);
        }
        for bad in [&b"\n"[..], b"CONNECT\n", b"CONNECT +5\n", b"CONNECT -1\n", b"CONNECT 4294967296\n"] {
            assert_eq!(line(bad), Line::Bad, "{bad:?}");
        }
        assert_eq!(line(&[b'x'; 100]), Line::Bad);
        assert_eq!(line(b"HELLO 5\n"), Line::Bad);
        assert_eq!(line(b"CONNECT 5 6\n"), Line::Bad);
    }

    #[test]
    fn what_follows_the_line_stays() {
        use std::io::Read;
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"CONNECT 1\nrest").unwrap();
        drop(a);
        assert_eq!(read_line(&b), Line::Port(1));
        let mut rest = String::new();
        b.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "rest");
    }

    #[test]
    fn streams_of_this_process_are_met_once_and_in_order() {
        use std::io::Read;
        let folder = tempfile::tempdir().unwrap();
        let (host, _file) = HostSocket::bind(&folder.path().join("v")).unwrap();
        let ours = [5, 5, 6].map(|port| {
            let (ours, guests) = UnixStream::pair().unwrap();
            host.meet(port, guests).unwrap();
            ours
        });
        for (port, mut ours) in [5, 5, 6].into_iter().zip(ours) {
            host.connect(port).unwrap().write_all(&[port as u8]).unwrap();
            let mut sent = Vec::new();
            ours.read_to_end(&mut sent).unwrap();
            assert_eq!(sent, [port as u8]);
        }
        assert!(host.connect(5).is_err() && host.connect(7).is_err());
    }

    proptest! {
        #[test]
        fn any_line_is_survived(bytes: Vec<u8>) {
            parse_line(&bytes);
        }
    }
}
