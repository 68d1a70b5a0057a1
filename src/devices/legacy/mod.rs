//! The few devices of a PC that a guest without PCI still needs.

mod acpi_pm;
mod console_output;
mod exit_code;
mod i8042;
mod mark;
mod pvpanic;
mod serial;

pub use acpi_pm::AcpiPm;
pub use console_output::ConsoleOutput;
pub use exit_code::ExitCode;
pub use i8042::I8042;
pub use mark::MarkPort;
pub use pvpanic::PvPanic;
pub use serial::{SerialInput, SerialPort, serial_port};
