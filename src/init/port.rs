//! One I/O port.

use std::arch::asm;

/// A port that this process may write to.
pub struct Port(u16);

impl Port {
    /// Asks the kernel for the port. `None` where it gives none (`CONFIG_X86_IOPL_IOPERM` off, or not root).
    pub fn open(port: u16) -> Option<Self> {
        // SAFETY: the call changes which ports this process may use and touches no memory.
        let result = unsafe { libc::ioperm(port.into(), 1, 1) };
        (result == 0).then_some(Self(port))
    }

    /// Writes a byte.
    pub fn write(&self, byte: u8) {
        // SAFETY: `open` got this port; a write to it touches no memory or flags of this process.
        unsafe {
            asm!("out dx, al", in("dx") self.0, in("al") byte, options(nomem, nostack, preserves_flags));
        };
    }
}
