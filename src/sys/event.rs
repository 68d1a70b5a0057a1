//! Event descriptors.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An event that nobody has signalled. Reading one does not wait, and no program that is started has it.
///
/// # Errors
/// No descriptor is left.
pub fn new_event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}
