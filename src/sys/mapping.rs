//! Anonymous memory that huge pages fit, and files mapped into it.

use std::fs::File;
use std::io;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// What the processor and the kernel can map as one huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Private anonymous memory, aligned to 2 MiB.
///
/// Guest-physical memory starts at a multiple of that, too, so KVM can map a huge page of the host as one of the
/// guest: a fault for 512 pages instead of one each. Whether there are any is the host's choice
/// (`/sys/kernel/mm/transparent_hugepage/enabled`).
pub struct Mapping {
    address: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; access to its bytes is up to whoever has the address.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives no access to the bytes by itself.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes; pages come when they are touched.
    ///
    /// # Errors
    /// The address space is full.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let room = len.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), room, prot, flags) }?.cast::<u8>();
        let before = start.align_offset(HUGE_PAGE);
        let address = start.wrapping_add(before);
        let after = room - before - len;
        if before > 0 {
            // SAFETY: the part of our own mapping that lies before the aligned address; nobody knows of it yet.
            unsafe { munmap(start.cast(), before) }?;
        }
        if after > 0 {
            // SAFETY: the part of our own mapping behind the `len` bytes; nobody knows of it yet.
            unsafe { munmap(address.wrapping_add(len).cast(), after) }?;
        }
        Ok(Self { address, len })
    }

    /// The first byte.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Its length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Puts whole pages of `file` from `offset` in place of `len` bytes at `at`, privately.
    ///
    /// # Errors
    /// They do not lie in the mapping, or the kernel refuses.
    pub fn replace(&self, at: usize, len: usize, file: &File, offset: u64) -> io::Result<()> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let place = self.address.wrapping_add(at).cast();
        // SAFETY: the place lies in our own private mapping, checked above; the new one has the same protection, so
        // every pointer into it stays as valid as it was, and `drop` unmaps both.
        unsafe { mmap(place, len, ProtFlags::READ | ProtFlags::WRITE, flags, file, offset) }?;
        Ok(())
    }

    /// Gives whole pages back to the host. They read as zeros afterwards, or as the file that [`Mapping::replace`] put
    /// there, which is private and stays as it is.
    ///
    /// # Errors
    /// They do not lie in the mapping, or the kernel refuses.
    pub fn discard(&self, at: usize, len: usize) -> io::Result<()> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = self.address.wrapping_add(at).cast();
        // SAFETY: the pages lie in our own private mapping, checked above, and stay mapped: no pointer into them
        // dangles. That bytes change under whoever reads them is what guest memory is.
        unsafe { madvise(place, len, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is our own mapping; who holds its address promised to drop it first.
        let _ = unsafe { munmap(self.address.cast(), self.len) };
    }
}

/// Copies from an address of our own that may turn out not to be readable.
///
/// # Errors
/// It is not.
pub fn peek(from: *const u8, bytes: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: bytes.len() };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel writes to `bytes` alone, which is borrowed, and checks the other address itself.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(n) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_for_huge_pages() {
        for len in [4096, HUGE_PAGE, HUGE_PAGE + 4096] {
            assert_eq!(Mapping::anonymous(len).unwrap().address() as usize % HUGE_PAGE, 0);
        }
    }

    #[test]
    fn a_page_that_is_gone_can_be_peeked_at() {
        let mapping = Mapping::anonymous(8192).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        mapping.replace(0, 8192, &file, 0).unwrap();
        file.set_len(4096).unwrap();
        let mut bytes = [1; 16];
        peek(mapping.address(), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 16]);
        assert!(peek(mapping.address().wrapping_add(4096), &mut bytes).is_err());
    }

    #[test]
    fn discarded_pages_lie_in_the_mapping() {
        let mapping = Mapping::anonymous(8192).unwrap();
        mapping.discard(4096, 4096).unwrap();
        assert!(mapping.discard(4096, 8192).is_err());
        assert!(mapping.discard(usize::MAX, 2).is_err());
    }

    #[test]
    fn a_file_cannot_reach_over_the_end() {
        let mapping = Mapping::anonymous(8192).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(mapping.replace(4096, 8192, &file, 0).is_err());
        assert!(mapping.replace(usize::MAX, 2, &file, 0).is_err());
    }
}
