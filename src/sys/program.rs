//! The pages of this program itself.

use std::ffi::c_void;
use std::slice;

use rustix::mm::{Advice, madvise};

/// What the program's file is mapped in.
const PAGE: u64 = 4096;

/// Unmaps the pages of the program's code and constants, which come back from the page cache one by one as they are
/// used. After a start that is worth it: reading a command line and building a VM takes most of the code, running one
/// takes little.
///
/// The kernel keeps the file's pages as long as it likes, as it does for every file that was read; none of them counts
/// as this process's any more. Where the kernel refuses (`mlockall`), they stay.
pub fn release_code() {
    // SAFETY: the callback has the signature that is asked for, and no data.
    unsafe { libc::dl_iterate_phdr(Some(release_segments), std::ptr::null_mut()) };
}

/// Called for the program itself, which comes first, and not for libraries: those have relocations in pages of their own.
unsafe extern "C" fn release_segments(
    info: *mut libc::dl_phdr_info,
    _len: usize,
    _data: *mut c_void,
) -> libc::c_int {
    // SAFETY: libc hands over a structure that lives until we return.
    let info = unsafe { &*info };
    // SAFETY: as many program headers as it says, which lie in the program's own first page.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let start = (info.dlpi_addr + header.p_vaddr) & !(PAGE - 1);
        let end = info.dlpi_addr + header.p_vaddr + header.p_memsz;
        // SAFETY: the pages are a private mapping of the program's file, which was never writable: what comes back on
        // the next access is what is there now. The last page of a segment belongs to no other, as each is mapped with
        // rights of its own.
        let _ = unsafe { madvise(start as *mut c_void, (end - start) as usize, Advice::LinuxDontNeed) };
    }
    1
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::hint::black_box;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// So large that what the kernel maps around a fault elsewhere does not reach its middle.
    static CONSTANT: [u8; 1 << 20] = [7; 1 << 20];

    /// `/proc/self/pagemap`, bit 63: the page is mapped.
    fn is_mapped(address: *const u8) -> bool {
        let mut entry = [0; 8];
        let place = address as u64 / PAGE * 8;
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, place).unwrap();
        u64::from_ne_bytes(entry) >> 63 == 1
    }

    #[test]
    fn released_pages_are_gone_and_come_back_as_they_were() {
        let middle = &raw const CONSTANT[CONSTANT.len() / 2];
        let sum = || black_box(&CONSTANT).iter().map(|b| u64::from(*b)).sum::<u64>();
        assert_eq!(sum(), 7 << 20);
        assert!(is_mapped(middle));
        release_code();
        assert!(!is_mapped(middle));
        assert_eq!(sum(), 7 << 20);
    }
}
