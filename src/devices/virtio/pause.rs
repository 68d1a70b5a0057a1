//! How the thread of a device is paused, resumed and stopped: a handshake.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::sys::event::new_event;

/// The way to pause a device's thread from another one. Clones control the same thread.
#[derive(Clone)]
pub struct WorkerControl(Arc<Shared>);

struct Shared {
    name: String,
    /// Signalled when the thread has something to obey.
    wake: EventFd,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Asked to pause, and not there yet.
    Pausing,
    Paused,
    /// Asked to end.
    Stopping,
    /// The thread is gone.
    Ended,
}

/// What a thread does after it has obeyed.
pub(super) enum Next {
    Serve,
    End,
}

impl WorkerControl {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            name: name.into(),
            wake: new_event()?,
            phase: Mutex::new(Phase::Serving),
            changed: Condvar::new(),
        })))
    }

    /// Whose it is, for the log.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Asks the thread to finish what is under way and to do nothing then. Does not wait for it.
    pub fn ask_to_pause(&self) {
        self.change(|phase| if phase == Phase::Serving { Phase::Pausing } else { phase });
    }

    /// Waits until the thread has paused, or is gone, but not after `deadline`; says whether it has. Until
    /// [`WorkerControl::resume`] it touches no guest memory then.
    #[must_use]
    pub fn is_paused_by(&self, deadline: Instant) -> bool {
        let is_working = |phase: &mut Phase| !matches!(phase, Phase::Paused | Phase::Ended);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.0.changed.wait_timeout_while(self.phase(), left, is_working);
        !is_working(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Lets the thread go on, also where it has not come to pause yet.
    pub fn resume(&self) {
        self.change(|phase| match phase {
            Phase::Pausing | Phase::Paused => Phase::Serving,
            other => other,
        });
    }

    /// Asks the thread to end.
    pub(super) fn stop(&self) {
        self.change(|phase| if phase == Phase::Ended { phase } else { Phase::Stopping });
    }

    /// What the thread does when it has been woken: where it is to pause it calls `drain` and stays here until it is
    /// resumed or stopped.
    pub(super) fn obey(&self, drain: impl FnOnce()) -> Next {
        let _ = self.0.wake.read();
        if *self.phase() == Phase::Pausing {
            drain();
            // Not where the pause was given up meanwhile.
            self.change(|phase| if phase == Phase::Pausing { Phase::Paused } else { phase });
        }
        let is_paused = |phase: &mut Phase| *phase == Phase::Paused;
        let phase = self.0.changed.wait_while(self.phase(), is_paused);
        match *phase.unwrap_or_else(PoisonError::into_inner) {
            Phase::Stopping | Phase::Ended => Next::End,
            Phase::Serving | Phase::Pausing | Phase::Paused => Next::Serve,
        }
    }

    /// When what this returns is dropped, the thread is gone.
    pub(super) fn ends_with_this(&self) -> impl Drop + use<> {
        struct Ending(WorkerControl);
        impl Drop for Ending {
            fn drop(&mut self) {
                self.0.change(|_| Phase::Ended);
            }
        }
        Ending(self.clone())
    }

    fn change(&self, next: impl FnOnce(Phase) -> Phase) {
        let mut phase = self.phase();
        let before = std::mem::replace(&mut *phase, Phase::Serving);
        *phase = next(before);
        if *phase == before {
            return;
        }
        drop(phase);
        self.0.changed.notify_all();
        let _ = self.0.wake.write(1);
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.0.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for WorkerControl {
    fn as_raw_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}
