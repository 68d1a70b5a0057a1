//! FUSE's messages (Linux, `include/uapi/linux/fuse.h`, protocol 7.31), as they lie in a request's buffers.
//!
//! All numbers are in the machine's order, which is little-endian here. A request is copied before it is read: its guest
//! can change nothing that was checked.

use std::ffi::CStr;

use rustix::io::Errno;

/// The protocol that is spoken here.
pub const MAJOR: u32 = 7;
/// The oldest kernel of a guest has this (Linux 5.4): page counts, 64 bytes of answer to INIT.
pub const OLDEST_MINOR: u32 = 31;
/// What is said to newer ones: nothing later is made use of.
pub const MINOR: u32 = 31;

/// The root folder's number.
pub const ROOT: u64 = 1;

/// Length of `fuse_in_header`.
pub const IN_HEADER: u32 = 40;
/// Length of `fuse_out_header`.
pub const OUT_HEADER: u32 = 16;
/// Length of `fuse_write_in`, behind which the data lie.
pub const WRITE_IN: u32 = 40;
/// Length of `fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;
/// Length of `fuse_dirent` without its name.
pub const DIRENT: usize = 24;

/// The longest name of a file (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// The longest target of a symbolic link (`PATH_MAX` with its NUL).
const MAX_TARGET: usize = 4095;

/// `FUSE_…` operations. What is not here is answered with `ENOSYS`, after which Linux asks no more.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
}

/// Flags of INIT.
pub mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
}

/// `FATTR_…`: what SETATTR is to change.
pub mod set {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// `FUSE_GETATTR_FH`: by an open file.
pub const GETATTR_FH: u32 = 1;
/// `FUSE_FSYNC_FDATASYNC`: without what only describes the file.
pub const FSYNC_DATA: u32 = 1;
/// `FOPEN_KEEP_CACHE`: what the guest has of the file stays good while its time and size do.
pub const OPEN_KEEP_CACHE: u32 = 1 << 1;

/// `fuse_in_header`, as far as it is looked at: who asks is the guest's business.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
}

impl Header {
    /// Reads the copy of a header.
    pub fn parse(raw: &[u8; IN_HEADER as usize]) -> Self {
        let half = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let whole = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        Self { opcode: half(4), unique: whole(8), node: whole(16) }
    }
}

/// What stands behind a request's header, read from front to back. Each part that is missing is `EINVAL`.
pub struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        let (value, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*value))
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        let (value, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*value))
    }

    fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.count_bytes() + 1..];
        Ok(text)
    }

    /// The name of something in a folder: one component, which leads nowhere else.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// What a symbolic link says. Nobody follows it here.
    pub fn target(&mut self) -> Result<&'a CStr, Errno> {
        let target = self.text()?;
        match target.count_bytes() {
            0 => Err(Errno::NOENT),
            len if len > MAX_TARGET => Err(Errno::NAMETOOLONG),
            _ => Ok(target),
        }
    }
}

/// What stands behind an answer's header.
#[derive(Debug, Default)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// One that says no more than that it went well.
    pub fn empty() -> Self {
        Self::default()
    }

    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// So many zeros: fields that are not used, and what fills a name up.
    pub fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// `fuse_out_header`.
pub fn out_header(len: usize, error: Option<Errno>, unique: u64) -> Reply {
    let error = error.map_or(0, |e| e.raw_os_error().wrapping_neg());
    // No answer is longer than its request's room, which 32 bits count.
    Reply::empty().u32(OUT_HEADER + len as u32).u32(error as u32).u64(unique)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_component() {
        for (bytes, expected) in [
            (&b"a\0"[..], Ok(&b"a"[..])),
            (b"...\0", Ok(b"...")),
            (b"\xff\xfe\0", Ok(b"\xff\xfe")),
            (b"a\0b", Ok(b"a")),
            (b"\0", Err(Errno::INVAL)),
            (b"", Err(Errno::INVAL)),
            (b"a", Err(Errno::INVAL)),
            (b".\0", Err(Errno::INVAL)),
            (b"..\0", Err(Errno::INVAL)),
            (b"a/b\0", Err(Errno::INVAL)),
            (b"/\0", Err(Errno::INVAL)),
            (b"../x\0", Err(Errno::INVAL)),
        ] {
            assert_eq!(Args::new(bytes).name().map(CStr::to_bytes), expected, "{bytes:?}");
        }
        let long = |len| [vec![b'x'; len], vec![0]].concat();
        assert!(Args::new(&long(255)).name().is_ok());
        assert_eq!(Args::new(&long(256)).name(), Err(Errno::NAMETOOLONG));
        assert_eq!(Args::new(&long(4096)).target(), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn what_is_missing_is_an_error() {
        let mut args = Args::new(&[1, 0, 0, 0, 2, 0, 0]);
        assert_eq!((args.u32(), args.u32(), args.u64()), (Ok(1), Err(Errno::INVAL), Err(Errno::INVAL)));
    }

    #[test]
    fn a_header_is_16_bytes() {
        let header = out_header(8, Some(Errno::NOENT), 7);
        assert_eq!(header.as_bytes()[..8], [24, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(header.len(), OUT_HEADER as usize);
    }
}
