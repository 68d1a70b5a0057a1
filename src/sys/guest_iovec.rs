//! Reading into and writing from guest memory by one system call, without a copy of ours.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// The most pieces that the kernel takes at once (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// A list of pieces, kept from call to call so that none allocates. It is filled and used within one call.
#[derive(Default)]
pub struct GuestIovecs(Vec<libc::iovec>);

// SAFETY: the pointers are used in the call that puts them in alone; between calls they are only overwritten.
unsafe impl Send for GuestIovecs {}

impl GuestIovecs {
    /// Writes `before` and then these pieces of guest memory. Fails with `EINVAL` for more than [`MAX_PIECES`].
    ///
    /// # Errors
    /// The kernel's, or a piece lies outside of guest memory (`EFAULT`).
    pub fn write(
        &mut self,
        fd: BorrowedFd<'_>,
        before: &[u8],
        memory: &GuestMemoryMmap,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
    ) -> io::Result<usize> {
        self.0.clear();
        self.push(before.as_ptr().cast_mut(), before.len());
        self.push_guest(memory, pieces)?;
        let count = libc::c_int::try_from(self.0.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: each piece is `before`, which is borrowed, or lies in guest memory, which is borrowed and mapped;
        // the kernel only reads them. What the guest writes meanwhile is the kernel's to read in whatever state.
        let n = unsafe { libc::writev(fd.as_raw_fd(), self.0.as_ptr(), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Reads into these pieces of guest memory, and what does not fit there into `after`.
    ///
    /// # Errors
    /// As for [`GuestIovecs::write`].
    pub fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        memory: &GuestMemoryMmap,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
        after: &mut [u8],
    ) -> io::Result<usize> {
        self.0.clear();
        self.push_guest(memory, pieces)?;
        self.push(after.as_mut_ptr(), after.len());
        let count = libc::c_int::try_from(self.0.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: each piece is `after`, which is borrowed for writing, or lies in guest memory, which is borrowed,
        // mapped, and accessed by no reference of Rust's.
        let n = unsafe { libc::readv(fd.as_raw_fd(), self.0.as_ptr(), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        if len > 0 {
            self.0.push(libc::iovec { iov_base: start.cast(), iov_len: len });
        }
    }

    fn push_guest(
        &mut self,
        memory: &GuestMemoryMmap,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
    ) -> io::Result<()> {
        let outside = |_: GuestMemoryError| io::Error::from_raw_os_error(libc::EFAULT);
        for (address, len) in pieces {
            let slice = memory.get_slice(address, len as usize).map_err(outside)?;
            self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn pieces_are_read_and_written_in_order() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        let mut list = GuestIovecs::default();
        memory.write_slice(b"worldhello ", GuestAddress(0)).unwrap();
        let pieces = [(GuestAddress(5), 6), (GuestAddress(0), 5)];
        assert_eq!(list.write(a.as_fd(), b"> ", &memory, pieces.into_iter()).unwrap(), 13);
        let mut after = [0; 16];
        let room = [(GuestAddress(4096), 3), (GuestAddress(5000), 2)];
        assert_eq!(list.read(b.as_fd(), &memory, room.into_iter(), &mut after).unwrap(), 13);
        assert_eq!(&after[..8], b"lo world");
        let mut bytes = [0; 2];
        memory.read_slice(&mut bytes, GuestAddress(5000)).unwrap();
        assert_eq!(&bytes, b"el");
    }

    #[test]
    fn what_lies_outside_of_memory_is_refused() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let (a, _b) = UnixStream::pair().unwrap();
        let pieces = [(GuestAddress(8191), 2)];
        let error = GuestIovecs::default().write(a.as_fd(), &[], &memory, pieces.into_iter()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
