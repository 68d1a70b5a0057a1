//! The files that a guest knows, by the numbers that it knows them by.
//!
//! Each is held by a descriptor that can do nothing but name it (`O_PATH`), found by its parent's and one component. So
//! whoever renames what lies between changes nothing: a number is always the same file.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;

use crate::metrics::Gauge;
use crate::sandbox::Kept;

use super::wire::ROOT;

/// With the mount, of Linux 5.8.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// A file, a folder or a link of the host's.
pub struct Inode {
    pub fd: OwnedFd,
    pub kind: FileType,
}

/// Which file it is, as long as it is held.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    device: (u32, u32),
    number: u64,
}

/// Which mount a file lies on; its device where the kernel does not tell (Linux before 5.8).
fn mount_of(stat: &Statx) -> u64 {
    if stat.stx_mask & StatxFlags::MNT_ID.bits() != 0 {
        return stat.stx_mnt_id;
    }
    u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor)
}

/// Describes what a descriptor names.
pub fn describe(fd: &OwnedFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, WANTED)
}

impl Inode {
    fn described(fd: OwnedFd, stat: &Statx) -> Self {
        Self { fd, kind: FileType::from_raw_mode(stat.stx_mode.into()) }
    }

    /// What lies in this folder by that name. A symbolic link is itself, and nothing is opened that could wait.
    fn find(&self, name: &CStr) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.fd, name, flags, Mode::empty())
    }
}

/// Something that was found, and that the guest was not told of yet.
pub struct Found {
    inode: Inode,
    stat: Statx,
}

impl Found {
    /// It without a number, for who opens it.
    pub fn inode(&self) -> &Inode {
        &self.inode
    }

    /// It as it is by now.
    pub fn again(self) -> Result<Self, Errno> {
        Ok(Self { stat: describe(&self.inode.fd)?, ..self })
    }
}

/// All that the guest knows. It tells what it forgets; what it does not forget is bounded.
pub struct Inodes {
    root: Arc<Inode>,
    /// What the root lies on.
    mount: u64,
    table: Mutex<Table>,
    most: usize,
    count: Gauge,
}

#[derive(Default)]
struct Table {
    known: HashMap<u64, Known>,
    numbers: HashMap<Key, u64>,
    /// The last number that was given. None is given twice.
    last: u64,
}

struct Known {
    inode: Arc<Inode>,
    key: Key,
    /// How often the guest was told of it, less what it has forgotten.
    lookups: u64,
}

impl Inodes {
    /// With `root`, and room for `most` others. `count` shows how many there are.
    ///
    /// # Errors
    /// The kernel cannot describe it.
    pub fn new(root: OwnedFd, most: usize, count: Gauge) -> Result<Self, Errno> {
        let stat = describe(&root)?;
        let root = Arc::new(Inode::described(root, &stat));
        Ok(Self { root, mount: mount_of(&stat), table: Mutex::new(Table::new()), most, count })
    }

    /// Names the descriptor that stays open when the VM confines itself.
    pub fn keep(&self, kept: &mut Kept) {
        kept.add("the root of a shared folder", &self.root.fd);
    }

    /// The file of this number.
    pub fn get(&self, node: u64) -> Result<Arc<Inode>, Errno> {
        if node == ROOT {
            return Ok(self.root.clone());
        }
        self.lock().known.get(&node).map(|known| known.inode.clone()).ok_or(Errno::STALE)
    }

    /// What lies in `folder` by this name.
    ///
    /// # Errors
    /// `EXDEV` for what is mounted there, which nobody has shared: below `/` that would be `/proc`, where this process's
    /// memory is a file.
    pub fn find(&self, folder: &Inode, name: &CStr) -> Result<Found, Errno> {
        self.describe(folder.find(name)?)
    }

    /// What `fd` names.
    ///
    /// # Errors
    /// As for [`Inodes::find`].
    pub fn describe(&self, fd: OwnedFd) -> Result<Found, Errno> {
        let stat = describe(&fd)?;
        if mount_of(&stat) != self.mount {
            return Err(Errno::XDEV);
        }
        Ok(Found { inode: Inode::described(fd, &stat), stat })
    }

    /// The number of what was found, which the guest is told of once more.
    ///
    /// # Errors
    /// `EMFILE`: the guest knows as many as it may.
    pub fn add(&self, found: Found) -> Result<(u64, Statx), Errno> {
        let Found { inode, stat } = found;
        let key = Key { device: (stat.stx_dev_major, stat.stx_dev_minor), number: stat.stx_ino };
        let mut table = self.lock();
        if let Some(node) = table.numbers.get(&key).copied()
            && let Some(known) = table.known.get_mut(&node)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok((node, stat));
        }
        if table.known.len() >= self.most {
            return Err(Errno::MFILE);
        }
        table.last += 1;
        let node = table.last;
        table.known.insert(node, Known { inode: Arc::new(inode), key, lookups: 1 });
        table.numbers.insert(key, node);
        self.count.set(table.known.len() as u64);
        Ok((node, stat))
    }

    /// The guest forgets that it was told of this so many times.
    pub fn forget(&self, node: u64, times: u64) {
        let mut table = self.lock();
        let Some(known) = table.known.get_mut(&node) else { return };
        known.lookups = known.lookups.saturating_sub(times);
        if known.lookups > 0 {
            return;
        }
        let forgotten = table.known.remove(&node);
        if let Some(known) = &forgotten {
            table.numbers.remove(&known.key);
        }
        self.count.set(table.known.len() as u64);
        // Closing may take long.
        drop(table);
        drop(forgotten);
    }

    /// The guest knows nothing any more but the root.
    pub fn clear(&self) {
        let mut table = self.lock();
        // Numbers are not given again: an old guest's must not name a new one's file.
        let last = table.last;
        let old = std::mem::replace(&mut *table, Table { last, ..Table::default() });
        self.count.set(0);
        drop(table);
        drop(old);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn new() -> Self {
        Self { last: ROOT, ..Self::default() }
    }
}
