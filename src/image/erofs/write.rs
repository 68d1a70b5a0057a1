//! The image itself: superblock, data of files as they come, folders, inodes.

use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use super::directory::{self, Entry};
use super::layout::{self, INODE, Layout, SLOT, XATTR_HEADER};
use super::tree::{Data, Kind, Node, NodeId, ROOT, Tree};
use super::{BLOCK, MAX_INLINE};

pub(super) const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_AT: u64 = 1024;

/// Bit 0 of an inode's format: the 64-byte kind. The data's layout is in bits 1 to 3.
const EXTENDED: u16 = 1;
const FLAT_PLAIN: u16 = 0;
pub(super) const FLAT_INLINE: u16 = 2;

/// Small files are kept in memory until the end, up to so many bytes of them in all; the others get blocks.
const MAX_INLINE_TOTAL: u64 = 32 << 20;

/// An image that is being written.
pub struct Writer<W: Write + Seek> {
    out: BufWriter<W>,
    /// The next free block.
    next: u64,
    inline: u64,
    buffer: Vec<u8>,
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "an EROFS image has at most 16 TiB")
}

impl<W: Write + Seek> Writer<W> {
    /// Starts an image in an empty file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(out: W) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(1 << 20, out);
        out.write_all(&[0; BLOCK])?;
        Ok(Self { out, next: 1, inline: 0, buffer: vec![0; 128 << 10] })
    }

    /// Stores a file's `size` bytes.
    ///
    /// # Errors
    /// The image cannot be written, the data cannot be read or ends before `size`.
    pub fn store(&mut self, data: &mut dyn Read, size: u64) -> io::Result<Data> {
        if size <= MAX_INLINE && self.inline + size <= MAX_INLINE_TOTAL {
            let mut bytes = vec![0; size as usize];
            data.read_exact(&mut bytes)?;
            self.inline += size;
            return Ok(Data::Inline(bytes.into()));
        }
        let first = u32::try_from(self.next).map_err(|_| too_large())?;
        let mut left = size;
        while left > 0 {
            let part = left.min(self.buffer.len() as u64) as usize;
            data.read_exact(&mut self.buffer[..part])?;
            self.out.write_all(&self.buffer[..part])?;
            left -= part as u64;
        }
        self.pad(size)?;
        self.next += size.div_ceil(BLOCK as u64);
        Ok(Data::Blocks { first, size })
    }

    /// Ends the image with its folders and inodes and gives the file back. `uuid` names the file system.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> io::Result<W> {
        let layout = Layout::of(tree);
        let first_block = self.next;
        for &id in layout.order.iter().filter(|id| layout.places[**id].block.is_some()) {
            let data = tail(tree, &layout, id);
            self.out.write_all(&data)?;
            self.pad(data.len() as u64)?;
        }
        let inodes = first_block + layout.blocks;
        let mut at = 0;
        for &id in &layout.order {
            let place = layout.places[id].at;
            self.zeros(place - at)?;
            let inode = inode(tree, &layout, id, first_block)?;
            self.out.write_all(&inode)?;
            at = place + inode.len() as u64;
        }
        self.pad(at)?;
        let blocks = inodes + at.div_ceil(BLOCK as u64);
        self.out.seek(SeekFrom::Start(SUPERBLOCK_AT))?;
        self.out.write_all(&superblock(&layout, inodes, blocks, uuid)?)?;
        self.out.into_inner().map_err(io::IntoInnerError::into_error)
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        self.zeros(written.next_multiple_of(BLOCK as u64) - written)
    }

    fn zeros(&mut self, count: u64) -> io::Result<()> {
        io::copy(&mut io::repeat(0).take(count), &mut self.out).map(drop)
    }
}

