//! What a guest's driver and this host have said to each other so far, and what each request does.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{OFlags, Statx};
use rustix::io::Errno;

use super::counters::ShareCounters;
use super::folder::SharedFolder;
use super::handles::Handles;
use super::ids::Ids;
use super::inodes::{Inode, Inodes};
use super::limits::Limits;
use super::wire::{self, Args, Header, Reply, init, op};

/// How long the guest may believe what it was told of a file: what the host changes is seen within this.
const VALID: Duration = Duration::from_secs(1);
/// The most pages of one read or write: as far as a request of Linux goes.
const MAX_PAGES: u16 = 256;
const PAGE: u32 = 4096;
/// The same in bytes, 1 MiB, which a guest is held to: no request takes long.
pub(super) const MAX_TRANSFER: u32 = MAX_PAGES as u32 * PAGE;
/// Requests that nobody in the guest waits for, as reading ahead, and when it holds back: as many as a queue has room for.
const BACKGROUND: (u16, u16) = (64, 48);

/// A folder and what its guest knows of it. Threads serve it side by side.
pub struct Session {
    pub(super) folder: SharedFolder,
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) ids: Ids,
    pub(super) counters: ShareCounters,
    is_started: AtomicBool,
    is_ending: AtomicBool,
}

impl Session {
    /// One that waits for a driver's INIT.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(
        folder: SharedFolder,
        ids: Ids,
        limits: Limits,
        counters: ShareCounters,
    ) -> std::io::Result<Self> {
        let inodes = Inodes::new(folder.root()?, limits.inodes, counters.inodes.clone())?;
        let handles = Handles::new(limits.handles, counters.open.clone());
        Ok(Self {
            folder,
            inodes,
            handles,
            ids,
            counters,
            is_started: AtomicBool::new(false),
            is_ending: AtomicBool::new(false),
        })
    }

    /// The driver is gone: nothing that it had is left.
    pub fn clear(&self) {
        self.is_started.store(false, Ordering::SeqCst);
        self.handles.clear();
        self.inodes.clear();
    }

    /// The device is being reset: what waits to be done is given back undone.
    pub fn set_ending(&self, ending: bool) {
        self.is_ending.store(ending, Ordering::SeqCst);
    }

    /// Whether nobody waits for an answer any more.
    pub fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }

    /// Whether a driver has said INIT.
    pub fn is_started(&self) -> bool {
        self.is_started.load(Ordering::SeqCst)
    }

    /// Refuses what may not be done now, or not to this folder.
    pub(super) fn check(&self, opcode: u32) -> Result<(), Errno> {
        if !self.is_started() && opcode != op::INIT {
            return Err(Errno::IO);
        }
        if self.folder.readonly && changes_something(opcode) { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Does what `header` and what stands behind it ask for. `room`: the most bytes that the answer may have.
    pub(super) fn answer(&self, header: Header, args: &[u8], room: usize) -> Result<Reply, Errno> {
        self.check(header.opcode)?;
        let (node, args) = (header.node, &mut Args::new(args));
        if let Some(file) = self.folder.file.as_ref().filter(|_| is_of_root(&header)) {
            return self.answer_of_root(file, header.opcode, args, room);
        }
        match header.opcode {
            op::INIT => self.init(args),
            op::DESTROY => {
                self.clear();
                Ok(Reply::empty())
            }
            op::LOOKUP => self.lookup(node, args.name()?),
            op::GETATTR => self.getattr(node, args),
            op::SETATTR => self.setattr(node, args),
            op::READLINK => self.readlink(node),
            op::SYMLINK => self.symlink(node, args),
            op::MKNOD => self.mknod(node, args),
            op::MKDIR => self.mkdir(node, args),
            op::UNLINK => self.unlink(node, args),
            op::RMDIR => self.rmdir(node, args),
            op::RENAME => self.rename(node, args),
            op::RENAME2 => self.rename2(node, args),
            op::LINK => self.link(node, args),
            op::OPEN => self.open(node, args),
            op::CREATE => self.create(node, args),
            op::RELEASE | op::RELEASEDIR => self.release(args),
            op::FSYNC => self.fsync(args),
            op::FSYNCDIR => self.fsync(args),
            op::FALLOCATE => self.fallocate(args),
            op::STATFS => self.statfs(),
            op::OPENDIR => self.opendir(node),
            op::READDIR => self.readdir(args, room),
            op::READDIRPLUS => self.readdirplus(node, args, room),
            _ => Err(Errno::NOSYS),
        }
    }

    /// What has no answer.
    pub(super) fn take_note(&self, header: Header, args: &[u8]) -> Result<(), Errno> {
        let args = &mut Args::new(args);
        match header.opcode {
            op::FORGET => self.inodes.forget(header.node, args.u64()?),
            op::BATCH_FORGET => {
                let (count, _) = (args.u32()?, args.u32()?);
                // It ends where the request does.
                for _ in 0..count {
                    let (node, times) = (args.u64()?, args.u64()?);
                    self.inodes.forget(node, times);
                }
            }
            // A request is not given up half-way.
            _ => {}
        }
        Ok(())
    }

    /// `FUSE_INIT`. A driver that comes anew begins with nothing.
    fn init(&self, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (major, minor, readahead, offered) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        if major < wire::MAJOR || (major == wire::MAJOR && minor < wire::OLDEST_MINOR) {
            return Err(Errno::PROTO);
        }
        self.clear();
        // A newer major version asks again with ours.
        self.is_started.store(major == wire::MAJOR, Ordering::SeqCst);
        let wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES;
        let reply = Reply::empty().u32(wire::MAJOR).u32(wire::MINOR).u32(readahead).u32(wanted & offered);
        let reply = reply.u16(BACKGROUND.0).u16(BACKGROUND.1).u32(MAX_TRANSFER);
        // Times are exact to a nanosecond.
        Ok(reply.u32(1).u16(MAX_PAGES).u16(0).zeros(32))
    }

    /// The folder, file or link of that number.
    pub(super) fn inode(&self, node: u64) -> Result<std::sync::Arc<Inode>, Errno> {
        self.inodes.get(node)
    }

    /// `fuse_entry_out` for what lies in `parent` by this name, which the guest knows from now on.
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> Result<Reply, Errno> {
        let found = self.inodes.find(&*self.inode(parent)?, name)?;
        let (node, stat) = self.inodes.add(found)?;
        Ok(self.entry(Reply::empty(), node, &stat))
    }

    /// `fuse_entry_out`. Numbers are never given again, so all are of generation 0.
    pub(super) fn entry(&self, reply: Reply, node: u64, stat: &Statx) -> Reply {
        let valid = VALID.as_secs();
        self.attributes(reply.u64(node).u64(0).u64(valid).u64(valid).u32(0).u32(0), stat)
    }

    /// `fuse_attr_out`.
    pub(super) fn attributes_alone(&self, stat: &Statx) -> Reply {
        self.attributes(Reply::empty().u64(VALID.as_secs()).u32(0).u32(0), stat)
    }

    /// `fuse_attr`.
    fn attributes(&self, reply: Reply, stat: &Statx) -> Reply {
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        let reply = reply.u64(stat.stx_ino).u64(stat.stx_size).u64(stat.stx_blocks);
        let reply = times.iter().fold(reply, |reply, time| reply.u64(time.tv_sec as u64));
        let reply = times.iter().fold(reply, |reply, time| reply.u32(time.tv_nsec));
        let reply = reply.u32(stat.stx_mode.into()).u32(stat.stx_nlink);
        let reply =
            reply.u32(self.ids.user.to_guest(stat.stx_uid)).u32(self.ids.group.to_guest(stat.stx_gid));
        reply.u32(device(stat)).u32(PAGE).u32(0)
    }
}

/// Whether a request is one about the root. INIT and DESTROY are about the whole.
fn is_of_root(header: &Header) -> bool {
    header.node == wire::ROOT && !matches!(header.opcode, op::INIT | op::DESTROY)
}

/// What a device's node stands for, as Linux packs it (`new_encode_dev`). No device is ever opened here.
fn device(stat: &Statx) -> u32 {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// What no guest may ask of a folder that it may only read. Opening a file is looked at by its flags.
fn changes_something(opcode: u32) -> bool {
    matches!(
        opcode,
        op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::CREATE
            | op::WRITE
            | op::FALLOCATE
    )
}

/// The flags of an open file that a guest may choose. What is appended has its place from the guest, and direct I/O ends at
/// the guest's own cache.
pub(super) fn open_flags(asked: u32) -> Result<OFlags, Errno> {
    let asked = OFlags::from_bits_retain(asked);
    let access = asked & OFlags::RWMODE;
    if access == OFlags::RWMODE {
        return Err(Errno::INVAL);
    }
    Ok(access | (asked & (OFlags::TRUNC | OFlags::DSYNC | OFlags::SYNC)))
}
