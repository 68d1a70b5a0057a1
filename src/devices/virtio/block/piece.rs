//! One file of a disk: opened, locked and measured.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::{
    AtFlags, FallocateFlags, FlockOperation, OFlags, StatxFlags, fallocate, fcntl_getfl, fcntl_setfl, flock,
    ioctl_blkpbszget, ioctl_blksszget, statx,
};
use rustix::io::Errno;

use crate::config::DiskConfig;
use crate::sandbox::Kept;
use crate::sys::file_io::{Action, Operation, Pinned};

use super::SECTOR;
use super::image::ImageError;

/// What files are read and written by where the kernel does not tell (Linux before 6.1): a page suits every disk.
const SAFE_ALIGNMENT: u32 = 4096;
/// The last operations of a VM that was killed hold the lock on its image some milliseconds longer than there is a
/// process: io_uring ends them in the background. Whoever starts the VM again at once waits for that.
const LOCK_LIMIT: Duration = Duration::from_millis(500);
const DIRECT: i32 = OFlags::DIRECT.bits() as i32;
const NONBLOCK: i32 = OFlags::NONBLOCK.bits() as i32;

/// An open file. The lock on it goes with the last clone of `file`.
pub struct Piece {
    /// By way of the page cache.
    file: Arc<File>,
    /// Round it, and what that asks of memory and of offsets.
    direct: Option<(Arc<File>, Alignment)>,
    /// Its length in bytes.
    pub len: u64,
    /// Ranges of it can be freed.
    pub can_discard: bool,
    /// What it has to be read and written by: 512, or the block device's.
    pub logical_block: u32,
    /// What it had better be read and written by.
    pub physical_block: u32,
}

#[derive(Clone, Copy, Debug)]
struct Alignment {
    memory: u32,
    offset: u32,
}

impl Piece {
    /// Names the descriptors that stay open when the VM confines itself.
    pub fn keep(&self, kept: &mut Kept) {
        kept.add("a disk's image", &*self.file);
        if let Some((file, _)) = &self.direct {
            kept.add("a disk's image, round the cache", &**file);
        }
    }

    /// Opens and locks `path`, as the disk of `config` needs it.
    ///
    /// # Errors
    /// It is no image, or not for us.
    pub fn open(path: &Path, config: &DiskConfig) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Open { path: path.into(), source };
        let mut file = open(path, config, 0)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::NotADisk(path.into()));
        }
        lock(&file, path, config)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        check_len(path, len, config)?;
        let direct = if config.direct { Some(open_direct(path, config)?) } else { None };
        let wanted = direct.as_ref().map_or(SECTOR as u32, |(_, alignment)| alignment.offset);
        let (logical_block, physical_block) = match kind.is_block_device() {
            true => block_sizes(&file),
            false => (SECTOR as u32, wanted.max(SECTOR as u32)),
        };
        Ok(Self {
            can_discard: !config.readonly && can_punch(&file, len),
            file: Arc::new(file),
            direct,
            len,
            logical_block,
            physical_block,
        })
    }

    /// The file by which an operation is done: what is not aligned as the disk asks goes by way of the page cache,
    /// which the kernel keeps equal to the disk.
    pub fn file_for<M: Pinned>(&self, operation: &Operation<M>) -> &Arc<File> {
        let moves_data = matches!(operation.action, Action::Read | Action::Write { .. });
        match &self.direct {
            Some((file, alignment)) if moves_data && alignment.suits(operation) => file,
            _ => &self.file,
        }
    }

    /// Puts a file in place that fails as a test wants it.
    #[cfg(test)]
    pub fn replace_file(&mut self, file: File) {
        self.file = Arc::new(file);
    }

    /// The file by way of the page cache, which takes any alignment.
    pub fn buffered(&self) -> &Arc<File> {
        &self.file
    }
}

impl Alignment {
    fn suits<M: Pinned>(self, operation: &Operation<M>) -> bool {
        let offset = u64::from(self.offset);
        operation.offset.is_multiple_of(offset)
            && operation.buffers.len().is_multiple_of(offset)
            && operation.buffers.is_aligned(self.memory as usize)
    }
}

