//! The pvpanic device (QEMU, docs/specs/pvpanic.rst): the guest's kernel tells of its panic.

use crate::bus::{Action, BusDevice};

/// The guest's kernel has panicked.
const PANICKED: u8 = 1;

/// One port: reads tell which events it takes, writes are events.
pub struct PvPanic;

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = PANICKED;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        if data[0] & PANICKED != 0 { Action::Panic } else { Action::None }
    }
}
