//! Letting the kernel close a file in the background.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, register::Restriction};

/// How many files, on the whole host, may be about to be closed so. The kernel closes them one after the other, a VM in
/// some 23 ms: without a bound, VMs that end faster than that would pile up, and with them the closing of other
/// processes' files that waits in the same queue.
const MAX: i64 = 16;

/// A second owner of an open file, which gives it up some time after it is dropped, in a worker of the kernel: whatever
/// the file's end has to wait for, no thread of this process waits for it.
///
/// It is a ring (`io_uring_setup(2)`) with the file registered and nothing else. A ring's end is worked off in the
/// background, its files with it. It is made disabled and stays so: no operation can be given to it, nor could one be
/// with it enabled.
pub struct BackgroundClose(IoUring);

impl BackgroundClose {
    /// Becomes an owner of `file`, and of `counter`: an open file, by no other opened, whose first bytes are locked for
    /// counting. All that are counted together open the same path.
    ///
    /// # Errors
    /// This host has no io_uring, or refuses it, or too many are there: the file is then closed as any other.
    pub fn of(file: &impl AsRawFd, counter: &impl AsRawFd) -> io::Result<Self> {
        lock_a_byte(counter.as_raw_fd())?;
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(1)?;
        let submitter = ring.submitter();
        // What is not on a list is forbidden, and this list allows the registration that it is part of.
        submitter.register_restrictions(&mut [Restriction::register_op(0)])?;
        // The kernel begins at the end: the file, then the lock.
        submitter.register_files(&[counter.as_raw_fd(), file.as_raw_fd()])?;
        Ok(Self(ring))
    }
}

impl AsRawFd for BackgroundClose {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Locks one of the first [`MAX`] bytes for as long as the open file lives (`F_OFD_SETLK`, fcntl(2)): it goes with the
/// last descriptor, that of a ring included, and with a process that is killed.
fn lock_a_byte(file: RawFd) -> io::Result<()> {
    for byte in 0..MAX {
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the kernel reads the structure, which lives until the call returns.
        let result = unsafe { libc::fcntl(file, libc::F_OFD_SETLK, &raw const lock) };
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if result == 0 => return Ok(()),
            Some(libc::EAGAIN | libc::EACCES) => {}
            _ => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{MAX} others are ahead")))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, pipe};
    use std::time::{Duration, Instant};

    use super::*;

    /// Without another test's locks.
    fn counter() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().unwrap()
    }

    fn opened(counter: &tempfile::NamedTempFile) -> File {
        File::options().read(true).write(true).open(counter.path()).unwrap()
    }

    #[test]
    fn the_file_is_closed_after_its_other_owners_are_gone() {
        let (mut reader, writer) = pipe().unwrap();
        let Ok(owner) = BackgroundClose::of(&writer, &opened(&counter())) else {
            return eprintln!("no io_uring here: not tested");
        };
        drop(writer);
        assert!(!at_end(&reader), "a writer is left");
        drop(owner);
        // Returns when the kernel has closed the last writer, and not before.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn there_are_so_many_and_no_more() {
        let (_reader, writer) = pipe().unwrap();
        let counter = counter();
        let one = || BackgroundClose::of(&writer, &opened(&counter));
        let Ok(first) = one() else { return eprintln!("no io_uring here: not tested") };
        let _others: Vec<_> = (1..MAX).map(|_| one().unwrap()).collect();
        assert_eq!(one().err().unwrap().kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        let begin = Instant::now();
        while one().is_err() {
            assert!(begin.elapsed() < Duration::from_secs(20), "its place is never free again");
            std::thread::yield_now();
        }
    }

    fn at_end(reader: &impl AsRawFd) -> bool {
        let mut fds = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which lives until the call returns.
        unsafe { libc::poll(&raw mut fds, 1, 0) > 0 }
    }
}
