//! Guest memory: mapping it, and putting files into it without reading them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate};
use thiserror::Error;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use crate::arch::x86_64::memory_map::ram_ranges;
use crate::config::{Backing, HugePages, MemoryConfig, Size};
use crate::sandbox::Kept;
use crate::sys::file_io::Pinned;
use crate::sys::mapping::{self, Mapping};

const PAGE: u64 = 4096;
const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Guest memory could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// More than the machine has.
    #[error("--memory {asked}: this host has {host} of memory and swap: ask for less")]
    MoreThanHost {
        /// What was asked for.
        asked: Size,
        /// What the host has, in MiB.
        host: Size,
    },
    /// The pool of huge pages is too small.
    #[error(
        "--memory hugepages={page}: the host has not {count} free huge pages of that size: reserve them \
         (echo {count} | sudo tee /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages) or leave the option out"
    )]
    NoHugePages {
        /// Size of a page.
        page: Size,
        /// Pages that the guest needs.
        count: u64,
        /// Size of a page in KiB.
        kib: u64,
    },
    /// The kernel refused the memfd.
    #[error("no memfd for guest memory")]
    Memfd(#[source] io::Error),
    /// The kernel refused the mapping.
    #[error("--memory {size}: guest memory cannot be mapped: ask for less")]
    Map {
        /// What was asked for.
        size: Size,
        /// The reason.
        #[source]
        source: MmapRegionError,
    },
    /// The regions contradict each other.
    #[error("guest memory cannot be put together")]
    Regions,
}

/// A file could not be put into guest memory.
#[derive(Debug, Error)]
pub enum LoadError {
    /// No such guest memory.
    #[error("it does not fit guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The file changed or its disk failed.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// The kernel refused to map it.
    #[error("it cannot be mapped")]
    Map(#[source] io::Error),
}

/// How many bytes of a file came into guest memory which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Mapped: read by nobody until the guest touches them, and shared with other VMs until it writes.
    pub mapped: u64,
    /// Copied, because guest address and file offset lie differently in their pages, or not on whole ones.
    pub copied: u64,
}

/// The guest's memory. Clones share it; it is unmapped with the last one.
#[derive(Clone)]
pub struct Memory(Arc<Inner>);

/// Dropped in this order: what points into the mappings goes before them.
struct Inner {
    guest: GuestMemoryMmap,
    /// The anonymous mappings behind `guest`, which does not own these. Files can be mapped over them.
    anonymous: Vec<Mapping>,
    /// Its pages come from the host's pool, where they are reserved.
    is_huge: bool,
}

