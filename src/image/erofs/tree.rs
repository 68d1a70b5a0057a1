//! The files of an image, in memory: all but the data of large files.

use std::collections::BTreeMap;

/// A node's place in its [`Tree`].
pub type NodeId = usize;

/// Extended attributes by whole name, each with one of [`XATTR_PREFIXES`] in front.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// What all kinds of files have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, with set-user-id, set-group-id and sticky; no type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds, below 10⁹.
    pub mtime_nsec: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// Names of extended attributes start with one of these; the number is the format's.
pub const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// In memory, to be written behind the inode: at most [`super::MAX_INLINE`] bytes.
    Inline(Box<[u8]>),
    /// In the image already.
    Blocks {
        /// Block number.
        first: u32,
        /// Bytes.
        size: u64,
    },
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder with its entries.
    Dir(BTreeMap<Box<[u8]>, NodeId>),
    /// A regular file.
    File(Data),
    /// A symbolic link: 1 to 4095 bytes.
    Symlink(Box<[u8]>),
    /// A character device, `(major, minor)`; `(0, 0)` is overlayfs's whiteout.
    CharDevice(u32, u32),
    /// A block device, `(major, minor)`.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Owner, mode, times.
    pub meta: Meta,
    /// Type and content.
    pub kind: Kind,
}

impl Node {
    /// Whether it is a folder.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir(_))
    }

    /// Whether it is overlayfs's whiteout.
    #[must_use]
    pub fn is_whiteout(&self) -> bool {
        self.kind == Kind::CharDevice(0, 0)
    }
}

/// Files below one root. A node that no folder names any more is left out of the image.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

/// The root's place.
pub const ROOT: NodeId = 0;

impl Default for Tree {
    fn default() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        Self { nodes: vec![Node { meta, kind: Kind::Dir(BTreeMap::new()) }] }
    }
}

impl Tree {
    /// The root folder.
    #[must_use]
    pub fn root(&self) -> NodeId {
        ROOT
    }

    /// Number of nodes, with those that nothing names any more.
    #[must_use]
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// A node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    /// A node, to be changed.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id]
    }

    /// A folder's entry of that name.
    #[must_use]
    pub fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.nodes[dir].kind {
            Kind::Dir(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// Adds a node that nothing names yet.
    pub fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Names a node in a folder, in place of what had the name. A no-op where `dir` is no folder.
    pub fn name(&mut self, dir: NodeId, name: &[u8], node: NodeId) {
        if let Kind::Dir(entries) = &mut self.nodes[dir].kind {
            entries.insert(name.into(), node);
        }
    }
}
