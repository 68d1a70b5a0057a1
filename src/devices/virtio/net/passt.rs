//! User mode: `passt` speaks to the guest by frames and to the host by its ordinary sockets, without root.
//!
//! Frames go over a stream as in QEMU's `-netdev stream`: four bytes of length, most significant first, and the frame.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemoryMmap;

use crate::config::{NetConfig, Publish};
use crate::sys::guest_iovec::GuestIovecs;

use super::super::{Segment, slice};
use super::F_MRG_RXBUF;
use super::backend::{Backend, HEADER, MAX_FRAME, Room, Sent};
use super::user_mode::{PasstError, start_passt};

/// Length of what stands before a frame.
const PREFIX: usize = 4;
const BUFFER: usize = 128 << 10;
/// What passt tells guests by DHCP: the largest IP packet that is a multiple of four bytes.
const MTU: u16 = 65520;

/// The connection to a `passt`, which ends with it.
pub struct Passt {
    stream: UnixStream,
    pieces: GuestIovecs,
    input: Input,
    output: Output,
}

impl Passt {
    /// Starts `passt` for the card `net`.
    ///
    /// # Errors
    /// It is not there, or a port is taken.
    pub fn start(publish: &[Publish], net: &NetConfig) -> Result<Self, PasstError> {
        let (ours, theirs) = UnixStream::pair().map_err(PasstError::Start)?;
        start_passt(&theirs, publish, net)?;
        Self::over(ours).map_err(PasstError::Start)
    }

    /// A card on a stream that somebody else speaks passt's protocol on.
    ///
    /// # Errors
    /// The stream cannot be made non-blocking.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            pieces: GuestIovecs::default(),
            input: Input::default(),
            output: Output::default(),
        })
    }
}

impl AsFd for Passt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Backend for Passt {
    fn features(&self) -> u64 {
        // No offloads: frames have no header on their way.
        F_MRG_RXBUF
    }

    fn mtu(&self) -> Option<u16> {
        Some(MTU)
    }

    fn set_features(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn send(&mut self, memory: &GuestMemoryMmap, frame: &[Segment]) -> io::Result<Sent> {
        if self.flush()? == Sent::Wait {
            return Ok(Sent::Wait);
        }
        let len: u32 = frame.iter().map(|s| s.len).sum::<u32>() - HEADER as u32;
        let prefix = len.to_be_bytes();
        let pieces = || slice(frame, HEADER as u32, len).map(|s| (s.address, s.len));
        match self.pieces.write(self.stream.as_fd(), &prefix, memory, pieces()) {
            Ok(n) if n == PREFIX + len as usize => Ok(Sent::Done),
            Ok(n) => self.output.keep(memory, frame, &prefix, n).map(|()| Sent::Kept),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Wait),
            Err(e) => Err(e),
        }
    }

    fn flush(&mut self) -> io::Result<Sent> {
        self.output.flush(&mut self.stream)
    }

    fn receive(&mut self, room: &mut Room<'_>) -> io::Result<usize> {
        loop {
            if let Some(frame) = self.input.next()? {
                room.put(frame)?;
                return Ok(HEADER + frame.len());
            }
            self.input.fill(&mut self.stream)?;
        }
    }
}

/// What was received and not yet handed on: a few frames and the beginning of one.
struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Input {
    fn default() -> Self {
        Self { buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl Input {
    /// The next whole frame.
    ///
    /// # Errors
    /// A frame longer than any can be: where the next one starts is anybody's guess, so the stream ends here.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let there = &self.buffer[self.start..self.end];
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > MAX_FRAME - HEADER {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if rest.len() < len {
            return Ok(None);
        }
        let begin = self.start + PREFIX;
        self.start = begin + len;
        Ok(Some(&self.buffer[begin..begin + len]))
    }

    /// Reads on. Called where there is no whole frame, so there is room for the rest of one.
    fn fill(&mut self, stream: &mut impl Read) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match stream.read(&mut self.buffer[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.end += n;
                Ok(())
            }
        }
    }
}

/// The rest of a frame that the stream had no room for.
struct Output {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Output {
    fn default() -> Self {
        Self { buffer: vec![0; PREFIX + MAX_FRAME].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl Output {
    /// Keeps what comes behind the first `sent` bytes of prefix and frame.
    fn keep(
        &mut self,
        memory: &GuestMemoryMmap,
        frame: &[Segment],
        prefix: &[u8; PREFIX],
        sent: usize,
    ) -> io::Result<()> {
        (self.start, self.end) = (0, 0);
        self.append(prefix.get(sent..).unwrap_or_default());
        let skip = HEADER + sent.saturating_sub(PREFIX);
        for segment in slice(frame, skip as u32, u32::MAX) {
            let end = self.end + segment.len as usize;
            let place = self.buffer.get_mut(self.end..end).ok_or(io::ErrorKind::InvalidInput)?;
            vm_memory::Bytes::read_slice(memory, place, segment.address).map_err(io::Error::other)?;
            self.end = end;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) {
        self.buffer[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    fn flush(&mut self, stream: &mut impl Write) -> io::Result<Sent> {
        while self.start < self.end {
            match stream.write(&self.buffer[self.start..self.end]) {
                Ok(n) => self.start += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Wait),
                Err(e) => return Err(e),
            }
        }
        Ok(Sent::Done)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A stream that gives a few bytes at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buffer.len());
            self.0.read(&mut buffer[..n])
        }
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(
            lens in prop::collection::vec(0usize..MAX_FRAME - HEADER, 1..8),
            piece in 1usize..BUFFER,
        ) {
            let frames: Vec<Vec<u8>> = lens.iter().enumerate().map(|(i, len)| vec![i as u8; *len]).collect();
            let stream: Vec<u8> =
                frames.iter().flat_map(|f| [&(f.len() as u32).to_be_bytes()[..], f].concat()).collect();
            let (mut input, mut source) = (Input::default(), Pieces(&stream, piece));
            for frame in &frames {
                let got = loop {
                    if let Some(got) = input.next().unwrap() {
                        break got.to_vec();
                    }
                    input.fill(&mut source).unwrap();
                };
                prop_assert_eq!(&got, frame);
            }
            prop_assert!(input.fill(&mut source).is_err());
        }

        #[test]
        fn any_stream_ends(bytes in prop::collection::vec(any::<u8>(), 0..4096), piece in 1usize..4096) {
            let (mut input, mut source) = (Input::default(), Pieces(&bytes, piece));
            while match input.next() {
                Ok(Some(_)) => true,
                Ok(None) => input.fill(&mut source).is_ok(),
                Err(_) => false,
            } {}
        }
    }
}
