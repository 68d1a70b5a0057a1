//! Guest memory as ranges, and the map of it that the kernel is told (E820).

use super::layout::{GAP_END, GAP_START, HIGH_RAM, LOW_RAM_END};

/// What a range of guest-physical addresses is. The numbers are E820's and PVH's (they agree).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable memory.
    Ram = 1,
    /// Not usable: the BIOS area with the ACPI tables.
    Reserved = 2,
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What is there.
    pub kind: Kind,
}

/// The address ranges that hold `size` bytes of memory: below the gap, and the rest above 4 GiB.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= GAP_START { vec![(0, size)] } else { vec![(0, GAP_START), (GAP_END, size - GAP_START)] }
}

/// End of the memory below the gap.
#[must_use]
pub fn low_end(size: u64) -> u64 {
    size.min(GAP_START)
}

/// The memory map for a guest of `size` bytes, at least 1 MiB.
#[must_use]
pub fn memory_map(size: u64) -> Vec<Entry> {
    let entry = |start, end: u64, kind| Entry { start, len: end - start, kind };
    let mut map = vec![
        entry(0, LOW_RAM_END, Kind::Ram),
        entry(LOW_RAM_END, HIGH_RAM, Kind::Reserved),
        entry(HIGH_RAM, low_end(size), Kind::Ram),
    ];
    map.extend(ram_ranges(size).get(1).map(|(start, len)| entry(*start, start + len, Kind::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_on_above_the_gap() {
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(7 << 29), [(0, 3 << 30), (4 << 30, 1 << 29)]);
        assert_eq!(memory_map(4 << 30)[3], Entry { start: 4 << 30, len: 1 << 30, kind: Kind::Ram });
    }

    #[test]
    fn the_map_is_sorted_and_has_all_memory_above_1_mib() {
        for size in [2 << 20, 128 << 20, 3 << 30, (3 << 30) + 4096, 8 << 30] {
            let map = memory_map(size);
            assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start));
            let high: u64 = map.iter().filter(|e| e.start >= HIGH_RAM).map(|e| e.len).sum();
            assert_eq!(high, size - HIGH_RAM);
        }
    }
}
