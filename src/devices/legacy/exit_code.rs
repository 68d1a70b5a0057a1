//! A port on which the guest ends the VM and chooses the exit status of `microvm`.

use crate::bus::{Action, BusDevice};

/// Statuses above this are microvm's own, or a shell's for signals: a container's program alone has them.
const MAX_STATUS: u8 = 127;

/// One write-only port.
pub struct ExitCode;

impl BusDevice for ExitCode {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// A byte of 0 to 127 is a guest's status; more does nothing. Sixteen bits of 0 to 255 are the status of a container's
    /// program (`microvm-init`).
    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        match *data {
            [status] if status <= MAX_STATUS => Action::Exit(status),
            [status, 0] => Action::Exit(status),
            _ => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_0_to_127() {
        assert_eq!(ExitCode.write(0, &[127]), Action::Exit(127));
        assert_eq!(ExitCode.write(0, &[128]), Action::None);
        assert_eq!(ExitCode.write(0, &[137, 0]), Action::Exit(137));
        assert_eq!(ExitCode.write(0, &[1, 1]), Action::None);
        assert_eq!(ExitCode.write(0, &[1, 0, 0, 0]), Action::None);
    }
}
