//! The signals that end a VM, read from a descriptor instead of a handler.

use std::fs::File;
use std::io::{self, Read};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};

/// Signals that end the VM in order. One that the parent ignores (`nohup`) stays ignored.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// A descriptor that turns readable when a signal that ends the VM has arrived.
pub struct EndSignals(File);

impl EndSignals {
    /// Blocks the signals in this thread, and so in every thread it starts later, and routes them here.
    ///
    /// # Errors
    /// The kernel has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set that it is given.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialised on the line above.
        let mut set = unsafe { set.assume_init() };
        for signal in ENDING {
            // SAFETY: `set` is an initialised signal set and `signal` a valid number.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: `set` is valid for reading; the old mask is not asked for.
        let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: `set` is valid for reading; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is open, new, and owned by nobody else.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The number of a signal that has arrived, if one has.
    pub fn take(&mut self) -> Option<u8> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        // `ssi_signo` is the first field: a u32 in this machine's byte order.
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        u8::try_from(number).ok()
    }
}

impl AsFd for EndSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
