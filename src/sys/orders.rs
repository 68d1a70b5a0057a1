//! Signals for a container's program, told to the process that runs it by a real-time signal with a value (as sigqueue(3), by a
//! descriptor of the process: pidfd_send_signal(2)).

use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::process::getuid;

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

/// `siginfo_t` as sigqueue(3) fills it in.
#[repr(C)]
struct Info {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    pad: libc::c_int,
    pid: u32,
    uid: u32,
    value: u64,
    unused: [u64; 12],
}

/// Tells a process that has [`Orders`] to send its program the signal `number`. Where it has ended, no other one that has its
/// number by now gets the order, which would end it.
///
/// # Errors
/// It is not there any more, or another user's.
pub fn send(process: BorrowedFd<'_>, number: u8) -> io::Result<()> {
    let (pid, uid) = (std::process::id(), getuid().as_raw());
    let info = Info {
        signal: signal(),
        error: 0,
        code: libc::SI_QUEUE,
        pad: 0,
        pid,
        uid,
        value: number.into(),
        unused: [0; 12],
    };
    // SAFETY: `info` is laid out as the kernel reads it, and lives until the call has returned.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal(), &raw const info, 0)
    };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use rustix::process::{PidfdFlags, WaitOptions, getpid, pidfd_open, waitpid};

    use super::*;

    #[test]
    fn a_number_goes_from_process_to_process() {
        // In a process of its own: this one has other threads, which would have the signal.
        let status = super::super::fork::fork(|| {
            let Ok(mut orders) = Orders::new() else { return 1 };
            let own = || pidfd_open(getpid(), PidfdFlags::empty());
            if orders.take().is_some() || !own().is_ok_and(|own| send(own.as_fd(), 28).is_ok()) {
                return 2;
            }
            u8::from(orders.take() != Some(28)) * 3
        });
        let child = status.unwrap();
        let ended = pidfd_open(child, PidfdFlags::empty()).unwrap();
        let status = waitpid(Some(child), WaitOptions::empty());
        assert_eq!(status.unwrap().unwrap().1.exit_status(), Some(0));
        assert_eq!(send(ended.as_fd(), 1).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
