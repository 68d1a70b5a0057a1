//! What this process's mappings take of the host's memory, as `/proc/self/smaps` tells (proc_pid_smaps(5)).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

const PIECE: usize = 64 << 10;

/// An open `/proc/self/smaps`: by the time it is read, nothing can be opened any more.
pub struct Smaps(File);

/// What mappings take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Pages of the given ranges that are there.
    pub inside: u64,
    /// Of all others, each page divided by the number of those who share it (PSS).
    pub outside: u64,
}

impl Smaps {
    /// Opens it.
    ///
    /// # Errors
    /// There is no /proc, or no descriptor left.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/smaps").map(Self)
    }

    /// What mappings take now, those in `ranges` apart from the others. One that is partly in them
    /// is: guest memory's may be one with nothing but itself, as it alone is mapped without a reserve.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&self, ranges: &[Range<u64>]) -> io::Result<Taken> {
        let mut text = Vec::new();
        let mut piece = vec![0; PIECE];
        loop {
            match self.0.read_at(&mut piece, text.len() as u64)? {
                0 => break,
                n => text.extend_from_slice(&piece[..n]),
            }
        }
        Ok(taken(&String::from_utf8_lossy(&text), ranges))
    }
}

impl AsFd for Smaps {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the mappings of a `/proc/PID/smaps` with this text take, as [`Smaps::read`] has it.
#[must_use]
pub fn taken(text: &str, ranges: &[Range<u64>]) -> Taken {
    let mut taken = Taken::default();
    let mut is_inside = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        if let Some(mapping) = range(name) {
            is_inside = ranges.iter().any(|range| range.start < mapping.end && mapping.start < range.end);
            continue;
        }
        let bytes = words.next().and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib << 10);
        match (name, is_inside) {
            // Pages of the host's pool are not in Rss.
            ("Rss:" | "Shared_Hugetlb:" | "Private_Hugetlb:", true) => taken.inside += bytes,
            ("Pss:", false) => taken.outside += bytes,
            _ => {}
        }
    }
    taken
}

/// `START-END`, how a mapping's lines begin.
fn range(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(hex(start)?..hex(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::FileOffset;
    use vm_memory::mmap::MmapRegion;

    const TEXT: &str = "55aa00-55bb00 r-xp 00000000 fd:00 17 /usr/bin/a-b
Rss:                 100 kB
Pss:                  40 kB
7f0000-7f8000 rw-p 00000000 00:00 0
Rss:                  64 kB
Pss:                  64 kB
Private_Hugetlb:    2048 kB
VmFlags: rd wr mr mw me
7fff00-7fff80 rw-p 00000000 00:00 0 [stack]
Pss:                   8 kB
";

    #[test]
    fn ranges_are_told_apart() {
        let all = taken(TEXT, std::slice::from_ref(&(0x7e_0000..0x7f_8000)));
        assert_eq!(all, Taken { inside: 2112 << 10, outside: 48 << 10 });
        assert_eq!(taken(TEXT, &[]), Taken { inside: 0, outside: 112 << 10 });
    }

    #[test]
    fn a_touched_page_is_seen() {
        let file = File::from(memfd_create("touched", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        let mapping = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 1 << 20).unwrap();
        let start = mapping.as_ptr() as u64;
        let ranges = &std::iter::once(start..start + (1 << 20)).collect::<Vec<_>>();
        let smaps = Smaps::open().unwrap();
        assert_eq!(smaps.read(ranges).unwrap().inside, 0);
        for page in 0..3 {
            // SAFETY: the mapping is that long, writable, and nobody else's.
            unsafe { mapping.as_ptr().wrapping_add(page * 4096).write_volatile(1) };
        }
        let taken = smaps.read(ranges).unwrap();
        assert!(taken.inside == 3 << 12 && taken.outside > 1 << 12, "{taken:?}");
    }
}
