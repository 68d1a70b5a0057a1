//! The keyboard controller: a reset line and nothing else.

use crate::bus::{Action, BusDevice};

const COMMAND: u64 = 4;
/// "Pulse output bit 0 low": the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// Output buffer full, input buffer empty. A driver that empties the output finds it full for ever and takes the
/// controller for absent; a reset, which waits for an empty input buffer, goes ahead at once.
const STATUS: u8 = 1;

/// Ports 0x60 to 0x64.
pub struct I8042;

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == COMMAND {
            data[0] = STATUS;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if (offset, data[0]) == (COMMAND, PULSE_RESET) { Action::Reset } else { Action::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pulse_resets() {
        assert_eq!(I8042.write(4, &[0xfe]), Action::Reset);
        assert_eq!(I8042.write(0, &[0xfe]), Action::None);
        assert_eq!(I8042.write(4, &[0xaa]), Action::None);
    }
}
