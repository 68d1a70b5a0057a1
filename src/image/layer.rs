//! A layer's tar archive becomes an EROFS image, with whiteouts as overlayfs knows them.
//!
//! No path of the archive ever reaches the host's file system: the files are nodes of a tree in memory.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, Write};

use thiserror::Error;

use super::erofs::{Kind, Meta, Node, NodeId, OPAQUE, Tree, Writer, XATTR_PREFIXES, Xattrs};
use super::tar::{Entry, TarError, TarReader};

/// The longest name of a file and the longest path or target of a link, in bytes, as Linux has them.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;

/// The most bytes of one file's extended attributes in all: what Linux lets a file have.
const MAX_XATTRS: usize = 64 << 10;

/// How much a layer may be: against archives that unpack to more than anybody wants.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries of one layer.
    pub entries: usize,
    /// Bytes of names, links and attributes of one layer, which are in memory.
    pub metadata: u64,
    /// Bytes of one layer's archive.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 500_000, metadata: 64 << 20, bytes: 64 << 30 }
    }
}

/// A layer that cannot be taken.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The archive.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A path that leads out of the layer.
    #[error("{0:?} leads out of the layer")]
    Escapes(String),
    /// A path that cannot be.
    #[error("{path:?}: {reason}")]
    Path {
        /// The path.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// More than [`Limits`].
    #[error("it has more than {0}: a layer like that is not taken")]
    Limit(String),
    /// The image cannot be written.
    #[error("its image cannot be written")]
    Write(#[source] io::Error),
}

/// A layer that is being read.
pub struct Layer {
    tree: Tree,
    limits: Limits,
    /// Folders that the archive uses and has not described.
    implied: BTreeMap<NodeId, Vec<u8>>,
    /// It hides all of the layers below.
    opaque: bool,
    metadata: u64,
    /// Bytes of all files, holes included.
    data: u64,
    entries: usize,
}

impl Layer {
    /// A layer without files.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            tree: Tree::default(),
            limits,
            implied: BTreeMap::new(),
            opaque: false,
            metadata: 0,
            data: 0,
            entries: 0,
        }
    }

    /// Reads an archive and writes its image to `out`, an empty file.
    ///
    /// # Errors
    /// The archive is broken, escapes, or is too large; a file cannot be read or written.
    pub fn make<W: Write + Seek, R: Read>(
        &mut self,
        archive: R,
        out: W,
    ) -> Result<(Writer<W>, TarReader<R>), LayerError> {
        let mut writer = Writer::new(out).map_err(LayerError::Write)?;
        let mut reader = TarReader::new(archive);
        while let Some(entry) = reader.next_entry()? {
            self.add(entry, &mut reader, &mut writer)?;
        }
        Ok((writer, reader))
    }

    /// The files.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Whether its image depends on the layers below: it uses folders without describing them, or hides all of them.
    #[must_use]
    pub fn leans_on_others(&self) -> bool {
        self.opaque || !self.implied.is_empty()
    }

    /// Whether it hides all of the layers below.
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        self.opaque
    }

    /// Hides what a layer below has in its root: overlayfs does not look whether a root is opaque.
    pub fn hide(&mut self, name: &[u8]) {
        let root = self.tree.root();
        match self.tree.child(root, name) {
            Some(there) if self.tree.node(there).is_dir() => self.set_opaque(there),
            Some(_) => {}
            None => self.add_whiteout(root, name),
        }
    }

    /// Sets owner, mode and times of folders that the archive has used without describing them, by their paths: they are
    /// those of the layers below.
    pub fn describe(&mut self, mut lookup: impl FnMut(&[u8]) -> Option<Meta>) {
        for (&id, path) in &self.implied {
            if let Some(mut meta) = lookup(path) {
                // What is opaque here is so by this layer's own account.
                let opaque = self.tree.node(id).meta.xattrs.get(OPAQUE).cloned();
                meta.xattrs.remove(OPAQUE);
                meta.xattrs.extend(opaque.map(|value| (OPAQUE.into(), value)));
                self.tree.node_mut(id).meta = meta;
            }
        }
    }

    fn add<W: Write + Seek>(
        &mut self,
        entry: Entry,
        data: &mut dyn Read,
        writer: &mut Writer<W>,
    ) -> Result<(), LayerError> {
        self.count(&entry)?;
        let path = Path::of(&entry.path)?;
        let Some((name, above)) = path.parts.split_last() else { return self.set_root(&entry, &path) };
        if name.starts_with(b".wh.") {
            return self.white_out(name, above, &path);
        }
        let dir = self.folder(above, &path)?;
        if entry.kind == b'1' {
            return self.hard_link(dir, name, &entry, &path);
        }
        let meta = meta(&entry, &path)?;
        let kind = match entry.kind {
            b'0' => {
                let stored = writer.store(data, entry.size);
                Kind::File(stored.map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => LayerError::Tar(TarError::Truncated),
                    io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
                        LayerError::Tar(TarError::Read(e))
                    }
                    _ => LayerError::Write(e),
                })?)
            }
            b'2' => Kind::Symlink(target(&entry, &path)?),
            b'3' => Kind::CharDevice(entry.major, entry.minor),
            b'4' => Kind::BlockDevice(entry.major, entry.minor),
            b'5' => return self.make_folder(dir, name, meta),
            b'6' => Kind::Fifo,
            _ => return Err(path.refused("a type of file that is not known")),
        };
        let node = self.tree.add(Node { meta, kind });
        self.tree.name(dir, name, node);
        Ok(())
    }

    fn count(&mut self, entry: &Entry) -> Result<(), LayerError> {
        let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        self.entries += 1;
        self.metadata += (entry.path.len() + entry.link.len() + xattrs) as u64;
        if self.entries > self.limits.entries || self.tree.count() > 2 * self.limits.entries {
            return Err(LayerError::Limit(format!("{} files", self.limits.entries)));
        }
        // Holes take nothing of the archive.
        self.data = self.data.saturating_add(entry.size);
        if self.data > self.limits.bytes {
            return Err(LayerError::Limit(format!("{} bytes of files", self.limits.bytes)));
        }
        if self.metadata > self.limits.metadata {
            return Err(LayerError::Limit(format!("{} bytes of names and attributes", self.limits.metadata)));
        }
        Ok(())
    }

    fn set_root(&mut self, entry: &Entry, path: &Path) -> Result<(), LayerError> {
        if entry.kind != b'5' {
            return Err(path.refused("the root is a folder"));
        }
        let root = self.tree.root();
        self.set_meta(root, meta(entry, path)?);
        Ok(())
    }

    /// Changes a folder's owner, mode and times; that it is opaque stays.
    fn set_meta(&mut self, dir: NodeId, meta: Meta) {
        let own = &mut self.tree.node_mut(dir).meta;
        let opaque = own.xattrs.get(OPAQUE).cloned();
        *own = meta;
        own.xattrs.extend(opaque.map(|value| (OPAQUE.into(), value)));
    }

    fn make_folder(&mut self, dir: NodeId, name: &[u8], meta: Meta) -> Result<(), LayerError> {
        match self.tree.child(dir, name) {
            Some(there) if self.tree.node(there).is_dir() => {
                self.implied.remove(&there);
                self.set_meta(there, meta);
            }
            there => {
                self.new_folder(dir, name, meta, there);
            }
        }
        Ok(())
    }

    fn new_folder(&mut self, dir: NodeId, name: &[u8], meta: Meta, before: Option<NodeId>) -> NodeId {
        let whited_out = before.is_some_and(|id| self.tree.node(id).is_whiteout());
        let node = self.tree.add(Node { meta, kind: Kind::Dir(BTreeMap::new()) });
        if whited_out {
            // What the layers below have there is gone: a folder that only took its name would show it again.
            self.set_opaque(node);
        }
        self.tree.name(dir, name, node);
        node
    }

    fn set_opaque(&mut self, dir: NodeId) {
        self.tree.node_mut(dir).meta.xattrs.insert(OPAQUE.into(), (*b"y").into());
    }

    /// The folder of that path, made where the archive has not described it.
    fn folder(&mut self, parts: &[&[u8]], path: &Path) -> Result<NodeId, LayerError> {
        let mut dir = self.tree.root();
        for (depth, part) in parts.iter().enumerate() {
            let there = self.tree.child(dir, part);
            dir = match there.map(|id| (id, self.tree.node(id))) {
                Some((id, node)) if node.is_dir() => id,
                Some((_, Node { kind: Kind::Symlink(_), .. })) => return Err(path.escapes()),
                Some((_, node)) if !node.is_whiteout() => {
                    return Err(path.refused("a file is where its folder should be"));
                }
                _ => {
                    let whole = parts[..=depth].join(&b'/');
                    self.metadata += whole.len() as u64 + 1;
                    let id = self.new_folder(dir, part, Meta { mode: 0o755, ..Meta::default() }, there);
                    self.implied.insert(id, whole);
                    id
                }
            };
        }
        Ok(dir)
    }

    fn white_out(&mut self, name: &[u8], above: &[&[u8]], path: &Path) -> Result<(), LayerError> {
        let dir = self.folder(above, path)?;
        if name == b".wh..wh..opq" {
            self.set_opaque(dir);
            self.opaque |= above.is_empty();
            return Ok(());
        }
        if name.starts_with(b".wh..wh.") {
            // aufs's own notes, which older Docker has left in layers.
            return Ok(());
        }
        let hidden = name.strip_prefix(b".wh.").unwrap_or_default();
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(path.refused("a whiteout of nothing"));
        }
        match self.tree.child(dir, hidden) {
            // A whiteout is about the layers below alone, whatever the order of entries.
            Some(there) if self.tree.node(there).is_dir() => self.set_opaque(there),
            Some(_) => {}
            None => self.add_whiteout(dir, hidden),
        }
        Ok(())
    }

    fn add_whiteout(&mut self, dir: NodeId, name: &[u8]) {
        let node = self.tree.add(Node { meta: Meta::default(), kind: Kind::CharDevice(0, 0) });
        self.tree.name(dir, name, node);
    }

    fn hard_link(&mut self, dir: NodeId, name: &[u8], entry: &Entry, path: &Path) -> Result<(), LayerError> {
        let target = Path::of(&entry.link)?;
        let mut node = self.tree.root();
        for part in &target.parts {
            if matches!(self.tree.node(node).kind, Kind::Symlink(_)) {
                return Err(target.escapes());
            }
            let missing = || path.refused("a hard link to a file that is not in the layer");
            node = self.tree.child(node, part).ok_or_else(missing)?;
        }
        if self.tree.node(node).is_dir() {
            return Err(path.refused("a hard link to a folder"));
        }
        self.tree.name(dir, name, node);
        Ok(())
    }
}

