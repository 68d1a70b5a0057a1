//! Open files: their bytes go between the host's kernel and guest memory, and are never in ours.

use std::io;

use rustix::fs::{FallocateFlags, OFlags, fallocate, fdatasync, fsync};
use rustix::io::Errno;

use crate::sys::file_io::{Action, Buffers, Operation};
use crate::vm::Memory;

use super::session::{Session, open_flags};
use super::wire::{self, Args, Reply};

/// A read or a write, as far as `fuse_read_in` and `fuse_write_in` are alike.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    handle: u64,
    offset: u64,
    /// Bytes.
    pub size: u32,
}

impl Transfer {
    /// Reads one.
    pub fn read(args: &mut Args<'_>) -> Result<Self, Errno> {
        Ok(Self { handle: args.u64()?, offset: args.u64()?, size: args.u32()? })
    }
}

impl Session {
    pub(super) fn open(&self, node: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let flags = open_flags(args.u32()?)?;
        let changes = flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC);
        if changes && self.folder.readonly {
            return Err(Errno::ROFS);
        }
        let inode = self.inode(node)?;
        if inode.kind == rustix::fs::FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let file = self.folder.open_inode(&inode, flags)?;
        Ok(Self::opened(Reply::empty(), self.handles.add(file, false)?))
    }

    /// `fuse_open_out`.
    pub(super) fn opened(reply: Reply, handle: u64) -> Reply {
        reply.u64(handle).u32(wire::OPEN_KEEP_CACHE).u32(0)
    }

    pub(super) fn release(&self, args: &mut Args<'_>) -> Result<Reply, Errno> {
        self.handles.close(args.u64()?)?;
        Ok(Reply::empty())
    }

    /// Until it is on the disk. Of a folder, too, which makes names last.
    pub(super) fn fsync(&self, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (handle, flags) = (args.u64()?, args.u32()?);
        let handle = self.handles.get(handle)?;
        // There is nothing to be written.
        if self.folder.readonly {
            return Ok(Reply::empty());
        }
        if flags & wire::FSYNC_DATA == 0 { fsync(&*handle.file) } else { fdatasync(&*handle.file) }?;
        Ok(Reply::empty())
    }

    pub(super) fn fallocate(&self, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (handle, offset, len, mode) = (args.u64()?, args.u64()?, args.u64()?, args.u32()?);
        let mode = FallocateFlags::from_bits_retain(mode);
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        fallocate(&*self.handles.file(handle)?.file, mode, offset, len)?;
        Ok(Reply::empty())
    }

    /// Reads into guest memory as much as there is: less means the file's end to the guest.
    pub(super) fn read(&self, transfer: Transfer, buffers: Buffers<Memory>) -> Result<u32, Errno> {
        let moved = self.transfer(transfer, buffers, Action::Read)?;
        self.counters.read_bytes.add(moved.into());
        Ok(moved)
    }

    /// Writes from guest memory. Fewer bytes than asked for is an answer, too, if there are any.
    pub(super) fn write(&self, transfer: Transfer, buffers: Buffers<Memory>) -> Result<u32, Errno> {
        let moved = self.transfer(transfer, buffers, Action::Write { durable: false })?;
        self.counters.written_bytes.add(moved.into());
        Ok(moved)
    }

    fn transfer(&self, transfer: Transfer, buffers: Buffers<Memory>, action: Action) -> Result<u32, Errno> {
        // The kernel takes -1 for the place where the file stands.
        if i64::try_from(transfer.offset).is_err() {
            return Err(Errno::INVAL);
        }
        let file = self.handles.file(transfer.handle)?.file.clone();
        let mut operation = Operation { tag: 0, file, action, offset: transfer.offset, buffers };
        let mut moved = 0_u32;
        while operation.buffers.len() > 0 {
            match operation.perform() {
                Ok(0) => break,
                Ok(count) => {
                    operation.buffers.advance(count);
                    operation.offset = operation.offset.saturating_add(count as u64);
                    // No more than the request's size, which 32 bits count.
                    moved += count as u32;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if moved > 0 => break,
                Err(e) => return Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
            }
        }
        Ok(moved)
    }
}