fn superblock(layout: &Layout, inodes: u64, blocks: u64, uuid: [u8; 16]) -> io::Result<[u8; 128]> {
    let blocks = u32::try_from(blocks).map_err(|_| too_large())?;
    let inodes = u32::try_from(inodes).map_err(|_| too_large())?;
    let mut bytes = [0; 128];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC.to_le_bytes());
    put(12, &[BLOCK.trailing_zeros() as u8]);
    // The first inode, so it fits these 16 bits.
    put(14, &((layout.places[ROOT].at / SLOT as u64) as u16).to_le_bytes());
    put(16, &(layout.order.len() as u64).to_le_bytes());
    put(36, &blocks.to_le_bytes());
    put(40, &inodes.to_le_bytes());
    put(48, &uuid);
    Ok(bytes)
}

/// An inode with its attributes, and its data where that lies behind it.
fn inode(tree: &Tree, layout: &Layout, id: NodeId, first_block: u64) -> io::Result<Vec<u8>> {
    let (node, place) = (tree.node(id), layout.places[id]);
    let tail = if place.block.is_none() { tail(tree, layout, id) } else { Vec::new() };
    let xattrs = xattrs(node);
    let (size, union) = match &node.kind {
        Kind::File(Data::Blocks { first, size }) => (*size, *first),
        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => (0, device(*major, *minor)),
        _ => (layout::tail_size(node) as u64, 0),
    };
    let union = match place.block {
        Some(block) => u32::try_from(first_block + block).map_err(|_| too_large())?,
        None => union,
    };
    let data_layout = if tail.is_empty() { FLAT_PLAIN } else { FLAT_INLINE };
    // How many words of attributes, where one is the header's last.
    let words = xattrs.len().checked_sub(XATTR_HEADER).map_or(0, |body| body / 4 + 1);
    let mut bytes = vec![0; INODE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &(EXTENDED | data_layout << 1).to_le_bytes());
    put(2, &u16::try_from(words).map_err(|_| too_large())?.to_le_bytes());
    put(4, &(kind(node).mode | node.meta.mode).to_le_bytes());
    put(8, &size.to_le_bytes());
    put(16, &union.to_le_bytes());
    put(20, &((place.at / SLOT as u64) as u32).to_le_bytes());
    put(24, &node.meta.uid.to_le_bytes());
    put(28, &node.meta.gid.to_le_bytes());
    put(32, &node.meta.mtime.to_le_bytes());
    put(40, &node.meta.mtime_nsec.to_le_bytes());
    put(44, &place.links.to_le_bytes());
    bytes.extend(xattrs);
    bytes.extend(tail);
    Ok(bytes)
}

fn xattrs(node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    if !node.meta.xattrs.is_empty() {
        bytes.resize(XATTR_HEADER, 0);
    }
    for (name, value) in &node.meta.xattrs {
        let Some((index, suffix)) = layout::split_name(name) else { continue };
        bytes.extend([suffix.len() as u8, index]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend(suffix);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Linux's 32-bit form of a device's number.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The data of a folder, a link or a small file.
fn tail<'a>(tree: &'a Tree, layout: &Layout, id: NodeId) -> Vec<u8> {
    match &tree.node(id).kind {
        Kind::Dir(entries) => {
            let names = layout::names(entries, id, layout.places[id].parent);
            let entry = |&(name, id): &(&'a [u8], NodeId)| Entry {
                name,
                nid: layout.places[id].at / SLOT as u64,
                kind: kind(tree.node(id)).entry,
            };
            directory::data(&names.iter().map(entry).collect::<Vec<_>>())
        }
        Kind::Symlink(target) => target.to_vec(),
        Kind::File(Data::Inline(bytes)) => bytes.to_vec(),
        _ => Vec::new(),
    }
}

/// A type as an inode's mode and as a folder's entry.
struct TypeBits {
    mode: u16,
    entry: u8,
}

fn kind(node: &Node) -> TypeBits {
    let (mode, entry) = match node.kind {
        Kind::File(_) => (0o100_000, 1),
        Kind::Dir(_) => (0o040_000, 2),
        Kind::CharDevice(..) => (0o020_000, 3),
        Kind::BlockDevice(..) => (0o060_000, 4),
        Kind::Fifo => (0o010_000, 5),
        Kind::Symlink(_) => (0o120_000, 7),
    };
    TypeBits { mode, entry }
}
