//! The programs that were started, and who waits for each; process 1 has to wait for all others, too.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// Where the status of each goes, by process number.
static RUNNING: LazyLock<Mutex<HashMap<Pid, File>>> = LazyLock::new(Mutex::default);
/// There is one more.
static ADDED: Condvar = Condvar::new();

fn running() -> MutexGuard<'static, HashMap<Pid, File>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a program. From the file comes one byte when it has ended: its exit status, or 128 and the signal's number.
///
/// # Errors
/// Those of `start`, or no descriptor is left.
pub fn start(start: impl FnOnce() -> io::Result<Child>) -> io::Result<(Pid, File)> {
    let (status, to_status) = pipe_with(PipeFlags::CLOEXEC)?;
    // Held, so that it is not waited for before it is known.
    let mut running = running();
    let pid = Pid::from_child(&start()?);
    running.insert(pid, to_status.into());
    ADDED.notify_one();
    Ok((pid, status.into()))
}

/// Sends a program a signal.
///
/// # Errors
/// It has ended.
pub fn signal(pid: Pid, signal: Signal) -> io::Result<()> {
    // Nothing that is in there has been waited for, so the number is still its own.
    match running().contains_key(&pid) {
        true => Ok(kill_process(pid, signal)?),
        false => Err(rustix::io::Errno::SRCH.into()),
    }
}

/// Waits for every child, orphans too, for ever.
pub fn reap() -> ! {
    loop {
        match ended() {
            Some(pid) => {
                let mut running = running();
                let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::NOHANG) else { continue };
                let status = ExitStatus::from_raw(status.as_raw());
                let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(255);
                if let Some(mut to) = running.remove(&pid) {
                    // Nobody need listen any more.
                    let _ = to.write_all(&[code as u8]);
                }
            }
            // No children now.
            None => {
                let running = running();
                if running.is_empty() {
                    drop(ADDED.wait(running));
                }
            }
        }
    }
}

/// A child that has ended and is not waited for yet. `None`: there are no children.
fn ended() -> Option<Pid> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOWAIT;
    loop {
        // SAFETY: the kernel writes to `info` alone, which is valid for that.
        if unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), options) } == 0 {
            // SAFETY: all zeros is a value, and the kernel has written another over it.
            let info = unsafe { info.assume_init() };
            // SAFETY: what waitid gives is of the kind of SIGCHLD's, which has a process number.
            return Pid::from_raw(unsafe { info.si_pid() });
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None;
        }
    }
}
