//! Signals for a container's program, told to the process that runs it by a real-time signal with a value (sigqueue(3)).

use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd};

use super::signals::descriptor;

/// Nothing else here uses it.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// A descriptor that turns readable when an order has come.
pub struct Orders(File);

impl Orders {
    /// Blocks the signal in this thread, and so in every thread it starts later, and routes it here.
    ///
    /// # Errors
    /// The kernel has no descriptor left.
    pub fn new() -> io::Result<Self> {
        descriptor([signal()]).map(Self)
    }

    /// An order that has come, if one has: the signal for the program.
    pub fn take(&mut self) -> Option<u8> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        // `ssi_int`, an i32 in this machine's byte order, stands behind eleven fields of 32 bits (signalfd(2)).
        u8::try_from(i32::from_ne_bytes([info[44], info[45], info[46], info[47]])).ok()
    }
}

impl AsFd for Orders {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Tells process `pid`, which has [`Orders`], to send its program the signal `number`.
///
/// # Errors
/// It is not there, or another user's.
pub fn send(pid: u32, number: u8) -> io::Result<()> {
    // 0 would be this process's whole group.
    let pid = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 0).ok_or(io::ErrorKind::NotFound)?;
    let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(number.into()) };
    // SAFETY: passes numbers: the receiver takes the value as one, and follows no pointer.
    match unsafe { libc::sigqueue(pid, signal(), value) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_goes_from_process_to_process() {
        // In a process of its own: this one has other threads, which would have the signal.
        let status = super::super::fork::fork(|| {
            let Ok(mut orders) = Orders::new() else { return 1 };
            if orders.take().is_some() || send(std::process::id(), 28).is_err() {
                return 2;
            }
            u8::from(orders.take() != Some(28)) * 3
        });
        let status = rustix::process::waitpid(Some(status.unwrap()), rustix::process::WaitOptions::empty());
        assert_eq!(status.unwrap().unwrap().1.exit_status(), Some(0));
        assert!(send(0, 1).is_err() && send(u32::MAX, 1).is_err());
    }
}
