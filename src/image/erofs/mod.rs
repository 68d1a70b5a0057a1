//! A writer of EROFS images: one pass over the data, no tool of the host, no root, nothing unpacked to disk.
//!
//! Data is not compressed and starts at a page, so that a guest's pages are the host's page cache as they are; small
//! files lie behind their inodes. The same [`Tree`] gives the same bytes. The format is that of Linux 5.4 and newer:
//! <https://docs.kernel.org/filesystems/erofs.html> and `fs/erofs/erofs_fs.h`.

mod directory;
mod layout;
mod read;
mod tree;
mod write;

pub use read::{Found, Reader};
pub use tree::{Kind, Meta, Node, NodeId, Tree, XATTR_PREFIXES, Xattrs};
pub use write::Writer;

/// The attribute by which overlayfs knows a folder that hides what the layers below have in it.
pub const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// The largest file in bytes that lies behind its inode. Of such a file a block of its own would be half empty at least.
pub const MAX_INLINE: u64 = BLOCK as u64 / 2;
