//! A folder's data: blocks of entries, each with its names behind them, sorted by name over the whole folder.

use super::BLOCK;

/// Bytes of an entry without its name.
const ENTRY: usize = 12;

/// One entry.
pub(super) struct Entry<'a> {
    pub name: &'a [u8],
    /// The inode's place in units of 32 bytes.
    pub nid: u64,
    /// EROFS's file type, as `DT_*` renumbered: 1 file, 2 folder, 3 character, 4 block, 5 pipe, 7 link.
    pub kind: u8,
}

/// Splits names into blocks: the number of names and the bytes used of each.
fn blocks<'a>(names: impl Iterator<Item = &'a [u8]>) -> Vec<(usize, usize)> {
    let mut blocks = Vec::new();
    let (mut count, mut used) = (0, 0);
    for name in names {
        let needed = ENTRY + name.len();
        if used + needed > BLOCK {
            blocks.push((count, used));
            (count, used) = (0, 0);
        }
        count += 1;
        used += needed;
    }
    blocks.push((count, used));
    blocks
}

/// Bytes of a folder's data: all blocks but the last are whole.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> usize {
    let blocks = blocks(names);
    let last = blocks.last().map_or(0, |(_, used)| *used);
    (blocks.len() - 1) * BLOCK + last
}

/// A folder's data. `entries` are sorted, with `.` and `..` in their places.
pub(super) fn data(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    let blocks = blocks(entries.iter().map(|e| e.name));
    for (i, (count, _)) in blocks.iter().enumerate() {
        let (block, after) = rest.split_at(*count);
        rest = after;
        let mut name_at = count * ENTRY;
        for entry in block {
            out.extend(entry.nid.to_le_bytes());
            // Below BLOCK.
            out.extend((name_at as u16).to_le_bytes());
            out.extend([entry.kind, 0]);
            name_at += entry.name.len();
        }
        block.iter().for_each(|entry| out.extend(entry.name));
        if i + 1 < blocks.len() {
            out.resize(out.len().next_multiple_of(BLOCK), 0);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_that_of_the_data() {
        let names: Vec<String> = (0..1000).map(|i| format!("name-{i:04}-{}", "x".repeat(i % 200))).collect();
        for count in [1, 2, 50, 999, 1000] {
            let entries: Vec<_> =
                names[..count].iter().map(|n| Entry { name: n.as_bytes(), nid: 7, kind: 1 }).collect();
            assert_eq!(data(&entries).len(), size(names[..count].iter().map(String::as_bytes)));
        }
    }
}
