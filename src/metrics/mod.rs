//! Where the time and the VM exits of a run went, and what its devices counted.

mod clock;
mod exits;
mod file;
mod registry;
mod report;
mod snapshot;
mod timeline;

pub use clock::Clock;
pub use exits::{ExitSource, Exits};
pub use file::MetricsFile;
pub use registry::{Counter, Gauge, Group, Label, Metric, MetricKind, Registry, Source};
pub use report::{TimelineFormat, write_timeline};
pub use snapshot::Snapshot;
pub use timeline::{Phase, Timeline};
