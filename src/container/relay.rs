//! The host's end of a program's streams: frames from and to `microvm-init` (`crate::guest::wire`).
//!
//! The guest is not trusted: a frame has a bound, and what it says as a message is shown without control characters.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::guest::wire::{Failure, Kind, MAX_FRAME, read_frame, write_frame};

/// How a program's streams came to their end.
#[derive(Debug, PartialEq, Eq)]
pub enum Finish {
    /// It ended with this status.
    Exited(u8),
    /// It was not run.
    Failed(Failure),
    /// The VM ended first.
    Lost,
}

/// Who has what comes from a program.
pub trait Receiver {
    /// It runs, as the session of this number.
    fn started(&mut self, session: u32);

    /// It has printed something, [`Kind::Output`] or [`Kind::Error`].
    fn printed(&mut self, kind: Kind, bytes: &[u8]);
}

/// Passes on what comes until the program's end.
pub fn receive(stream: &mut impl Read, to: &mut impl Receiver) -> Finish {
    let mut bytes = Vec::new();
    loop {
        match (read_frame(stream, &mut bytes), bytes.as_slice()) {
            (Ok(Some(Kind::Started)), &[a, b, c, d]) => to.started(u32::from_le_bytes([a, b, c, d])),
            (Ok(Some(kind @ (Kind::Output | Kind::Error))), _) => to.printed(kind, &bytes),
            (Ok(Some(Kind::Exited)), &[status]) => return Finish::Exited(status),
            (Ok(Some(Kind::Failed)), _) => return Finish::Failed(failure(&bytes)),
            // Its end, or a guest that says what it should not.
            _ => return Finish::Lost,
        }
    }
}

/// What a guest says of why something failed, fit to be shown.
pub fn failure(bytes: &[u8]) -> Failure {
    let wrong = || Failure { status: 125, message: "the guest does not say why".into() };
    let mut failure: Failure = serde_json::from_slice(bytes).unwrap_or_else(|_| wrong());
    failure.message.retain(|c| !c.is_control());
    failure
}

/// Passes standard input on until its end, or the stream's.
pub fn send_input(stream: &mut impl Write) {
    let mut bytes = vec![0; MAX_FRAME / 2];
    loop {
        let sent = match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
            Ok(0) => write_frame(stream, Kind::InputEnd, &[]),
            Ok(len) => write_frame(stream, Kind::Input, &bytes[..len]),
            Err(Errno::INTR) => continue,
            // Somebody who shares it has made it one that does not block.
            Err(Errno::AGAIN) => wait(rustix::stdio::stdin(), PollFlags::IN),
            Err(_) => write_frame(stream, Kind::InputEnd, &[]).and(Err(io::ErrorKind::BrokenPipe.into())),
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Writes all of it to standard output or error.
///
/// # Errors
/// Nobody reads it any more, or the disk is full.
pub fn print(kind: Kind, mut bytes: &[u8]) -> io::Result<()> {
    let to = if kind == Kind::Error { rustix::stdio::stderr() } else { rustix::stdio::stdout() };
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(to, PollFlags::OUT)?,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct All(Vec<String>);

    impl Receiver for All {
        fn started(&mut self, session: u32) {
            self.0.push(format!("started {session}"));
        }
        fn printed(&mut self, kind: Kind, bytes: &[u8]) {
            self.0.push(format!("{kind:?} {}", String::from_utf8_lossy(bytes)));
        }
    }

    fn finish(frames: &[(Kind, &[u8])]) -> (Finish, Vec<String>) {
        let mut stream = Vec::new();
        frames.iter().for_each(|(kind, bytes)| write_frame(&mut stream, *kind, bytes).unwrap());
        let mut all = All::default();
        (receive(&mut stream.as_slice(), &mut all), all.0)
    }

    #[test]
    fn a_program_starts_prints_and_ends() {
        let frames = [
            (Kind::Started, &[7, 0, 0, 0][..]),
            (Kind::Output, b"a"),
            (Kind::Error, b"b"),
            (Kind::Exited, &[3]),
        ];
        let (end, seen) = finish(&frames);
        assert_eq!((end, seen.join(", ")), (Finish::Exited(3), "started 7, Output a, Error b".into()));
    }

    #[test]
    fn what_a_guest_says_wrong_is_an_end() {
        assert_eq!(finish(&[]).0, Finish::Lost);
        for frame in
            [(Kind::Started, &[1][..]), (Kind::Exited, &[]), (Kind::Request, b"{}"), (Kind::Input, b"x")]
        {
            assert_eq!(finish(&[frame]).0, Finish::Lost, "{frame:?}");
        }
        let text = br#"{"status": 127, "message": "a\u001b[2Jb"}"#;
        let expected = Failure { status: 127, message: "a[2Jb".into() };
        assert_eq!(finish(&[(Kind::Failed, text)]).0, Finish::Failed(expected));
        assert!(matches!(finish(&[(Kind::Failed, b"x")]).0, Finish::Failed(_)));
    }
}
