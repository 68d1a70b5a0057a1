//! What `microvm-init` and its host say to each other over the socket device.
//!
//! All of it is frames: a byte that says what it is, the length of what follows as four bytes, lowest first, and what
//! follows. A connection is one of two things:
//!
//! - **A program's streams.** The guest makes that of the container's program itself, to [`PORT`] of the host. For another
//!   one the host connects to [`PORT`] of the guest and sends [`Request::Exec`]. Then come [`Kind::Started`], input one way
//!   and output the other, and [`Kind::Exited`] last; or [`Kind::Failed`].
//! - **Requests.** The host connects to [`PORT`] of the guest, or the guest makes the connection: its second to [`PORT`] of
//!   the host. Each request is answered by [`Kind::Done`] or [`Kind::Failed`] before the next. They do not go with the
//!   input, so that a signal passes by input that nobody reads.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::{ProcessSpec, TerminalSize};

/// Of host and guest.
pub const PORT: u32 = 1;

/// The most bytes of a frame.
pub const MAX_FRAME: usize = 64 << 10;

/// The container's program; others have numbers from here on.
pub const MAIN_SESSION: u32 = 0;

const HEAD: usize = 5;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the guest: a [`Request`] as JSON.
    Request = 0,
    /// To the guest: what the program is to read.
    Input = 1,
    /// To the guest: there is no more of that.
    InputEnd = 2,
    /// The program runs; the number of its session, four bytes.
    Started = 3,
    /// What it printed, or a terminal's.
    Output = 4,
    /// What it printed as errors.
    Error = 5,
    /// It has ended; its status, a byte. Nothing follows.
    Exited = 6,
    /// The request was done.
    Done = 7,
    /// A [`Failure`] as JSON. Nothing follows.
    Failed = 8,
}

const KINDS: [Kind; 9] = [
    Kind::Request,
    Kind::Input,
    Kind::InputEnd,
    Kind::Started,
    Kind::Output,
    Kind::Error,
    Kind::Exited,
    Kind::Done,
    Kind::Failed,
];

/// What the host wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// Run another program. This connection is its streams.
    Exec(ProcessSpec),
    /// Send a session's program a signal.
    Signal {
        /// Which.
        session: u32,
        /// The signal's number on Linux.
        signal: u8,
    },
    /// A session's terminal has another size.
    Resize {
        /// Which.
        session: u32,
        /// How large it is now.
        size: TerminalSize,
    },
    /// Send the file or folder at this path as a tar archive: frames of output, an empty one last.
    Read {
        /// In the container.
        path: String,
    },
    /// Unpack the tar archive that comes as frames of input into the folder at this path.
    Write {
        /// In the container.
        path: String,
    },
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// The exit status that Docker has for it: 125, 126 or 127.
    pub status: u8,
    /// In words. They are a guest's: not to be shown with control characters.
    pub message: String,
}

/// Sends one frame.
///
/// # Errors
/// The stream's. More than [`MAX_FRAME`] bytes are no frame.
pub fn write_frame(to: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).ok().filter(|len| *len as usize <= MAX_FRAME);
    let too_much = || io::Error::new(io::ErrorKind::InvalidInput, "more than 64 KiB at once");
    let len = len.ok_or_else(too_much)?;
    // In one piece: each write is a packet.
    let mut frame = Vec::with_capacity(HEAD + bytes.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(bytes);
    to.write_all(&frame)
}

/// Sends a request, or a failure, as JSON.
///
/// # Errors
/// As [`write_frame`].
pub fn write_json(to: &mut impl Write, kind: Kind, value: &impl Serialize) -> io::Result<()> {
    write_frame(to, kind, &serde_json::to_vec(value)?)
}

/// Receives one frame into `bytes`. `None`: the stream has ended.
///
/// # Errors
/// The stream's; what comes is no frame, or the stream ends within one.
pub fn read_frame(from: &mut impl Read, bytes: &mut Vec<u8>) -> io::Result<Option<Kind>> {
    let mut head = [0; HEAD];
    let mut have = 0;
    while have < HEAD {
        match from.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "what comes is no frame");
    let kind = *KINDS.get(usize::from(head[0])).ok_or_else(wrong)?;
    let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if len > MAX_FRAME {
        return Err(wrong());
    }
    bytes.resize(len, 0);
    from.read_exact(bytes)?;
    Ok(Some(kind))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_as_they_were_sent() {
        let mut stream = Vec::new();
        for kind in KINDS {
            write_frame(&mut stream, kind, &vec![7; kind as usize]).unwrap();
        }
        assert!(write_frame(&mut stream, Kind::Input, &vec![0; MAX_FRAME + 1]).is_err());
        let (mut from, mut bytes) = (stream.as_slice(), Vec::new());
        for kind in KINDS {
            assert_eq!(read_frame(&mut from, &mut bytes).unwrap(), Some(kind));
            assert_eq!(bytes, vec![7; kind as usize]);
        }
        assert_eq!(read_frame(&mut from, &mut bytes).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for bytes in [&[9, 0, 0, 0, 0][..], &[4, 1, 0, 1, 0], &[4, 2, 0, 0, 0, 1], &[4, 0]] {
            assert!(read_frame(&mut &*bytes, &mut Vec::new()).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let (mut from, mut frame) = (bytes.as_slice(), Vec::new());
            while let Ok(Some(_)) = read_frame(&mut from, &mut frame) {
                assert!(frame.len() <= bytes.len());
            }
        }
    }
}
