//! The parts of a disk, which Linux is told of (`BLKPG`, `<linux/blkpg.h>`): that takes neither a table on the disk nor a
//! kernel that reads one.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use microvm::config::MAX_PIECES;

const BLKPG: libc::Ioctl = 0x1269;
const ADD: c_int = 1;
const DELETE: c_int = 2;

/// `struct blkpg_ioctl_arg`
#[repr(C)]
struct Argument {
    op: c_int,
    flags: c_int,
    data_len: c_int,
    data: *const c_void,
}

/// `struct blkpg_partition`: bytes, a number from 1, and names that Linux does not use.
#[repr(C)]
struct Partition {
    start: i64,
    len: i64,
    number: c_int,
    names: [u8; 128],
}

/// Makes a partition of each of `lens` bytes, one behind the other from the disk's beginning. Their nodes in /dev are
/// there when this returns.
pub fn make(disk: &Path, lens: &[u64]) -> io::Result<()> {
    let disk = File::open(disk)?;
    match add_all(&disk, lens) {
        // What is in a layer can look like a table of partitions, and a kernel that knows its kind has made those.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            for number in 1..=MAX_PIECES {
                // Most are not there.
                let _ = call(&disk, DELETE, &Partition::new(number, 0, 0)?);
            }
            add_all(&disk, lens)
        }
        result => result,
    }
}

fn add_all(disk: &File, lens: &[u64]) -> io::Result<()> {
    let mut start = 0_u64;
    for (index, len) in lens.iter().enumerate() {
        call(disk, ADD, &Partition::new(index + 1, start, *len)?)?;
        start = start.checked_add(*len).ok_or(io::ErrorKind::InvalidInput)?;
    }
    Ok(())
}

impl Partition {
    fn new(number: usize, start: u64, len: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        Ok(Self {
            start: start.try_into().map_err(invalid)?,
            len: len.try_into().map_err(invalid)?,
            number: number.try_into().map_err(invalid)?,
            names: [0; 128],
        })
    }
}

fn call(disk: &File, op: c_int, partition: &Partition) -> io::Result<()> {
    let data_len = size_of::<Partition>() as c_int;
    let argument = Argument { op, flags: 0, data_len, data: (&raw const *partition).cast() };
    // SAFETY: both structures are laid out as the kernel reads them, which writes to neither, and live until the call has
    // returned.
    match unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