/// A path of an archive, taken apart.
struct Path<'a> {
    whole: &'a [u8],
    parts: Vec<&'a [u8]>,
}

impl<'a> Path<'a> {
    /// A slash in front is dropped, as Docker does; `..` is refused even where it would not lead out.
    fn of(whole: &'a [u8]) -> Result<Self, LayerError> {
        let parts = whole.split(|b| *b == b'/').filter(|part| !matches!(*part, b"" | b"."));
        let path = Self { whole, parts: parts.collect() };
        if path.parts.contains(&&b".."[..]) {
            return Err(path.escapes());
        }
        if whole.len() > MAX_PATH || whole.contains(&0) || path.parts.iter().any(|p| p.len() > MAX_NAME) {
            return Err(path.refused("the name is too long for Linux, or has a NUL in it"));
        }
        Ok(path)
    }

    fn text(&self) -> String {
        let whole: String = String::from_utf8_lossy(self.whole).chars().take(200).collect();
        whole
    }

    fn escapes(&self) -> LayerError {
        LayerError::Escapes(self.text())
    }

    fn refused(&self, reason: &'static str) -> LayerError {
        LayerError::Path { path: self.text(), reason }
    }
}

fn target(entry: &Entry, path: &Path) -> Result<Box<[u8]>, LayerError> {
    // Wherever a symbolic link leads, it is followed in the guest alone.
    match entry.link.len() {
        1..=MAX_PATH if !entry.link.contains(&0) => Ok(entry.link.as_slice().into()),
        _ => Err(path.refused("a symbolic link without a target, or with one that is too long")),
    }
}

