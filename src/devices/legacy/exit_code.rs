//! A port on which the guest ends the VM and chooses the exit status of `microvm`.

use crate::bus::{Action, BusDevice};

/// Statuses above this are microvm's own, or a shell's for signals.
const MAX_STATUS: u8 = 127;

/// One write-only port.
pub struct ExitCode;

impl BusDevice for ExitCode {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// A status above 127 does nothing.
    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        if data[0] <= MAX_STATUS { Action::Exit(data[0]) } else { Action::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_0_to_127() {
        assert_eq!(ExitCode.write(0, &[127]), Action::Exit(127));
        assert_eq!(ExitCode.write(0, &[128]), Action::None);
    }
}
