//! A process that goes on with this one's memory, for what must happen in name spaces of its own.

use std::io;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Starts a process that runs `child` and ends with what that returns. Call this only where this process has one thread.
///
/// # Errors
/// No process is left.
pub fn fork(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if let Some(pid) = divide()? {
        return Ok(pid);
    }
    let status = child();
    // SAFETY: ends this process; what the parent wants done at its exit is the parent's.
    unsafe { libc::_exit(status.into()) }
}

/// Runs `body` in a child that outlives this process: without its descriptors, streams and terminal. Call this only where
/// this process has one thread.
///
/// # Errors
/// No process is left.
pub fn leave_behind(body: impl FnOnce()) -> io::Result<()> {
    fork(|| {
        // SAFETY: the descriptors' owners are in the parent: this child ends without dropping its copies of them.
        unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
        let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let streams = null.and_then(|null| {
            dup2_stdin(&null)?;
            dup2_stdout(&null)?;
            dup2_stderr(&null)
        });
        if streams.and_then(|()| setsid()).is_ok() {
            body();
        }
        0
    })
    .map(drop)
}

/// Divides this process in two: the child's number for the one that was there, nothing for the child. Call this only where
/// this process has one thread.
///
/// # Errors
/// No process is left.
pub fn divide() -> io::Result<Option<Pid>> {
    // SAFETY: the process has one thread, so the child has everything that it has, and no lock is held by a thread that
    // the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Leaves the parent's name spaces for new ones. With `NEWPID` it is the next child that enters the new one.
///
/// # Errors
/// Not root, or the kernel has none of these.
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: name spaces are no memory; descriptors and the file-system context are not unshared here.
    Ok(unsafe { unshare_unsafe(flags) }?)
}
