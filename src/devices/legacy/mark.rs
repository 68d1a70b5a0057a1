//! Port 0x80, where a PC's firmware shows how far it has come; here the guest's marks for the timeline.

use crate::bus::{Action, BusDevice};

/// One write-only port.
pub struct MarkPort;

impl BusDevice for MarkPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        Action::Mark(data[0])
    }
}
