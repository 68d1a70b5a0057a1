//! The process of a container on the host, asked from another one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::sys::orders;

use super::super::{Container, ContainerError, State};

/// The process that runs a container on the host.
pub struct HostProcess {
    name: String,
    pid: u32,
    /// Readable when it has ended.
    pub process: OwnedFd,
}

impl HostProcess {
    /// That of a container. `None`: it has ended.
    ///
    /// # Errors
    /// It is only starting, or the disk fails.
    pub fn of(container: &Container) -> Result<Option<Self>, ContainerError> {
        let name = container.record.name.clone();
        let pid = match container.state() {
            Ok(State::Running(pid)) => pid,
            Ok(State::Ended(_)) | Err(ContainerError::NotFound(_)) => return Ok(None),
            Err(e) => return Err(e),
        };
        let starting = || ContainerError::Signal {
            name: name.clone(),
            source: io::Error::other("it is only starting: try again"),
        };
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(starting)?;
        let process = pidfd_open(number, PidfdFlags::empty());
        // One that has ended meanwhile may have given its number to another.
        match (process, container.state()) {
            (Ok(process), Ok(State::Running(again))) if again == pid => Ok(Some(Self { name, pid, process })),
            (_, Ok(State::Running(_))) => Err(starting()),
            _ => Ok(None),
        }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends the container's program a signal. KILL ends all of it. One that has ended meanwhile needs none.
    ///
    /// # Errors
    /// It is not this user's.
    pub fn signal(&self, number: u8) -> Result<(), ContainerError> {
        let sent = orders::send(self.process.as_fd(), number);
        let sent = sent.or_else(|e| if e.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(e) });
        sent.map_err(|source| ContainerError::Signal { name: self.name.clone(), source })
    }
}