impl Memory {
    /// Maps guest memory; pages come when they are touched.
    ///
    /// # Errors
    /// More than the host has, or not enough huge pages.
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        check_host_memory(config.size)?;
        let file = match config.backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(memfd(config)?),
        };
        let mut regions = Vec::new();
        let mut anonymous = Vec::new();
        let mut offset = 0;
        for (start, len) in ram_ranges(config.size.0) {
            let region = if let Some(file) = &file {
                let file = FileOffset::new(file.try_clone().map_err(MemoryError::Memfd)?, offset);
                map_shared(config, len, file)?
            } else if let Some(pages) = config.hugepages {
                map_huge(config, len, pages)?
            } else {
                let mapping = Mapping::anonymous(len as usize)
                    .map_err(|source| map_error(config, MmapRegionError::Mmap(source)))?;
                let region = raw_region(&mapping).map_err(|source| map_error(config, source))?;
                anonymous.push(mapping);
                region
            };
            regions.push(GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Regions)?);
            offset += len;
        }
        let guest = GuestMemoryMmap::from_regions(regions).map_err(|_| MemoryError::Regions)?;
        Ok(Self(Arc::new(Inner { guest, anonymous, is_huge: config.hugepages.is_some() })))
    }

    /// Puts its descriptors on the list of those that stay open.
    pub fn keep(&self, kept: &mut Kept) {
        let files = self.0.guest.iter().filter_map(GuestMemoryRegion::file_offset);
        files.for_each(|file| kept.add("guest memory", file.file()));
    }

    /// Where it is mapped in this process.
    #[must_use]
    pub fn host_ranges(&self) -> Vec<Range<u64>> {
        let range = |region: &GuestRegionMmap| {
            let start = region.as_ptr() as u64;
            start..start + region.len()
        };
        self.0.guest.iter().map(range).collect()
    }

    /// The memory as devices see it.
    #[must_use]
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.0.guest
    }

    /// Puts `len` bytes of `file` from `offset` at guest address `at`. With `map`, whole pages are mapped where both
    /// lie alike in their pages and memory is private and of ordinary pages; the rest is copied. Whatever was there is
    /// replaced.
    ///
    /// The caller has checked that the file is that long. A file that is cut short while a VM runs takes mapped pages
    /// away from its guest, and ends it with an error; it does no harm to another VM.
    ///
    /// # Errors
    /// No such guest memory, or the file fails.
    pub fn load(&self, file: &File, offset: u64, at: u64, len: u64, map: bool) -> Result<Loaded, LoadError> {
        let first = at.next_multiple_of(PAGE).min(at + len);
        let alike = map && self.is_mappable() && at % PAGE == offset % PAGE;
        let whole = if alike { (at + len - first) / PAGE * PAGE } else { 0 };
        if whole == 0 {
            self.copy(file, offset, at, len)?;
            return Ok(Loaded { mapped: 0, copied: len });
        }
        let (head, tail) = (first - at, at + len - first - whole);
        self.copy(file, offset, at, head)?;
        self.map_over(file, offset + head, first, whole)?;
        self.copy(file, offset + head + whole, first + whole, tail)?;
        Ok(Loaded { mapped: whole, copied: head + tail })
    }

    /// Reads straight into guest memory.
    fn copy(&self, mut file: &File, offset: u64, at: u64, len: u64) -> Result<(), LoadError> {
        file.seek(SeekFrom::Start(offset)).map_err(LoadError::Read)?;
        let len =
            usize::try_from(len).map_err(|_| GuestMemoryError::InvalidGuestAddress(GuestAddress(at)))?;
        self.0.guest.read_exact_volatile_from(GuestAddress(at), &mut file, len).map_err(|e| match e {
            GuestMemoryError::IOError(source) => LoadError::Read(source),
            other => other.into(),
        })
    }

    /// Reads through the kernel, which answers with an error where a mapped file has been cut short; touching such a
    /// page would end the process (SIGBUS). Not for what is read often.
    #[must_use]
    pub fn peek(&self, at: GuestAddress, bytes: &mut [u8]) -> Option<()> {
        let slice = self.0.guest.get_slice(at, bytes.len()).ok()?;
        mapping::peek(slice.ptr_guard().as_ptr(), bytes).ok()
    }

    /// Gives the whole pages in `at..at + len` back to the host; the guest finds new ones when it touches them. What is
    /// no guest memory is left out, so the range may be any. Does nothing where memory is of huge pages: the guest would
    /// die when it touches one that another process took from the pool meanwhile.
    ///
    /// # Errors
    /// The host refuses.
    pub fn release(&self, at: u64, len: u64) -> io::Result<()> {
        let first = at.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let end = at.saturating_add(len) / PAGE * PAGE;
        for (index, region) in self.0.guest.iter().enumerate().filter(|_| !self.0.is_huge) {
            // No further than the region: what lies behind it in a file is another region's.
            let start = region.start_addr().0;
            let (first, end) = (first.max(start), end.min(start + region.len()));
            if first < end {
                self.release_in(index, region, first - start, end - first)?;
            }
        }
        Ok(())
    }

    fn release_in(&self, index: usize, region: &GuestRegionMmap, at: u64, len: u64) -> io::Result<()> {
        if let Some(file) = region.file_offset() {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            return Ok(fallocate(file.file(), mode, file.start() + at, len)?);
        }
        match self.0.anonymous.get(index) {
            Some(mapping) => mapping.discard(at as usize, len as usize),
            None => Ok(()),
        }
    }

    /// Files can be mapped over private memory of ordinary pages.
    fn is_mappable(&self) -> bool {
        !self.0.anonymous.is_empty()
    }

    /// Maps whole pages of `file` privately in place of the guest's anonymous ones.
    fn map_over(&self, file: &File, offset: u64, at: u64, len: u64) -> Result<(), LoadError> {
        let outside = || GuestMemoryError::InvalidGuestAddress(GuestAddress(at));
        let regions = self.0.guest.iter().zip(&self.0.anonymous);
        let (region, mapping) =
            regions.filter(|(region, _)| region.start_addr().0 <= at).last().ok_or_else(outside)?;
        let inside = at - region.start_addr().0;
        if inside.checked_add(len).is_none_or(|end| end > region.len()) {
            return Err(outside().into());
        }
        mapping.replace(inside as usize, len as usize, file, offset).map_err(LoadError::Map)
    }
}

