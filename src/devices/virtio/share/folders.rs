//! Open folders, and what they hold.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use rustix::fs::{OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::handles::Handle;
use super::session::Session;
use super::wire::{self, Args, DIRENT, ENTRY_OUT, Reply};

/// What one call of the kernel's tells at most. Its longest entry is 280 bytes.
const BATCH: usize = 32 << 10;
/// The longest answer, whatever room the guest has.
const MAX_ANSWER: usize = 128 << 10;

/// An entry of a folder.
pub(super) struct Found<'a> {
    pub number: u64,
    /// Where the next one begins.
    pub next: u64,
    pub kind: u32,
    pub name: &'a CStr,
}

impl Session {
    pub(super) fn opendir(&self, node: u64) -> Result<Reply, Errno> {
        let file = self.folder.open_inode(&*self.inode(node)?, OFlags::DIRECTORY)?;
        let handle = self.handles.add(file, true)?;
        Ok(Reply::empty().u64(handle).u32(0).u32(0))
    }

    pub(super) fn readdir(&self, args: &mut Args<'_>, room: usize) -> Result<Reply, Errno> {
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let most = room.min(size as usize).min(MAX_ANSWER);
        let mut reply = Reply::empty();
        each(&*self.handles.folder(handle)?, offset, |found| {
            if reply.len() + entry_len(found.name) > most {
                return false;
            }
            reply = entry(std::mem::take(&mut reply), &found);
            true
        })?;
        Ok(reply)
    }

    /// The same with what describes each, so that the guest need not ask. What it may not know more of, or what is gone
    /// meanwhile, stays a name.
    pub(super) fn readdirplus(&self, node: u64, args: &mut Args<'_>, room: usize) -> Result<Reply, Errno> {
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let most = room.min(size as usize).min(MAX_ANSWER);
        let (folder, inode) = (self.handles.folder(handle)?, self.inode(node)?);
        let mut reply = Reply::empty();
        each(&folder, offset, |found| {
            if reply.len() + ENTRY_OUT + entry_len(found.name) > most {
                return false;
            }
            let is_own = matches!(found.name.to_bytes(), b"." | b"..");
            let known = if is_own { Err(Errno::NOENT) } else { self.inodes.find(&inode, found.name) };
            let so_far = std::mem::take(&mut reply);
            let with = match known.and_then(|found| self.inodes.add(found)) {
                Ok((node, stat)) => self.entry(so_far, node, &stat),
                Err(_) => so_far.zeros(ENTRY_OUT),
            };
            reply = entry(with, &found);
            true
        })?;
        Ok(reply)
    }
}

/// Tells `take` of the entries from `offset` on, one call's worth and until it takes no more.
fn each(folder: &Handle, offset: u64, mut take: impl FnMut(Found<'_>) -> bool) -> Result<(), Errno> {
    let mut buffer = vec![MaybeUninit::uninit(); BATCH];
    let _place = folder.place.lock().unwrap_or_else(PoisonError::into_inner);
    seek(&*folder.file, SeekFrom::Start(offset))?;
    let mut entries = RawDir::new(&*folder.file, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let found = Found {
            number: entry.ino(),
            next: entry.next_entry_cookie(),
            kind: entry.file_type().as_raw_mode() >> 12,
            name: entry.file_name(),
        };
        if !take(found) || entries.is_buffer_empty() {
            break;
        }
    }
    Ok(())
}

/// Length of a `fuse_dirent` with its name, which is filled up.
fn entry_len(name: &CStr) -> usize {
    DIRENT + name.count_bytes().next_multiple_of(8)
}

/// `fuse_dirent`. The number of what is above the shared folder is not the guest's business.
pub(super) fn entry(reply: Reply, found: &Found<'_>) -> Reply {
    let (name, len) = (found.name.to_bytes(), found.name.count_bytes());
    let number = if name == b".." { wire::ROOT } else { found.number };
    let reply = reply.u64(number).u64(found.next).u32(len as u32).u32(found.kind);
    reply.bytes(name).zeros(len.next_multiple_of(8) - len)
}
