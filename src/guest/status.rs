//! Exit statuses that are not a program's own, as Docker and shells have them.

use std::io;

/// What runs the program failed.
pub const NOT_STARTED: u8 = 125;
/// The program may not be run.
pub const NOT_ALLOWED: u8 = 126;
/// The program is not there.
pub const NOT_FOUND: u8 = 127;
/// Ended by SIGKILL, or with its machine.
pub const KILLED: u8 = 137;

/// That of a program that cannot be run. Errors of [`io::ErrorKind::Other`] are of what runs it.
#[must_use]
pub fn of_error(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        io::ErrorKind::Other => NOT_STARTED,
        _ => NOT_ALLOWED,
    }
}