/// Opens without waiting for anybody, as a pipe would.
fn open(path: &Path, config: &DiskConfig, flags: i32) -> Result<File, ImageError> {
    let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags | NONBLOCK).open(path);
    let file = open(!config.readonly).map_err(|source| {
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::ISDIR) => ImageError::NotADisk(path.into()),
            Some(Errno::INVAL) if flags & DIRECT != 0 => ImageError::NoDirect { path: path.into(), source },
            Some(Errno::ACCESS | Errno::ROFS | Errno::PERM) if !config.readonly && open(false).is_ok() => {
                ImageError::NotWritable { path: path.into(), source }
            }
            _ => ImageError::Open { path: path.into(), source },
        }
    })?;
    // Reads and writes may wait.
    let blocking = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK));
    blocking.map_err(|e| ImageError::Open { path: path.into(), source: e.into() })?;
    Ok(file)
}

/// For writing alone, for reading with others that read. The lock belongs to the open file, so it holds within a
/// process, too, and ends with it however that ends.
fn lock(file: &File, path: &Path, config: &DiskConfig) -> Result<(), ImageError> {
    let (at_once, in_time) = match config.readonly {
        true => (FlockOperation::NonBlockingLockShared, FlockOperation::LockShared),
        false => (FlockOperation::NonBlockingLockExclusive, FlockOperation::LockExclusive),
    };
    flock(file, at_once).or_else(|e| match e {
        Errno::WOULDBLOCK if is_locked_in_time(file, in_time) => Ok(()),
        Errno::WOULDBLOCK => Err(ImageError::Locked(path.into())),
        other => Err(ImageError::Lock { path: path.into(), source: other.into() }),
    })
}

/// Waits for a lock as long as one is held by a VM that was killed. A thread does, which nothing but the lock ends:
/// where it does not come in time, this process is about to end.
fn is_locked_in_time(file: &File, operation: FlockOperation) -> bool {
    // The same open file, to which the lock belongs.
    let Ok(same) = file.try_clone() else { return false };
    let (sender, locked) = mpsc::channel();
    let waiter = thread::Builder::new().name("lock".into()).spawn(move || {
        let result = flock(&same, operation);
        drop(same);
        let _ = sender.send(result);
    });
    // No thread is left when the process confines itself.
    let has_lock = |_: &_| locked.recv_timeout(LOCK_LIMIT) == Ok(Ok(()));
    waiter.ok().filter(has_lock).is_some_and(|waiter| waiter.join().is_ok())
}

fn check_len(path: &Path, len: u64, config: &DiskConfig) -> Result<(), ImageError> {
    if len < SECTOR {
        return Err(ImageError::TooSmall { path: path.into(), len });
    }
    if !len.is_multiple_of(SECTOR) {
        if !config.more.is_empty() {
            return Err(ImageError::Ragged { path: path.into(), len });
        }
        log::warn!(
            "--disk {}: its last {} bytes are no whole sector of 512, and the guest does not see them",
            path.display(),
            len % SECTOR
        );
    }
    Ok(())
}

fn open_direct(path: &Path, config: &DiskConfig) -> Result<(Arc<File>, Alignment), ImageError> {
    let file = open(path, config, DIRECT)?;
    let told = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let told = told.ok().filter(|s| s.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let alignment = match told {
        // The kernel says 0 where there is none, though opening worked.
        Some(s) if s.stx_dio_offset_align == 0 => {
            let source = io::Error::from(Errno::INVAL);
            return Err(ImageError::NoDirect { path: path.into(), source });
        }
        Some(s) => Alignment { memory: s.stx_dio_mem_align.max(1), offset: s.stx_dio_offset_align },
        None => Alignment { memory: SAFE_ALIGNMENT, offset: SAFE_ALIGNMENT },
    };
    Ok((Arc::new(file), alignment))
}

/// Logical and physical block size of a block device.
fn block_sizes(file: &File) -> (u32, u32) {
    let logical = ioctl_blksszget(file).unwrap_or(SECTOR as u32);
    (logical, ioctl_blkpbszget(file).unwrap_or(logical))
}

/// Whether ranges can be freed. Asked by freeing one behind the end, where there is nothing.
fn can_punch(file: &File, len: u64) -> bool {
    let behind = len.next_multiple_of(4096);
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    !matches!(fallocate(file, flags, behind, 4096), Err(Errno::OPNOTSUPP | Errno::NOSYS))
}
