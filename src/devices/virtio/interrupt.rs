//! How a device reaches its driver: an interrupt, and why (virtio 1.3 §2.9, §4.2.2).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// `InterruptStatus` bit: a used buffer.
const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit: a configuration change.
const CONFIG_CHANGE: u32 = 2;

/// Lines in the log that a device's drivers get for what they do wrong. Each reset lets a driver go wrong anew, so that
/// one line each would be as many as the guest likes.
const COMPLAINTS: u32 = 8;

/// A device's interrupt. Shared by the device's threads and its transport.
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    generation: Mutex<u32>,
    needs_reset: AtomicBool,
    /// The kernel raises it, too, and notes no reason.
    is_shared: AtomicBool,
    /// How many lines are left; never filled again.
    complaints: AtomicU32,
}

impl Interrupt {
    /// `line` raises the device's interrupt in the guest.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            generation: Mutex::new(0),
            needs_reset: AtomicBool::new(false),
            is_shared: AtomicBool::new(false),
            complaints: AtomicU32::new(COMPLAINTS),
        }
    }

    /// The device has used buffers, and the driver wants to know.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Lets the kernel raise the interrupt for used buffers, without a thread of ours between. It notes no reason, so until
    /// the reset the status always has this one: a driver finds nothing new then, which it must bear (§2.7.7.1).
    pub fn share_with_kernel(&self) -> &EventFd {
        self.is_shared.store(true, Ordering::SeqCst);
        &self.line
    }

    /// The device's configuration has changed, of which the driver reads nothing in parts; else
    /// [`Interrupt::change_config`].
    pub fn config_changed(&self) {
        self.change_config(|| {});
    }

    /// Changes the device's configuration by `change`, and says so. A driver that reads old and new parts sees two
    /// generations (§2.5.1): it cannot read the generation between the change and the step.
    pub fn change_config(&self, change: impl FnOnce()) {
        let mut generation = self.lock_generation();
        change();
        *generation = generation.wrapping_add(1);
        drop(generation);
        self.raise(CONFIG_CHANGE);
    }

    /// The driver did something that leaves the device without a way on (§2.1.2, `DEVICE_NEEDS_RESET`). Says so in
    /// the log while it may.
    pub fn needs_reset(&self, device: &str, reason: &dyn std::error::Error) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            if self.may_complain() {
                log::info!(
                    "{device}: the guest's driver broke the rules, and the device waits for its reset: {reason}"
                );
            }
            self.config_changed();
        }
    }

    /// Whether there may be a line in the log about something that the guest can bring about again and again. Takes one
    /// of those that are left.
    pub(super) fn may_complain(&self) -> bool {
        self.complaints.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// Whether it waits for a reset.
    #[must_use]
    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn status(&self) -> u32 {
        let shared = if self.is_shared.load(Ordering::SeqCst) { USED_BUFFER } else { 0 };
        self.status.load(Ordering::SeqCst) | shared
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The configuration's generation. The register has 32 bits, of which the transport may show fewer.
    pub(super) fn generation(&self) -> u32 {
        *self.lock_generation()
    }

    fn lock_generation(&self) -> MutexGuard<'_, u32> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what the old driver has not seen.
    pub(super) fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.is_shared.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        // The status before the line: the guest's handler reads it at once.
        self.status.fetch_or(bit, Ordering::SeqCst);
        // Full only after 2⁶⁴ - 2 interrupts that KVM did not take.
        let _ = self.line.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event::new_event;

    #[test]
    fn what_the_kernel_raises_is_about_used_buffers_until_the_reset() {
        let interrupt = Interrupt::new(new_event().unwrap());
        assert_eq!(interrupt.status(), 0);
        interrupt.share_with_kernel().write(1).unwrap();
        interrupt.config_changed();
        assert_eq!(interrupt.status(), USED_BUFFER | CONFIG_CHANGE);
        interrupt.acknowledge(USED_BUFFER | CONFIG_CHANGE);
        assert_eq!(interrupt.status(), USED_BUFFER, "the next one may be there already");
        interrupt.reset();
        assert_eq!(interrupt.status(), 0);
    }
}