// SAFETY: regions are never unmapped or replaced by another kind of memory while a clone of `Memory` lives (a file that
// is mapped over a part keeps it mapped with the same protection), and guest memory is only reached by raw pointers.
unsafe impl Pinned for Memory {
    fn address(&self, at: u64, len: usize) -> Option<*mut u8> {
        let slice = self.guest().get_slice(GuestAddress(at), len).ok()?;
        Some(slice.ptr_guard_mut().as_ptr())
    }
}

/// A region over a mapping that it does not own.
fn raw_region(mapping: &Mapping) -> Result<MmapRegion, MmapRegionError> {
    // SAFETY: the mapping is that long, with this protection, and lives in the same `Inner` as the region, which is
    // dropped first and is never handed out but by reference.
    unsafe {
        MmapRegion::build_raw(mapping.address(), mapping.len(), PROT, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
    }
}

/// Huge pages are reserved at once: a guest would die when it touches one that the pool lacks.
fn map_huge(config: &MemoryConfig, len: u64, pages: HugePages) -> Result<MmapRegion, MemoryError> {
    let size = match pages {
        HugePages::Size2M => libc::MAP_HUGE_2MB,
        HugePages::Size1G => libc::MAP_HUGE_1GB,
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size;
    let builder = MmapRegionBuilder::new(len as usize).with_mmap_prot(PROT).with_mmap_flags(flags);
    builder.build().map_err(|source| map_error(config, source))
}

fn map_shared(config: &MemoryConfig, len: u64, file: FileOffset) -> Result<MmapRegion, MemoryError> {
    let reserve = if config.hugepages.is_some() { 0 } else { libc::MAP_NORESERVE };
    let builder = MmapRegionBuilder::new(len as usize).with_mmap_prot(PROT);
    let builder = builder.with_mmap_flags(libc::MAP_SHARED | reserve).with_file_offset(file);
    builder.build().map_err(|source| map_error(config, source))
}

fn map_error(config: &MemoryConfig, source: MmapRegionError) -> MemoryError {
    match config.hugepages {
        Some(pages) => no_huge_pages(config.size, pages),
        None => MemoryError::Map { size: config.size, source },
    }
}

fn no_huge_pages(size: Size, pages: HugePages) -> MemoryError {
    let page = pages.size();
    MemoryError::NoHugePages { page, count: size.0 / page.0, kib: page.0 / 1024 }
}

fn memfd(config: &MemoryConfig) -> Result<File, MemoryError> {
    let pages = match config.hugepages {
        None => MemfdFlags::empty(),
        Some(HugePages::Size2M) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePages::Size1G) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let failed = |e: io::Error| match config.hugepages {
        Some(pages) => no_huge_pages(config.size, pages),
        None => MemoryError::Memfd(e),
    };
    let fd = rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC | pages)
        .map_err(|e| failed(e.into()))?;
    let file = File::from(fd);
    file.set_len(config.size.0).map_err(failed)?;
    Ok(file)
}

/// Mapping without a reservation succeeds for any size; a guest that is larger than the host cannot end well.
fn check_host_memory(asked: Size) -> Result<(), MemoryError> {
    let info = rustix::system::sysinfo();
    let host =
        (info.totalram as u64).saturating_add(info.totalswap as u64).saturating_mul(info.mem_unit.into());
    if asked.0 > host {
        return Err(MemoryError::MoreThanHost { asked, host: Size::mib(host >> 20) });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn memory(text: &str) -> Memory {
        Memory::new(&text.parse().unwrap()).unwrap()
    }

    fn file(len: usize) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    /// Loads and compares, with what must stay around it.
    fn check(text: &str, offset: u64, at: u64, len: u64) -> Loaded {
        check_load(text, offset, at, len, false);
        check_load(text, offset, at, len, true)
    }

    fn check_load(text: &str, offset: u64, at: u64, len: u64, map: bool) -> Loaded {
        let memory = memory(text);
        let (file, bytes) = file(40_000);
        memory.guest().write_slice(&[0xaa; 80_000], GuestAddress(0)).unwrap();
        let loaded = memory.load(&file, offset, at, len, map).unwrap();
        let mut now = vec![0; 80_000];
        memory.guest().read_slice(&mut now, GuestAddress(0)).unwrap();
        let (start, end) = (at as usize, (at + len) as usize);
        assert_eq!(now[start..end], bytes[offset as usize..(offset + len) as usize]);
        assert!(now[..start].iter().chain(&now[end..]).all(|b| *b == 0xaa), "bytes around it changed");
        loaded
    }

    #[test]
    fn whole_pages_are_mapped_and_the_rest_copied() {
        assert_eq!(check("2M", 4096, 8192, 8192), Loaded { mapped: 8192, copied: 0 });
        assert_eq!(check("2M", 4096, 8192, 9000), Loaded { mapped: 8192, copied: 808 });
        assert_eq!(check("2M", 4000, 8096, 9000), Loaded { mapped: 8192, copied: 808 });
        assert_eq!(check("2M", 4000, 8192, 9000), Loaded { mapped: 0, copied: 9000 });
        assert_eq!(check("2M", 0, 100, 50), Loaded { mapped: 0, copied: 50 });
        assert_eq!(check("2M", 0, 0, 0), Loaded::default());
    }

    #[test]
    fn shared_memory_gets_copies() {
        assert_eq!(check("2M,backing=memfd", 0, 4096, 8192), Loaded { mapped: 0, copied: 8192 });
    }

    #[test]
    fn a_guest_write_does_not_reach_the_file() {
        let memory = memory("2M");
        let (file, bytes) = file(8192);
        memory.load(&file, 0, 4096, 8192, true).unwrap();
        memory.guest().write_slice(&[0xee; 8192], GuestAddress(4096)).unwrap();
        let mut now = vec![0; 8192];
        file.read_exact_at(&mut now, 0).unwrap();
        assert!(now == bytes);
    }

    #[test]
    fn memory_past_the_end_is_an_error() {
        let memory = memory("2M");
        let (file, _) = file(8192);
        assert!(memory.load(&file, 0, (2 << 20) - 4096, 8192, true).is_err());
        assert!(memory.load(&file, 0, 1 << 40, 4096, true).is_err());
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let error = Memory::new(&"3T".parse().unwrap()).err().unwrap();
        assert!(matches!(error, MemoryError::MoreThanHost { .. }), "{error}");
    }

    /// Fills both sides of the gap, releases a range, and says which of the four pages around it still hold bytes.
    fn kept(text: &str, at: u64, len: u64) -> [bool; 4] {
        let memory = memory(text);
        let pages = [0, 0xc000_0000 - 4096, 1 << 32, (1 << 32) + 4096].map(GuestAddress);
        pages.iter().for_each(|page| memory.guest().write_obj(7u32, *page).unwrap());
        memory.release(at, len).unwrap();
        pages.map(|page| memory.guest().read_obj::<u32>(page).unwrap() == 7)
    }

    #[test]
    fn released_memory_is_whole_pages_of_the_guest() {
        for text in ["4G", "4G,backing=memfd"] {
            assert_eq!(kept(text, 0, 0), [true; 4]);
            assert_eq!(kept(text, 0, 4095), [true; 4]);
            assert_eq!(kept(text, 1, 4096), [true; 4]);
            assert_eq!(kept(text, 0, 4097), [false, true, true, true]);
            // Over the gap, from one region into the next, and past every end.
            assert_eq!(kept(text, 0xc000_0000 - 4096, 4096), [true, false, true, true]);
            assert_eq!(kept(text, 0xc000_0000 - 4096, 8192), [true, false, true, true]);
            assert_eq!(kept(text, 0xd000_0000, 4096), [true; 4]);
            assert_eq!(kept(text, 0xc000_0000 - 4096, (1 << 30) + 8192), [true, false, false, true]);
            assert_eq!(kept(text, 1 << 40, 1 << 40), [true; 4]);
            assert_eq!(kept(text, u64::MAX, u64::MAX), [true; 4]);
            assert_eq!(kept(text, 1 << 32, u64::MAX), [true, true, false, false]);
        }
    }

    #[test]
    fn a_released_page_of_a_mapped_file_leaves_the_file_alone() {
        let memory = memory("2M");
        let (file, bytes) = file(8192);
        memory.load(&file, 0, 4096, 8192, true).unwrap();
        memory.guest().write_slice(&[0xee; 8192], GuestAddress(4096)).unwrap();
        memory.release(0, 2 << 20).unwrap();
        let mut now = vec![0; 8192];
        file.read_exact_at(&mut now, 0).unwrap();
        assert!(now == bytes);
    }

    #[test]
    fn memory_goes_over_the_gap() {
        let memory = memory("4G");
        memory.guest().write_obj(7u32, GuestAddress((5 << 30) - 4)).unwrap();
        assert!(memory.guest().write_obj(7u32, GuestAddress(0xd000_0000)).is_err());
    }
}
