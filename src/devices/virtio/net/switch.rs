//! Which pairs of queues the driver uses (virtio 1.3 §5.1.6.5.6): all but the first are off until it says so.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::sys::event::new_event;

/// The switch of one pair, which the control queue's thread turns and the pair's thread looks at.
pub(super) struct Switch {
    is_on: Mutex<bool>,
    turned: EventFd,
}

impl Switch {
    /// A switch that is off.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { is_on: Mutex::new(false), turned: new_event()? })
    }

    /// Turns it. When this returns, a pair that is off receives nothing more (§5.1.6.5.6.1): its thread holds the lock
    /// while it does.
    pub(super) fn turn(&self, on: bool) {
        *self.lock() = on;
        let _ = self.turned.write(1);
    }

    /// What it is, which does not change while the guard is held.
    pub(super) fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_on.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that it was turned.
    pub(super) fn acknowledge(&self) {
        let _ = self.turned.read();
    }
}

impl AsRawFd for Switch {
    fn as_raw_fd(&self) -> RawFd {
        self.turned.as_raw_fd()
    }
}
