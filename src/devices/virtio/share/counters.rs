//! What a share has done, for those who watch it.

use crate::metrics::{Counter, Gauge, Group, Metric};

const REQUESTS: Metric =
    Metric::counter("microvm_share_requests_total", "Requests of the guest to a shared folder.");
const ERRORS: Metric = Metric::counter(
    "microvm_share_errors_total",
    "Requests that were answered with an error, those for files that are not there among them.",
);
const READ_BYTES: Metric =
    Metric::counter("microvm_share_read_bytes_total", "Bytes that the guest read from files of a share.");
const WRITTEN_BYTES: Metric =
    Metric::counter("microvm_share_written_bytes_total", "Bytes that the guest wrote to files of a share.");
const INODES: Metric = Metric::gauge(
    "microvm_share_known_files",
    "Files of a share that the guest knows, each a descriptor here.",
);
const OPEN: Metric = Metric::gauge("microvm_share_open_files", "Files of a share that the guest has open.");

/// Counts since the VM's start, over all resets.
#[derive(Clone, Debug)]
pub struct ShareCounters {
    /// Requests.
    pub requests: Counter,
    /// Requests that were answered with an error.
    pub errors: Counter,
    /// Bytes that were read.
    pub read_bytes: Counter,
    /// Bytes that were written.
    pub written_bytes: Counter,
    /// Files that the guest knows.
    pub inodes: Gauge,
    /// Files that it has open.
    pub open: Gauge,
}

impl ShareCounters {
    /// Counters of a share, registered in its group.
    pub(super) fn new(group: &Group) -> Self {
        Self {
            requests: group.counter(REQUESTS),
            errors: group.counter(ERRORS),
            read_bytes: group.counter(READ_BYTES),
            written_bytes: group.counter(WRITTEN_BYTES),
            inodes: group.gauge(INODES),
            open: group.gauge(OPEN),
        }
    }
}
