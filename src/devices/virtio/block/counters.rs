//! What a disk has done, for those who watch it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the VM's start. They only grow.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Bytes of these reads.
    pub read_bytes: AtomicU64,
    /// Bytes of these writes.
    pub write_bytes: AtomicU64,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// Requests of any kind that ended with another status than OK.
    pub errors: AtomicU64,
    /// Times that a queue had to wait for `iops` or `bandwidth`.
    pub throttled: AtomicU64,
}

/// Adds to a counter, which nothing else is ordered by.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
