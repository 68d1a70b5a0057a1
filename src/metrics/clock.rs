//! The one clock of a run.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, counted from this process's exec.
///
/// User space cannot see the moment of exec. What it can see is its first instruction and how much CPU time the
/// process had used by then (the kernel's part of exec included), so the origin is the one less the other. Time
/// that exec spent waiting, for the program's pages to come from a disk, is not in it.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Duration,
}

impl Clock {
    /// The name of the clock and its origin, as the JSON timeline gives it.
    pub const NAME: &'static str =
        "CLOCK_MONOTONIC since exec (first reading less the process's CPU time then)";

    /// Reads the origin; call this first in `main`.
    #[must_use]
    pub fn start() -> Self {
        let now = read(ClockId::Monotonic);
        Self { origin: now.saturating_sub(read(ClockId::ProcessCPUTime)) }
    }

    /// Time since exec.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        read(ClockId::Monotonic).saturating_sub(self.origin)
    }
}

fn read(id: ClockId) -> Duration {
    // Neither clock runs below zero.
    Duration::try_from(clock_gettime(id)).unwrap_or_default()
}
