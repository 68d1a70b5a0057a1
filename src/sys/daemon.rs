//! Going on in the background, once it is known whether there is anything to go on with.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, setsid, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::fork::divide;

/// Which of the two processes this is.
pub enum Detached {
    /// The one that goes on.
    Child(Ready),
    /// The one that was started, and waits for the other.
    Parent(Waiting),
}

/// Tells the waiting process that this one goes on.
pub struct Ready(File);

/// Waits for the other process.
pub struct Waiting {
    child: Pid,
    ready: File,
    errors: File,
}

/// Divides this process in two, of which one has no terminal and its errors shown by the other until it is ready. Call this
/// only where this process has one thread.
///
/// # Errors
/// No process or descriptor is left.
pub fn detach() -> io::Result<Detached> {
    let (ready, to_ready) = pipe_with(PipeFlags::CLOEXEC)?;
    let (errors, to_errors) = pipe_with(PipeFlags::CLOEXEC)?;
    let null: OwnedFd = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    if let Some(child) = divide()? {
        return Ok(Detached::Parent(Waiting { child, ready: ready.into(), errors: errors.into() }));
    }
    setsid()?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&to_errors)?;
    Ok(Detached::Child(Ready(to_ready.into())))
}

impl Ready {
    /// Tells it.
    pub fn tell(mut self) {
        // It may have been killed, which changes nothing here.
        let _ = self.0.write_all(&[1]);
    }
}

impl AsRawFd for Ready {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Waiting {
    /// Waits until the other process is ready, or has ended: then this is its exit status. What it says is shown.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(mut self) -> io::Result<Option<u8>> {
        // It keeps its end of the pipe until it ends, or tells.
        let is_ready = self.ready.read(&mut [0])? > 0;
        if is_ready {
            rustix::io::ioctl_fionbio(&self.errors, true)?;
        }
        match io::copy(&mut self.errors, &mut io::stderr()) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            _ => {}
        }
        if is_ready {
            return Ok(None);
        }
        let status = waitpid(Some(self.child), WaitOptions::empty())?.map(|(_, status)| status);
        let code = status.and_then(|s| s.exit_status().or(s.terminating_signal().map(|signal| 128 + signal)));
        Ok(Some(code.map_or(125, |code| code as u8)))
    }
}
