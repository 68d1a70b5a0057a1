//! How a VM ended, and the exit status of each way.

use crate::vcpu::Fault;

/// How a VM ended.
#[derive(Debug)]
pub enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest rebooted: for a microVM the end, too.
    Reset,
    /// The guest chose a status.
    Exit(u8),
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU could not go on.
    Fault(Fault),
    /// `--timeout` passed.
    Timeout,
    /// A signal asked microvm to stop.
    Signal(u8),
    /// The user typed `Ctrl-A x`.
    Escape,
    /// The control socket asked for it.
    Stop,
}

impl End {
    /// The exit status of `microvm boot`.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reset => 0,
            Self::Exit(status) => *status,
            Self::Panic => 101,
            Self::Fault(_) => 102,
            Self::Timeout => 124,
            Self::Signal(number) => number.saturating_add(128),
            // As Ctrl-C leaves other programs.
            Self::Escape => 130,
            // As SIGTERM, of which it is the other form.
            Self::Stop => 143,
        }
    }
}
