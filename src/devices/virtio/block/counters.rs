//! What a disk has done, for those who watch it.

use crate::metrics::{Counter, Group, Metric};

const READS: Metric = Metric::counter("microvm_disk_reads_total", "Reads that succeeded.");
const WRITES: Metric = Metric::counter("microvm_disk_writes_total", "Writes that succeeded.");
const READ_BYTES: Metric = Metric::counter("microvm_disk_read_bytes_total", "Bytes of reads that succeeded.");
const WRITTEN_BYTES: Metric =
    Metric::counter("microvm_disk_written_bytes_total", "Bytes of writes that succeeded.");
const FLUSHES: Metric = Metric::counter("microvm_disk_flushes_total", "Flushes that succeeded.");
const ERRORS: Metric = Metric::counter(
    "microvm_disk_errors_total",
    "Requests of any kind that ended with another status than OK.",
);
const THROTTLED: Metric =
    Metric::counter("microvm_disk_throttled_total", "Times that a queue had to wait for iops or bandwidth.");

/// Counts since the VM's start. They only grow.
#[derive(Clone, Debug)]
pub struct BlockCounters {
    /// Reads that succeeded.
    pub reads: Counter,
    /// Writes that succeeded.
    pub writes: Counter,
    /// Bytes of these reads.
    pub read_bytes: Counter,
    /// Bytes of these writes.
    pub written_bytes: Counter,
    /// Flushes that succeeded.
    pub flushes: Counter,
    /// Requests of any kind that ended with another status than OK.
    pub errors: Counter,
    /// Times that a queue had to wait for `iops` or `bandwidth`.
    pub throttled: Counter,
}

impl BlockCounters {
    /// Counters of a disk, registered in its group.
    pub(super) fn new(group: &Group) -> Self {
        Self {
            reads: group.counter(READS),
            writes: group.counter(WRITES),
            read_bytes: group.counter(READ_BYTES),
            written_bytes: group.counter(WRITTEN_BYTES),
            flushes: group.counter(FLUSHES),
            errors: group.counter(ERRORS),
            throttled: group.counter(THROTTLED),
        }
    }
}
