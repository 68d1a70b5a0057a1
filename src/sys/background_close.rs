//! Letting the kernel close a file in the background.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::IoUring;

/// A second owner of an open file, which gives it up some time after it is dropped, in a worker of the kernel: whatever
/// the file's end has to wait for, no thread of this process waits for it.
///
/// It is a ring (`io_uring_setup(2)`) with the file registered and nothing else. A ring's end is worked off in the
/// background, its files with it. It is made disabled and stays so: no operation can be given to it.
pub struct BackgroundClose(IoUring);

impl BackgroundClose {
    /// Becomes an owner of `file`.
    ///
    /// # Errors
    /// This host has no io_uring, or refuses it: the file is then closed as any other.
    pub fn of(file: &impl AsRawFd) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(1)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self(ring))
    }
}

impl AsRawFd for BackgroundClose {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};

    use super::*;

    #[test]
    fn the_file_is_closed_after_its_other_owners_are_gone() {
        let (mut reader, writer) = pipe().unwrap();
        let Ok(owner) = BackgroundClose::of(&writer) else {
            return eprintln!("no io_uring here: not tested");
        };
        drop(writer);
        assert!(!at_end(&reader), "a writer is left");
        drop(owner);
        // Returns when the kernel has closed the last writer, and not before.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    fn at_end(reader: &impl AsRawFd) -> bool {
        let mut fds = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which lives until the call returns.
        unsafe { libc::poll(&raw mut fds, 1, 0) > 0 }
    }
}
