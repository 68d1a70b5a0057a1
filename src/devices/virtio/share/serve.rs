//! One request: read from its chain, done, and answered into it.

use rustix::io::Errno;

use crate::sys::file_io::Buffers;
use crate::vm::Memory;

use super::super::{Chain, QueueError, Segment, slice};
use super::files::Transfer;
use super::session::{MAX_TRANSFER, Session};
use super::wire::{Args, Header, IN_HEADER, OUT_HEADER, Reply, WRITE_IN, op, out_header};

/// The most that stands behind a request's header, but for data: two names, or a name and a link's target.
const MAX_ARGS: u32 = 16 << 10;

impl Session {
    /// Does the request in `chain`, and says how many bytes were written to it. What is no request, and what has no room
    /// for an answer that it needs, is given back as it came, and nothing is done.
    ///
    /// # Errors
    /// The chain is not in guest memory.
    pub fn serve(&self, memory: &Memory, chain: &Chain) -> Result<u32, QueueError> {
        if chain.readable_len() < IN_HEADER {
            return Ok(0);
        }
        let mut raw = [0; IN_HEADER as usize];
        chain.read(memory.guest(), 0, &mut raw)?;
        let header = Header::parse(&raw);
        self.counters.requests.increment();
        if matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            let _ = self.take_note(header, &args_of(chain, memory)?.unwrap_or_default());
            return Ok(0);
        }
        let Some(room) = chain.writable_len().checked_sub(OUT_HEADER) else { return Ok(0) };
        let answer = match header.opcode {
            op::READ => match self.serve_read(header, memory, chain, room)? {
                Ok(moved) => {
                    self.finish(header, memory, chain, moved as usize, None)?;
                    return Ok(OUT_HEADER + moved);
                }
                Err(e) => Err(e),
            },
            op::WRITE => self.serve_write(header, memory, chain)?,
            _ => match args_of(chain, memory)? {
                Some(args) => self.answer(header, &args, room as usize),
                None => Err(Errno::TOOBIG),
            },
        };
        let (reply, error) = match answer {
            Ok(reply) if reply.len() <= room as usize => (reply, None),
            // It is done, but the guest has not made room for hearing of it.
            Ok(_) => (Reply::empty(), Some(Errno::IO)),
            Err(e) => (Reply::empty(), Some(e)),
        };
        if !reply.as_bytes().is_empty() {
            chain.write(memory.guest(), OUT_HEADER, reply.as_bytes())?;
        }
        self.finish(header, memory, chain, reply.len(), error)?;
        Ok(OUT_HEADER + reply.len() as u32)
    }

    /// Writes the answer's header, in front of `len` bytes that are there.
    fn finish(
        &self,
        header: Header,
        memory: &Memory,
        chain: &Chain,
        len: usize,
        error: Option<Errno>,
    ) -> Result<(), QueueError> {
        if error.is_some() {
            self.counters.errors.increment();
        }
        chain.write(memory.guest(), 0, out_header(len, error, header.unique).as_bytes())
    }

    /// The bytes go behind the header's place.
    fn serve_read(
        &self,
        header: Header,
        memory: &Memory,
        chain: &Chain,
        room: u32,
    ) -> Result<Result<u32, Errno>, QueueError> {
        let Some(args) = args_of(chain, memory)? else { return Ok(Err(Errno::TOOBIG)) };
        let transfer = self.check(header.opcode).and_then(|()| Transfer::read(&mut Args::new(&args)));
        Ok(transfer.and_then(|transfer| {
            let pieces = slice(chain.writable(), OUT_HEADER, room.min(transfer.size).min(MAX_TRANSFER));
            self.read(transfer, buffers(memory, pieces)?)
        }))
    }

    /// The bytes stand behind what says where they go.
    fn serve_write(
        &self,
        header: Header,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<Result<Reply, Errno>, QueueError> {
        let start = IN_HEADER + WRITE_IN;
        let Some(len) = chain.readable_len().checked_sub(start) else { return Ok(Err(Errno::INVAL)) };
        let mut args = [0; WRITE_IN as usize];
        chain.read(memory.guest(), IN_HEADER, &mut args)?;
        let transfer = self.check(header.opcode).and_then(|()| Transfer::read(&mut Args::new(&args)));
        Ok(transfer.and_then(|transfer| {
            if transfer.size > len.min(MAX_TRANSFER) {
                return Err(Errno::INVAL);
            }
            let pieces = slice(chain.readable(), start, transfer.size);
            let written = self.write(transfer, buffers(memory, pieces)?)?;
            Ok(Reply::empty().u32(written).u32(0))
        }))
    }
}

/// A copy of what stands behind a request's header; `None`: it is longer than any request of Linux'.
fn args_of(chain: &Chain, memory: &Memory) -> Result<Option<Vec<u8>>, QueueError> {
    let len = chain.readable_len() - IN_HEADER;
    if len > MAX_ARGS {
        return Ok(None);
    }
    let mut args = vec![0; len as usize];
    chain.read(memory.guest(), IN_HEADER, &mut args)?;
    Ok(Some(args))
}

fn buffers(memory: &Memory, pieces: impl Iterator<Item = Segment>) -> Result<Buffers<Memory>, Errno> {
    let pieces = pieces.map(|piece| (piece.address.0, piece.len));
    // Each was checked to lie in guest memory.
    Buffers::new(memory.clone(), pieces).ok_or(Errno::FAULT)
}
