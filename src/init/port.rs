//! One I/O port.

use std::arch::asm;

/// A port that this process may write to.
pub struct Port(u16);

impl Port {
    /// Asks the kernel for the port. `None` where it gives none (`CONFIG_X86_IOPL_IOPERM` off, or not root).
    pub fn open(port: u16) -> Option<Self> {
        // SAFETY: the call changes which ports this process may use and touches no memory.
        let result = unsafe { libc::ioperm(port.into(), 2, 1) };
        (result == 0).then_some(Self(port))
    }

    /// Writes two bytes at once.
    pub fn write16(&self, value: u16) {
        // SAFETY: a port's neighbour belongs to the same device here, and the kernel checks both; as below otherwise.
        unsafe {
            asm!("out dx, ax", in("dx") self.0, in("ax") value, options(nomem, nostack, preserves_flags));
        };
    }

    /// Writes a byte.
    pub fn write(&self, byte: u8) {
        // SAFETY: `open` got this port; a write to it touches no memory or flags of this process.
        unsafe {
            asm!("out dx, al", in("dx") self.0, in("al") byte, options(nomem, nostack, preserves_flags));
        };
    }
}
