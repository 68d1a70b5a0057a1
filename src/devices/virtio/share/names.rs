//! What is done to the names in a folder. Each is one component below a folder that is held, and a symbolic link is itself.

use std::ffi::CStr;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, linkat, mkdirat, openat, readlinkat, renameat_with,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::session::{Session, open_flags};
use super::wire::{Args, Reply};

/// The permissions that a guest may give: no set-user-ID and no set-group-ID, by which a program of the guest's would run
/// on the host as the user who runs this process.
const PERMISSIONS: u32 = 0o1777;

/// What a guest's mode becomes. Its umask is in it already.
pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & PERMISSIONS)
}

impl Session {
    pub(super) fn readlink(&self, node: u64) -> Result<Reply, Errno> {
        let inode = self.inode(node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        Ok(Reply::empty().bytes(readlinkat(&inode.fd, c"", Vec::new())?.to_bytes()))
    }

    /// The link may say anything: the guest follows it in its own world.
    pub(super) fn symlink(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (name, target) = (args.name()?, args.target()?);
        symlinkat(target, &self.inode(parent)?.fd, name)?;
        self.lookup(parent, name)
    }

    /// Files alone: devices, sockets and pipes of the guest's have no business on the host.
    pub(super) fn mknod(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (mode, _device, _umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        if FileType::from_raw_mode(mode) != FileType::RegularFile {
            return Err(Errno::PERM);
        }
        let name = args.name()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        drop(openat(&self.inode(parent)?.fd, name, flags, permissions(mode))?);
        self.lookup(parent, name)
    }

    pub(super) fn mkdir(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (mode, _umask) = (args.u32()?, args.u32()?);
        let name = args.name()?;
        mkdirat(&self.inode(parent)?.fd, name, permissions(mode))?;
        self.lookup(parent, name)
    }

    /// `FUSE_CREATE`: makes a file, or opens the one that is there.
    pub(super) fn create(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (asked, mode, _umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let flags = open_flags(asked)?;
        let own = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = openat(&self.inode(parent)?.fd, name, flags | own, permissions(mode));
        let (file, found) = match made {
            Ok(fd) => {
                let file = fd.into();
                let found = self.inodes.describe(self.folder.path_of(&file)?)?;
                (file, found)
            }
            // It is looked at before it is opened: it may be a pipe.
            Err(Errno::EXIST) if !OFlags::from_bits_retain(asked).contains(OFlags::EXCL) => {
                let found = self.inodes.find(&*self.inode(parent)?, name)?;
                // Opening may have emptied it.
                (self.folder.open_inode(found.inode(), flags)?, found.again()?)
            }
            Err(e) => return Err(e),
        };
        let (node, stat) = self.inodes.add(found)?;
        match self.handles.add(file, false) {
            Ok(handle) => Ok(Self::opened(self.entry(Reply::empty(), node, &stat), handle)),
            Err(e) => {
                self.inodes.forget(node, 1);
                Err(e)
            }
        }
    }

    pub(super) fn unlink(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        self.remove(parent, args.name()?, AtFlags::empty())
    }

    pub(super) fn rmdir(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        self.remove(parent, args.name()?, AtFlags::REMOVEDIR)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> Result<Reply, Errno> {
        unlinkat(&self.inode(parent)?.fd, name, flags)?;
        Ok(Reply::empty())
    }

    pub(super) fn rename(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let new_parent = args.u64()?;
        self.rename_as(parent, new_parent, RenameFlags::empty(), args)
    }

    pub(super) fn rename2(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let (new_parent, flags, _) = (args.u64()?, args.u32()?, args.u32()?);
        let flags = RenameFlags::from_bits_retain(flags);
        // A whiteout is a device's node.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        self.rename_as(parent, new_parent, flags, args)
    }

    fn rename_as(
        &self,
        parent: u64,
        new_parent: u64,
        flags: RenameFlags,
        args: &mut Args<'_>,
    ) -> Result<Reply, Errno> {
        let (name, new_name) = (args.name()?, args.name()?);
        let (from, to) = (self.inode(parent)?, self.inode(new_parent)?);
        renameat_with(&from.fd, name, &to.fd, new_name, flags)?;
        Ok(Reply::empty())
    }

    pub(super) fn link(&self, parent: u64, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let old = self.inode(args.u64()?)?;
        let name = args.name()?;
        let (folder, own) = self.folder.place(&old.fd);
        linkat(folder, own, &self.inode(parent)?.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        self.lookup(parent, name)
    }
}