fn meta(entry: &Entry, path: &Path) -> Result<Meta, LayerError> {
    let id = |id: u64| u32::try_from(id).map_err(|_| path.refused("an owner beyond 32 bits"));
    Ok(Meta {
        mode: (entry.mode & 0o7777) as u16,
        uid: id(entry.uid)?,
        gid: id(entry.gid)?,
        mtime: entry.mtime,
        mtime_nsec: entry.mtime_nsec,
        xattrs: xattrs(entry, path)?,
    })
}

fn xattrs(entry: &Entry, path: &Path) -> Result<Xattrs, LayerError> {
    let known = |name: &[u8]| XATTR_PREFIXES.iter().any(|(prefix, _)| name.starts_with(prefix));
    // overlayfs believes these: a layer could name files of other layers with them.
    let overlay = |name: &[u8]| name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    let kept = entry.xattrs.iter().filter(|(name, _)| known(name) && !overlay(name));
    let kept: Xattrs = kept.map(|(name, value)| (name.as_slice().into(), value.as_slice().into())).collect();
    let too_long = kept.keys().any(|name| name.len() > MAX_NAME || name.contains(&0));
    if too_long || kept.iter().map(|(name, value)| name.len() + value.len() + 8).sum::<usize>() > MAX_XATTRS {
        return Err(path.refused("its extended attributes are larger than Linux allows"));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn small() -> Limits {
        Limits { entries: 100, metadata: 1 << 20, bytes: 1 << 20 }
    }

    fn image(archive: &[u8]) -> Result<Vec<u8>, LayerError> {
        let mut layer = Layer::new(small());
        let (writer, _) = layer.make(archive, Cursor::new(Vec::new()))?;
        writer.finish(layer.tree(), [0; 16]).map(Cursor::into_inner).map_err(LayerError::Write)
    }

    fn entry(header: &mut tar::Header, data: &[u8]) -> Vec<u8> {
        header.set_size(data.len() as u64);
        header.set_cksum();
        let mut bytes = [header.as_bytes(), data].concat();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    /// An archive of every kind of entry.
    fn archive() -> Vec<u8> {
        let mut bytes = Vec::new();
        for (i, kind) in b"5012346xLK".iter().enumerate() {
            let mut header = tar::Header::new_ustar();
            header.set_path(format!("d/f{i}")).unwrap();
            header.set_entry_type(tar::EntryType::new(*kind));
            header.as_mut_bytes()[157..161].copy_from_slice(b"d/f1");
            for field in [100, 108, 116, 136, 329, 337] {
                header.as_mut_bytes()[field..field + 7].copy_from_slice(b"0000017");
            }
            let data: &[u8] = match kind {
                b'0' => &[7; 5000],
                b'x' => b"29 SCHILY.xattr.user.a=value\n14 uid=123456\n",
                b'L' | b'K' => b"a/long/name",
                _ => b"",
            };
            bytes.extend(entry(&mut header, data));
        }
        for (name, map) in [("d/sparse", true), ("d/last", false)] {
            let mut header = if map { tar::Header::new_gnu() } else { tar::Header::new_ustar() };
            header.set_path(name).unwrap();
            header.set_mode(0o644);
            if map {
                header.set_entry_type(tar::EntryType::GNUSparse);
                // A piece of 4 bytes at 010000 in a file of 020000.
                header.as_mut_bytes()[386..410].copy_from_slice(b"00000010000\x0000000000004\0");
                header.as_mut_bytes()[483..495].copy_from_slice(b"00000020000\0");
            }
            bytes.extend(entry(&mut header, b"data"));
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_path("x").unwrap();
        bytes.extend(entry(&mut header, b"22 GNU.sparse.major=1\n29 GNU.sparse.realsize=10000\n"));
        header.set_entry_type(tar::EntryType::Regular);
        bytes.extend(entry(&mut header, &[&b"2\n0\n2\n4096\n2\n"[..], &[0; 512 - 13], b"data"].concat()));
        bytes
    }

    /// A checksum that fits lets damage through to what reads the fields.
    fn mend(bytes: &mut [u8]) {
        for record in bytes.chunks_exact_mut(512) {
            let is_header = &record[257..262] == b"ustar";
            if is_header {
                let sum: u32 =
                    (0..512).map(|i| if (148..156).contains(&i) { 32 } else { u32::from(record[i]) }).sum();
                record[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
    }

    #[test]
    fn every_kind_of_entry_is_taken() {
        assert!(image(&archive()).unwrap().len() > 8192);
    }

    proptest! {
        #[test]
        fn no_damage_panics(damage in prop::collection::vec((0usize..16384, any::<u8>()), 1..8)) {
            let mut bytes = archive();
            for (at, value) in damage {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            mend(&mut bytes);
            let _ = image(&bytes);
        }
    }
}
