//! Where the time and the VM exits of a run went.

mod clock;
mod exits;
mod report;
mod timeline;

pub use clock::Clock;
pub use exits::{ExitSource, Exits};
pub use report::{TimelineFormat, write_timeline};
pub use timeline::{Phase, Timeline};
