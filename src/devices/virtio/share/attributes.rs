//! What describes a file, and what of it a guest may change.

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fchmod, fstatfs,
    ftruncate, utimensat,
};
use rustix::io::Errno;

use super::inodes::{Inode, describe};
use super::names::permissions;
use super::session::Session;
use super::wire::{self, Args, Reply, set};

/// The longest name (`NAME_MAX`), whatever a file system takes.
const MAX_NAME: u32 = 255;

/// `fuse_setattr_in`, as far as it is heard.
struct Change {
    what: u32,
    handle: u64,
    size: u64,
    atime: (u64, u32),
    mtime: (u64, u32),
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn read(args: &mut Args<'_>) -> Result<Self, Errno> {
        let (what, _, handle, size) = (args.u32()?, args.u32()?, args.u64()?, args.u64()?);
        let (_lock_owner, atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?, args.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _, uid, gid) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let (atime, mtime) = ((atime, atime_ns), (mtime, mtime_ns));
        Ok(Self { what, handle, size, atime, mtime, mode, uid, gid })
    }

    fn has(&self, bits: u32) -> bool {
        self.what & bits != 0
    }

    /// One of the two times, as `utimensat` takes it.
    fn time(&self, set: u32, now: u32, (seconds, nanoseconds): (u64, u32)) -> Timespec {
        if self.has(now) {
            return Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        }
        if self.has(set) {
            return Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds.into() };
        }
        Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }
    }
}

impl Session {
    pub(super) fn getattr(&self, node: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (flags, _, handle) = (args.u32()?, args.u32()?, args.u64()?);
        // An open file is known by both, and its number costs no look into another table.
        if flags & wire::GETATTR_FH != 0 {
            self.handles.get(handle)?;
        }
        Ok(self.attributes_alone(&describe(&self.inode(node)?.fd)?))
    }

    pub(super) fn setattr(&self, node: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let change = Change::read(args)?;
        let inode = self.inode(node)?;
        let stat = describe(&inode.fd)?;
        if change.has(set::UID) {
            self.ids.user.change(stat.stx_uid, change.uid)?;
        }
        if change.has(set::GID) {
            self.ids.group.change(stat.stx_gid, change.gid)?;
        }
        if change.has(set::MODE) {
            self.change_mode(&inode, &stat, change.mode)?;
        }
        if change.has(set::SIZE) {
            self.change_size(&inode, &change)?;
        }
        if change.has(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) {
            let times = Timestamps {
                last_access: change.time(set::ATIME, set::ATIME_NOW, change.atime),
                last_modification: change.time(set::MTIME, set::MTIME_NOW, change.mtime),
            };
            utimensat(&inode.fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(self.attributes_alone(&describe(&inode.fd)?))
    }

    /// A folder keeps its set-group-ID bit, which is about the files that are made in it. What is changed is opened first:
    /// Landlock, which knows nothing of permissions, thereby has a say.
    fn change_mode(&self, inode: &Inode, stat: &Statx, mode: u32) -> Result<(), Errno> {
        let mut mode = permissions(mode);
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Directory => mode |= Mode::from_raw_mode(stat.stx_mode.into()) & Mode::SGID,
            _ => return Err(Errno::OPNOTSUPP),
        }
        let open = |flags| self.folder.open_inode(inode, flags);
        let file = match open(OFlags::RDONLY) {
            Err(Errno::ACCESS) if inode.kind == FileType::RegularFile => open(OFlags::WRONLY),
            other => other,
        };
        fchmod(file?, mode)
    }

    fn change_size(&self, inode: &Inode, change: &Change) -> Result<(), Errno> {
        if i64::try_from(change.size).is_err() {
            return Err(Errno::FBIG);
        }
        if change.has(set::FH) {
            return ftruncate(&*self.handles.file(change.handle)?.file, change.size);
        }
        if inode.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        ftruncate(self.folder.open_inode(inode, OFlags::WRONLY)?, change.size)
    }

    pub(super) fn statfs(&self) -> Result<Reply, Errno> {
        let stat = fstatfs(&self.inode(wire::ROOT)?.fd)?;
        let reply = Reply::empty().u64(stat.f_blocks).u64(stat.f_bfree).u64(stat.f_bavail);
        let reply = reply.u64(stat.f_files).u64(stat.f_ffree);
        // None of these is as much as 32 bits count.
        let reply = reply.u32(stat.f_bsize as u32).u32(MAX_NAME).u32(stat.f_frsize as u32);
        Ok(reply.zeros(28))
    }
}
