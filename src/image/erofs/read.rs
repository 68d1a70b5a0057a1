//! Looks up folders in images that [`super::Writer`] has written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::layout::{INODE, SLOT, XATTR_HEADER};
use super::tree::Meta;
use super::{BLOCK, OPAQUE, XATTR_PREFIXES};

/// The largest folder that is looked through, in bytes.
const MAX_FOLDER: u64 = 64 << 20;

/// An image.
pub struct Reader {
    file: File,
    /// Byte where the inodes are.
    inodes: u64,
    root: u64,
}

/// What a layer says of a folder.
pub enum Found {
    /// It has it, with this owner and mode.
    Folder(Meta),
    /// It hides what the layers below have there.
    Hidden,
    /// Nothing: the layers below are to be asked.
    Nothing,
}

struct Inode {
    meta: Meta,
    kind: u16,
    size: u64,
    /// Byte where the data is.
    data: u64,
}

fn broken() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the layer's file system is broken: remove the image and import it again",
    )
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or_else(broken)
}

impl Reader {
    /// Opens an image.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut block = [0; 128];
        file.read_exact_at(&mut block, 1024)?;
        if u32::from_le_bytes(number(&block, 0)?) != super::write::MAGIC {
            return Err(broken());
        }
        let inodes = u64::from(u32::from_le_bytes(number(&block, 40)?)) * BLOCK as u64;
        let root = u64::from(u16::from_le_bytes(number(&block, 14)?));
        Ok(Self { file, inodes, root })
    }

    /// Looks a folder up.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn folder(&self, path: &[u8]) -> io::Result<Found> {
        let mut inode = self.inode(self.root)?;
        let mut opaque = false;
        for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
            let entries = self.entries(&inode)?;
            let Some((_, nid)) = entries.into_iter().find(|(there, _)| there == name) else {
                return Ok(if opaque { Found::Hidden } else { Found::Nothing });
            };
            inode = self.inode(nid)?;
            if inode.kind != 0o040_000 {
                return Ok(Found::Hidden);
            }
            opaque |= inode.meta.xattrs.contains_key(OPAQUE);
        }
        Ok(Found::Folder(inode.meta))
    }

    /// The names in the root.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        let names = self.entries(&self.inode(self.root)?)?.into_iter().map(|(name, _)| name);
        Ok(names.filter(|name| !matches!(name.as_slice(), b"." | b"..")).collect())
    }

    fn inode(&self, nid: u64) -> io::Result<Inode> {
        let at =
            nid.checked_mul(SLOT as u64).and_then(|at| at.checked_add(self.inodes)).ok_or_else(broken)?;
        let mut bytes = [0; INODE];
        self.file.read_exact_at(&mut bytes, at)?;
        let format = u16::from_le_bytes(number(&bytes, 0)?);
        let words = usize::from(u16::from_le_bytes(number(&bytes, 2)?));
        let mode = u16::from_le_bytes(number(&bytes, 4)?);
        let xattr_bytes = words.checked_sub(1).map_or(0, |words| XATTR_HEADER + words * 4);
        let mut xattrs = vec![0; xattr_bytes];
        self.file.read_exact_at(&mut xattrs, at + INODE as u64)?;
        let behind = at + (INODE + xattr_bytes) as u64;
        let block = u64::from(u32::from_le_bytes(number(&bytes, 16)?)) * BLOCK as u64;
        let mut meta = Meta {
            mode: mode & 0o7777,
            uid: u32::from_le_bytes(number(&bytes, 24)?),
            gid: u32::from_le_bytes(number(&bytes, 28)?),
            mtime: i64::from_le_bytes(number(&bytes, 32)?),
            mtime_nsec: u32::from_le_bytes(number(&bytes, 40)?),
            ..Meta::default()
        };
        read_xattrs(xattrs.get(XATTR_HEADER..).unwrap_or_default(), &mut meta)?;
        let data = if format >> 1 == super::write::FLAT_INLINE { behind } else { block };
        Ok(Inode { meta, kind: mode & 0o170_000, size: u64::from_le_bytes(number(&bytes, 8)?), data })
    }

    /// A folder's names, each with its inode.
    fn entries(&self, dir: &Inode) -> io::Result<Vec<(Vec<u8>, u64)>> {
        if dir.size > MAX_FOLDER {
            return Err(broken());
        }
        let mut data = vec![0; dir.size as usize];
        self.file.read_exact_at(&mut data, dir.data)?;
        let mut entries = Vec::new();
        for block in data.chunks(BLOCK) {
            let name_at =
                |i: usize| -> io::Result<usize> { Ok(u16::from_le_bytes(number(block, i * 12 + 8)?).into()) };
            let count = name_at(0)? / 12;
            for i in 0..count {
                let end = if i + 1 < count { name_at(i + 1)? } else { block.len() };
                let name = block.get(name_at(i)?..end).ok_or_else(broken)?;
                let name = name.split(|b| *b == 0).next().unwrap_or_default();
                entries.push((name.to_vec(), u64::from_le_bytes(number(block, i * 12)?)));
            }
        }
        Ok(entries)
    }
}

fn read_xattrs(mut bytes: &[u8], meta: &mut Meta) -> io::Result<()> {
    while let [name_len, index, low, high, rest @ ..] = bytes {
        let (name_len, value_len) = (usize::from(*name_len), usize::from(u16::from_le_bytes([*low, *high])));
        let prefix = XATTR_PREFIXES.iter().find(|(_, i)| i == index).ok_or_else(broken)?.0;
        let name = rest.get(..name_len).ok_or_else(broken)?;
        let value = rest.get(name_len..name_len + value_len).ok_or_else(broken)?;
        meta.xattrs.insert([prefix, name].concat().into(), value.into());
        let used = (4 + name_len + value_len).next_multiple_of(4);
        bytes = bytes.get(used..).unwrap_or_default();
    }
    Ok(())
}
