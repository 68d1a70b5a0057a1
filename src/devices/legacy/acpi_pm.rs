//! The sleep and reset registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 4.8.3.6).

use crate::arch::x86_64::acpi::{RESET_VALUE, S5_SLEEP_TYPE};
use crate::bus::{Action, BusDevice};

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
/// `SLP_EN` in the sleep control register; the type stands in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Sleep control, sleep status and reset, a byte each.
pub struct AcpiPm;

impl BusDevice for AcpiPm {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Sleep status zero: this machine never wakes from anything.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data[0]) {
            (SLEEP_CONTROL, v) if v & SLEEP_ENABLE != 0 && v >> 2 & 7 == S5_SLEEP_TYPE => Action::PowerOff,
            (RESET, RESET_VALUE) => Action::Reset,
            _ => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_switches_off() {
        assert_eq!(AcpiPm.write(0, &[SLEEP_ENABLE | S5_SLEEP_TYPE << 2]), Action::PowerOff);
        assert_eq!(AcpiPm.write(0, &[S5_SLEEP_TYPE << 2]), Action::None);
        assert_eq!(AcpiPm.write(0, &[SLEEP_ENABLE | 1 << 2]), Action::None);
        assert_eq!(AcpiPm.write(2, &[RESET_VALUE]), Action::Reset);
        assert_eq!(AcpiPm.write(2, &[0]), Action::None);
    }
}
