//! A share that is one file. A driver's root is a folder, so it gets one that is not there on the host: it has the one name,
//! and nothing in it can be made, renamed or removed. What is behind is the file alone, so no other can be reached.

use std::ffi::CStr;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::folders::{Found, entry};
use super::inodes::describe;
use super::session::Session;
use super::wire::{self, Args, ENTRY_OUT, Reply, op};

/// Everybody may look into it.
const MODE: u16 = 0o040_555;
const DIRECTORY: u32 = FileType::Directory.as_raw_mode() >> 12;
const REGULAR: u32 = FileType::RegularFile.as_raw_mode() >> 12;

impl Session {
    /// Does what `opcode` asks of the root, in which the file has the name `file`.
    pub(super) fn answer_of_root(
        &self,
        file: &CStr,
        opcode: u32,
        args: &mut Args<'_>,
        room: usize,
    ) -> Result<Reply, Errno> {
        match opcode {
            op::LOOKUP if args.name()? == file => {
                let (node, stat) = self.inodes.add(self.inodes.describe(self.folder.again()?)?)?;
                Ok(self.entry(Reply::empty(), node, &stat))
            }
            op::LOOKUP => Err(Errno::NOENT),
            op::GETATTR => {
                let mut stat = describe(&self.folder.descriptor())?;
                (stat.stx_mode, stat.stx_nlink) = (MODE, 2);
                (stat.stx_ino, stat.stx_size, stat.stx_blocks) = (wire::ROOT, 0, 0);
                Ok(self.attributes_alone(&stat))
            }
            op::STATFS => self.statfs(),
            op::OPENDIR => Ok(Reply::empty().u64(0).u32(0).u32(0)),
            op::READDIR => list(file, 0, args, room),
            // Names without what describes them, which is asked for.
            op::READDIRPLUS => list(file, ENTRY_OUT, args, room),
            op::RELEASEDIR | op::FSYNCDIR => Ok(Reply::empty()),
            _ => Err(Errno::PERM),
        }
    }
}

/// The entries from the offset asked for on, each behind so many zeros.
fn list(file: &CStr, zeros: usize, args: &mut Args<'_>, room: usize) -> Result<Reply, Errno> {
    let (_handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
    let most = room.min(size as usize);
    let names = [(c".", DIRECTORY), (c"..", DIRECTORY), (file, REGULAR)];
    let mut reply = Reply::empty();
    for (place, (name, kind)) in
        names.into_iter().enumerate().skip(usize::try_from(offset).unwrap_or(usize::MAX))
    {
        let place = place as u64 + 1;
        let next = entry(Reply::empty().zeros(zeros), &Found { number: place, next: place, kind, name });
        if reply.len() + next.len() > most {
            break;
        }
        reply = reply.bytes(next.as_bytes());
    }
    Ok(reply)
}
