//! What is behind a disk: one file, or several that are read as if they were one.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::config::DiskConfig;
use crate::sandbox::Kept;
use crate::sys::file_io::{Operation, Pinned};

use super::SECTOR;
use super::piece::Piece;

/// An image that cannot be a disk. Each message names the flag and the path.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Opening failed.
    #[error("--disk {path}")]
    Open {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// It may be read, but not written.
    #[error("--disk {path} cannot be written to: make it writable, or add ,readonly")]
    NotWritable {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Its file system has no direct I/O.
    #[error("--disk {path},direct: its file system has no direct I/O: leave ,direct out")]
    NoDirect {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("--disk {0} is neither a file nor a block device: give a raw image")]
    NotADisk(PathBuf),
    /// Not one sector.
    #[error(
        "--disk {path} has {len} bytes, and a disk has at least one sector of 512: truncate -s 1G {path} makes room for 1 GiB"
    )]
    TooSmall {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Behind it the next file would begin within a sector.
    #[error(
        "--disk {path} has {len} bytes, which is no whole number of sectors of 512, as each file of a disk of several has"
    )]
    Ragged {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// More than an offset can be.
    #[error("--disk {0}: with this file the disk would have more than 2⁶³ bytes: leave some out")]
    TooLong(PathBuf),
    /// Another VM has it.
    #[error(
        "--disk {0} is in use by another VM (or twice in this one): two that write it would destroy it. Stop the \
         other one, copy the image, or give it to all of them with ,readonly"
    )]
    Locked(PathBuf),
    /// The lock could not be had.
    #[error("--disk {path} cannot be locked")]
    Lock {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// An open image. The locks on its files go with the last clone of each.
pub struct Image {
    /// At least one, by where they begin.
    pieces: Vec<Place>,
    /// Its length.
    pub sectors: u64,
    /// The guest may not write.
    pub readonly: bool,
    /// Ranges of it can be freed.
    pub can_discard: bool,
    /// What the guest has to read and write by: 512, or the block device's.
    pub logical_block: u32,
    /// What it had better read and write by.
    pub physical_block: u32,
}

/// A file, and which bytes of the disk it has.
struct Place {
    start: u64,
    end: u64,
    piece: Piece,
}

impl Image {
    /// Names the descriptors that stay open when the VM confines itself.
    pub fn keep(&self, kept: &mut Kept) {
        self.pieces.iter().for_each(|place| place.piece.keep(kept));
    }

    /// Opens and locks the files of `config`.
    ///
    /// # Errors
    /// One is no image, or not for us.
    pub fn open(config: &DiskConfig) -> Result<Self, ImageError> {
        let mut pieces: Vec<Place> = Vec::with_capacity(1 + config.more.len());
        for path in config.pieces() {
            let piece = Piece::open(path, config)?;
            let start = pieces.last().map_or(0, |place| place.end);
            let end = start.checked_add(piece.len).filter(|end| i64::try_from(*end).is_ok());
            let end = end.ok_or_else(|| ImageError::TooLong(path.clone()))?;
            pieces.push(Place { start, end, piece });
        }
        let most = |size: fn(&Piece) -> u32| pieces.iter().map(|place| size(&place.piece)).max();
        let logical_block = most(|piece| piece.logical_block).unwrap_or(SECTOR as u32);
        let physical_block = most(|piece| piece.physical_block).unwrap_or(logical_block);
        Ok(Self {
            sectors: pieces.last().map_or(0, |place| place.end) / SECTOR,
            readonly: config.readonly,
            can_discard: pieces.iter().all(|place| place.piece.can_discard),
            logical_block,
            physical_block: physical_block.max(logical_block),
            pieces,
        })
    }

    /// Says by which file an operation at byte `at` of the disk is done, and where in it. Returns the bytes from there to
    /// the file's end on the disk: a read that asks for more ends there, and goes on in the next file.
    pub fn choose<M: Pinned>(&self, operation: &mut Operation<M>, at: u64) -> u64 {
        let Place { start, end, piece } = self.place(at);
        operation.offset = at - start;
        operation.file = piece.file_for(operation).clone();
        end.saturating_sub(at)
    }

    /// Where byte `at` is.
    fn place(&self, at: u64) -> &Place {
        // The first one begins at 0.
        &self.pieces[self.pieces.partition_point(|place| place.start <= at) - 1]
    }

    /// Puts a file in place that fails as a test wants it.
    #[cfg(test)]
    pub fn replace_file(&mut self, file: File) {
        self.pieces[0].piece.replace_file(file);
    }

    /// The file with byte `at`, by way of the page cache, which takes any alignment.
    pub fn buffered(&self, at: u64) -> &Arc<File> {
        self.place(at).piece.buffered()
    }
}
