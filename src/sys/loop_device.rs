//! A file as a block device (loop(4)), for kernels or file systems that mount no file directly.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

// include/uapi/linux/loop.h
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
/// The kernel frees the device when the last one that uses it has gone.
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_config`, with `struct loop_info64` in it.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    /// Device, inode, offset and size limit, and so on: all zero here.
    before_key_size: [u64; 6],
    key_size: u32,
    flags: u32,
    names_and_key: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// How often another process may be faster.
const ATTEMPTS: usize = 64;

/// Makes a block device of `file`, which must be open for writing where it is not `readonly`. It is there as long as it is
/// mounted, or this descriptor is open.
///
/// # Errors
/// Not root, a kernel without loop devices, or none is left.
pub fn attach(file: &File, readonly: bool) -> io::Result<(PathBuf, File)> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = Path::new("/dev").join(format!("loop{number}"));
        let device = OpenOptions::new().read(true).write(!readonly).open(&path)?;
        match configure(&device, file, readonly) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            result => return result.map(|()| (path, device)),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn configure(device: &File, file: &File, readonly: bool) -> io::Result<()> {
    let config = Config {
        fd: file.as_raw_fd() as u32,
        block_size: 0,
        before_key_size: [0; 6],
        key_size: 0,
        flags: LO_FLAGS_AUTOCLEAR | if readonly { LO_FLAGS_READ_ONLY } else { 0 },
        names_and_key: [0; 160],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: `config` is laid out as the kernel reads it, and lives until the call has returned.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_kernel_finds_the_flags() {
        // What a C compiler makes of <linux/loop.h>, where struct loop_info64 begins at 8.
        assert_eq!(offset_of!(Config, flags), 8 + 52);
        assert_eq!(offset_of!(Config, names_and_key), 8 + 56);
        assert_eq!(offset_of!(Config, init), 8 + 216);
        assert_eq!(offset_of!(Config, reserved), 8 + 232);
        assert_eq!(size_of::<Config>(), 304);
    }
}
