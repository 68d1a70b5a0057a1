//! Which inode lies where.

use std::collections::BTreeMap;

use super::tree::{Data, Kind, Node, NodeId, ROOT, Tree};
use super::{BLOCK, directory};

/// Bytes of an inode, of the format's larger kind: the smaller has no time of its own.
pub(super) const INODE: usize = 64;

/// Bytes before the attributes of an inode that has any.
pub(super) const XATTR_HEADER: usize = 12;

/// Inodes are numbered in units of so many bytes.
pub(super) const SLOT: usize = 32;

/// Where a node is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    /// Byte in the area of inodes; 0 is nobody's, and says that the node is not in the image.
    pub at: u64,
    /// Links to it.
    pub links: u32,
    /// Of a folder: the one above it.
    pub parent: NodeId,
    /// Of a folder or a link whose data does not fit behind its inode: its first block, from 0.
    pub block: Option<u64>,
}

/// Where all of it is.
pub(super) struct Layout {
    /// By node.
    pub places: Vec<Place>,
    /// Nodes in the order of their inodes.
    pub order: Vec<NodeId>,
    /// Blocks of folders and links.
    pub blocks: u64,
    /// Bytes of the area of inodes.
    pub inode_bytes: u64,
}

/// An inode's attributes in bytes.
pub(super) fn xattr_size(node: &Node) -> usize {
    if node.meta.xattrs.is_empty() {
        return 0;
    }
    let entries = node.meta.xattrs.iter().filter_map(|(name, value)| {
        let (_, suffix) = split_name(name)?;
        Some((4 + suffix.len() + value.len()).next_multiple_of(4))
    });
    XATTR_HEADER + entries.sum::<usize>()
}

/// An attribute's prefix as the format numbers it, and what follows it.
pub(super) fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    super::XATTR_PREFIXES.iter().find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
}

/// What a folder names, with `.` and `..`, sorted.
pub(super) fn names(
    entries: &BTreeMap<Box<[u8]>, NodeId>,
    own: NodeId,
    parent: NodeId,
) -> Vec<(&[u8], NodeId)> {
    let mut all: Vec<(&[u8], NodeId)> = entries.iter().map(|(name, id)| (&**name, *id)).collect();
    all.extend([(&b"."[..], own), (&b".."[..], parent)]);
    all.sort_unstable();
    all
}

/// Bytes of a node's data that could lie behind its inode.
pub(super) fn tail_size(node: &Node) -> usize {
    match &node.kind {
        Kind::Dir(entries) => {
            let own = [&b"."[..], b".."];
            let mut all: Vec<&[u8]> = entries.keys().map(|name| &**name).chain(own).collect();
            all.sort_unstable();
            directory::size(all.into_iter())
        }
        Kind::Symlink(target) => target.len(),
        Kind::File(Data::Inline(bytes)) => bytes.len(),
        _ => 0,
    }
}

impl Layout {
    /// Lays out a tree, folder by folder from the root.
    pub fn of(tree: &Tree) -> Self {
        let mut layout = Self {
            places: vec![Place::default(); tree.count()],
            order: vec![ROOT],
            blocks: 0,
            // Inode number 0 would be taken for "no file" by readers of folders.
            inode_bytes: SLOT as u64,
        };
        layout.place(tree, ROOT);
        let mut next = 0;
        while let Some(&id) = layout.order.get(next) {
            next += 1;
            if let Kind::Dir(entries) = &tree.node(id).kind {
                layout.visit(tree, id, entries);
            }
        }
        layout
    }

    fn visit(&mut self, tree: &Tree, dir: NodeId, entries: &BTreeMap<Box<[u8]>, NodeId>) {
        let folders = entries.values().filter(|id| tree.node(**id).is_dir()).count();
        self.places[dir].links = (folders as u32).saturating_add(2);
        for &id in entries.values() {
            if tree.node(id).is_dir() {
                self.places[id].parent = dir;
            } else {
                self.places[id].links += 1;
            }
            if self.places[id].at == 0 {
                self.place(tree, id);
                self.order.push(id);
            }
        }
    }

    /// The next free place. Data behind an inode must end in the inode's block, and an inode never lies across two.
    fn place(&mut self, tree: &Tree, id: NodeId) {
        let node = tree.node(id);
        let (head, tail) = (INODE + xattr_size(node), tail_size(node));
        let inline = head + tail <= BLOCK;
        let size = if inline { head + tail } else { head };
        let together = if inline { size } else { INODE };
        let at = self.inode_bytes.next_multiple_of(SLOT as u64);
        let room = BLOCK - (at % BLOCK as u64) as usize;
        let at = if together > room { at + room as u64 } else { at };
        self.places[id].at = at;
        self.inode_bytes = at + size as u64;
        if !inline {
            self.places[id].block = Some(self.blocks);
            self.blocks += tail.div_ceil(BLOCK) as u64;
        }
    }
}
