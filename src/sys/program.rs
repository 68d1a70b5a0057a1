//! The pages of this program itself.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::slice;

use rustix::mm::{Advice, madvise};

/// What the program's file is mapped in.
const PAGE: u64 = 4096;

/// The pages of the program's code and constants.
pub struct Code(Vec<Segment>);

struct Segment {
    start: u64,
    end: u64,
}

impl Code {
    /// Finds them. `None` where one of them is not the file's own: a debugger's breakpoint and a probe make copies, and a
    /// program that another one has put into memory never had a file. What would come back is not what is there.
    #[must_use]
    pub fn of_program() -> Option<Self> {
        let mut segments = Vec::new();
        // SAFETY: the callback has the signature that is asked for, and its data is the list, which outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(find_segments), (&raw mut segments).cast()) };
        let are_files = || {
            let pagemap = File::open("/proc/self/pagemap")?;
            segments
                .iter()
                .try_fold(true, |all, segment| Ok::<_, io::Error>(all && is_file(&pagemap, segment)?))
        };
        are_files().unwrap_or(false).then_some(Self(segments))
    }

    /// Unmaps them. They come back from the page cache one by one as they are used. After a start that is worth it:
    /// reading a command line and building a VM takes most of the code, running one takes little.
    ///
    /// The kernel keeps the file's pages as long as it likes, as it does for every file that was read; none of them
    /// counts as this process's any more. Where the kernel refuses (`mlockall`), they stay.
    pub fn release(self) {
        for Segment { start, end } in self.0 {
            // SAFETY: the pages are a private mapping of the program's file that was never writable, without copies of
            // its own: what comes back on the next access is what is there now. The last page of a segment belongs to
            // no other, as each is mapped with rights of its own.
            let _ = unsafe { madvise(start as *mut c_void, (end - start) as usize, Advice::LinuxDontNeed) };
        }
    }
}

/// Whether all pages that are there are the file's (`pagemap`, Linux' admin-guide/mm/pagemap.rst).
fn is_file(pagemap: &File, segment: &Segment) -> io::Result<bool> {
    const SWAPPED_OR_PRESENT: u64 = 0b11 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let mut entries = vec![0; ((segment.end - segment.start) / PAGE * 8) as usize];
    pagemap.read_exact_at(&mut entries, segment.start / PAGE * 8)?;
    let is_file = |entry: u64| entry & SWAPPED_OR_PRESENT == 0 || entry & OF_A_FILE != 0;
    let entries = entries.chunks_exact(8).map(|raw| raw.try_into().map_or(0, u64::from_ne_bytes));
    Ok(entries.into_iter().all(is_file))
}

/// Called for the program itself, which comes first, and not for libraries: those have relocations in pages of their own.
unsafe extern "C" fn find_segments(
    info: *mut libc::dl_phdr_info,
    _len: usize,
    data: *mut c_void,
) -> libc::c_int {
    // SAFETY: `of_program` hands over its list, which nobody else has meanwhile.
    let segments = unsafe { &mut *data.cast::<Vec<Segment>>() };
    // SAFETY: libc hands over a structure that lives until we return.
    let info = unsafe { &*info };
    // SAFETY: as many program headers as it says, which lie in the program's own first page.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let never_written = headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0);
    segments.extend(never_written.map(|header| {
        let start = info.dlpi_addr + header.p_vaddr;
        Segment { start: start & !(PAGE - 1), end: (start + header.p_memsz).next_multiple_of(PAGE) }
    }));
    1
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    /// So large that what the kernel maps around a fault elsewhere does not reach its middle.
    static CONSTANT: [u8; 1 << 20] = [7; 1 << 20];

    fn is_mapped(address: u64) -> bool {
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, address / PAGE * 8).unwrap();
        u64::from_ne_bytes(entry) >> 63 == 1
    }

    fn sum() -> u64 {
        black_box(&CONSTANT).iter().map(|b| u64::from(*b)).sum()
    }

    #[test]
    fn released_pages_come_back_as_they_were_and_changed_ones_are_not_released() {
        let middle = &raw const CONSTANT[CONSTANT.len() / 2] as u64;
        assert_eq!(sum(), 7 << 20);
        assert!(is_mapped(middle));
        Code::of_program().unwrap().release();
        assert!(!is_mapped(middle));
        assert_eq!(sum(), 7 << 20);

        // As a debugger does: a copy of the page, of this process alone.
        let memory = File::options().write(true).open("/proc/self/mem").unwrap();
        memory.write_all_at(&[8], middle).unwrap();
        assert!(Code::of_program().is_none(), "what was changed would be lost");
        assert_eq!(sum(), (7 << 20) + 1);
    }
}
