//! Reading and writing a file from pieces of memory that another party, the guest, may change at any moment.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};

/// Memory that a [`Buffers`] may point into.
///
/// # Safety
/// While a value of the type lives, every address that [`Pinned::address`] gave stays mapped for reading and writing,
/// and Rust has no reference to the bytes: they may change at any moment.
pub unsafe trait Pinned: Send {
    /// The host address of `len` bytes at guest address `at`; `None` where they are not in one piece of memory.
    fn address(&self, at: u64, len: usize) -> Option<*mut u8>;
}

/// Zeros, to be written where a file cannot be told to have some.
static ZEROS: [u8; ZEROS_LEN] = [0; ZEROS_LEN];
const ZEROS_LEN: usize = 64 << 10;
/// The most pieces of zeros in one write: 1 MiB, so that no single call takes long.
const ZEROS_PIECES: usize = 16;

/// Pieces of memory, and what keeps them mapped.
pub struct Buffers<M> {
    /// Those before `first` are done with.
    pieces: Vec<libc::iovec>,
    first: usize,
    memory: Option<M>,
}

// SAFETY: the addresses in it belong to no thread; the memory behind them is held by `memory`, which is `Send`, or is
// static. Only the kernel touches the bytes.
unsafe impl<M: Send> Send for Buffers<M> {}

impl<M: Pinned> Buffers<M> {
    /// No memory at all.
    #[must_use]
    pub fn empty() -> Self {
        Self { pieces: Vec::new(), first: 0, memory: None }
    }

    /// Pieces of `memory`, by address and length; `None` where one is not there.
    pub fn new(memory: M, pieces: impl Iterator<Item = (u64, u32)>) -> Option<Self> {
        let piece = |(at, len): (u64, u32)| {
            let address = memory.address(at, len as usize)?;
            Some(libc::iovec { iov_base: address.cast(), iov_len: len as usize })
        };
        let pieces = pieces.map(piece).collect::<Option<_>>()?;
        Some(Self { pieces, first: 0, memory: Some(memory) })
    }

    /// Up to `len` zeros, for writing only: as many as one call should take.
    #[must_use]
    pub fn zeros(len: u64) -> Self {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS_LEN * ZEROS_PIECES);
        let mut pieces = Vec::new();
        while left > 0 {
            let iov_len = left.min(ZEROS_LEN);
            pieces.push(libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len });
            left -= iov_len;
        }
        Self { pieces, first: 0, memory: None }
    }

    /// Whether the kernel may write to it: guest memory it may, the zeros it may not.
    fn is_writable(&self) -> bool {
        self.memory.is_some() || self.pieces.is_empty()
    }

    fn left(&self) -> &[libc::iovec] {
        &self.pieces[self.first..]
    }

    /// Bytes that are left.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        self.left().iter().map(|p| p.iov_len as u64).sum()
    }

    /// Whether each piece that is left starts at a multiple of `alignment` and is as long.
    #[must_use]
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.left().iter().all(|p| (p.iov_base as usize | p.iov_len).is_multiple_of(alignment))
    }

    /// Leaves out the first `count` bytes, which are done with.
    pub fn advance(&mut self, mut count: usize) {
        while let Some(piece) = self.pieces.get_mut(self.first) {
            let done = count.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(done).cast();
            piece.iov_len -= done;
            count -= done;
            if piece.iov_len > 0 {
                return;
            }
            self.first += 1;
        }
    }
}

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Into the buffers.
    Read,
    /// From the buffers.
    Write {
        /// It is on the disk when the call returns.
        durable: bool,
    },
    /// What was written before is on the disk when the call returns.
    Sync,
    /// So many bytes are freed, and read as zeros.
    PunchHole(u64),
    /// So many bytes read as zeros, and stay allocated.
    ZeroRange(u64),
}

/// One thing to be done to a file, by a system call or by io_uring.
pub struct Operation<M> {
    /// What the caller knows it by.
    pub tag: u16,
    /// The file.
    pub file: Arc<File>,
    /// What is done.
    pub action: Action,
    /// Where in the file.
    pub offset: u64,
    /// What is read or written.
    pub buffers: Buffers<M>,
}

impl<M: Pinned> Operation<M> {
    /// Does it by a system call, once. How many bytes were read or written may be fewer than asked for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn perform(&self) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        let (address, count) = self.pieces();
        // 2⁶³ and above is refused by the kernel.
        let offset = self.offset as i64;
        let moved = match self.action {
            Action::Read if !self.buffers.is_writable() => return Err(io::ErrorKind::InvalidInput.into()),
            // SAFETY: each piece is mapped as long as `self.buffers` lives, which is borrowed; the bytes are the
            // guest's, to which Rust has no reference.
            Action::Read => unsafe { libc::preadv2(fd, address, count, offset, 0) },
            // SAFETY: as above; nothing is written to memory.
            Action::Write { durable } => unsafe {
                libc::pwritev2(fd, address, count, offset, write_flags(durable))
            },
            Action::Sync => return Ok(fdatasync(&self.file).map(|()| 0)?),
            Action::PunchHole(len) | Action::ZeroRange(len) => {
                return Ok(fallocate(&self.file, self.fallocate_flags(), self.offset, len).map(|()| 0)?);
            }
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// The pieces that are left, as system calls take them.
    pub(super) fn pieces(&self) -> (*const libc::iovec, i32) {
        let left = self.buffers.left();
        (left.as_ptr(), left.len().min(libc::UIO_MAXIOV as usize) as i32)
    }

    /// Whether the kernel would write to what may only be read.
    pub(super) fn is_harmful(&self) -> bool {
        self.action == Action::Read && !self.buffers.is_writable()
    }

    pub(super) fn fallocate_flags(&self) -> FallocateFlags {
        let kind = match self.action {
            Action::PunchHole(_) => FallocateFlags::PUNCH_HOLE,
            _ => FallocateFlags::ZERO_RANGE,
        };
        // The file never grows.
        kind | FallocateFlags::KEEP_SIZE
    }
}

pub(super) fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}
