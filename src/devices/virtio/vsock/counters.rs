//! What goes through a socket device, for those who watch it.

use crate::metrics::{Counter, Gauge, Metric, Registry};

const TO_GUEST_PACKETS: Metric =
    Metric::counter("microvm_vsock_to_guest_packets_total", "Vsock packets that the guest was given.");
const TO_GUEST_BYTES: Metric =
    Metric::counter("microvm_vsock_to_guest_bytes_total", "Bytes of data in vsock packets to the guest.");
const FROM_GUEST_PACKETS: Metric =
    Metric::counter("microvm_vsock_from_guest_packets_total", "Vsock packets that the guest sent.");
const FROM_GUEST_BYTES: Metric =
    Metric::counter("microvm_vsock_from_guest_bytes_total", "Bytes of data in vsock packets from the guest.");
const DROPPED: Metric = Metric::counter(
    "microvm_vsock_dropped_packets_total",
    "Packets from the guest that were no packets, not from it, or refused while it took no refusals.",
);
const CONNECTIONS: Metric =
    Metric::counter("microvm_vsock_connections_total", "Vsock connections that either side asked for.");
const RESETS: Metric = Metric::counter(
    "microvm_vsock_resets_total",
    "Vsock connections and packets that the guest was refused.",
);
const OPEN: Metric =
    Metric::gauge("microvm_vsock_open_connections", "Vsock connections that are open or being opened.");

/// Counts since the VM's start, over all resets.
#[derive(Debug)]
pub struct VsockCounters {
    /// Packets to the guest.
    pub to_guest_packets: Counter,
    /// Bytes of data to the guest.
    pub to_guest_bytes: Counter,
    /// Packets from the guest.
    pub from_guest_packets: Counter,
    /// Bytes of data from the guest.
    pub from_guest_bytes: Counter,
    /// Packets from the guest that were no packets, not from it, or refused while it took no refusals.
    pub dropped: Counter,
    /// Connections, either side's.
    pub connections: Counter,
    /// Resets sent to the guest.
    pub resets: Counter,
    /// Connections that there are, those of programs that have not named their port among them.
    pub open: Gauge,
    /// Events that the device's thread woke up for. Of interest to tests alone.
    pub wakeups: Counter,
}

impl VsockCounters {
    /// Counters of device `id` in `metrics`.
    #[must_use]
    pub fn new(metrics: &Registry, id: &str) -> Self {
        let group = metrics.group(&[("device", id)]);
        Self {
            to_guest_packets: group.counter(TO_GUEST_PACKETS),
            to_guest_bytes: group.counter(TO_GUEST_BYTES),
            from_guest_packets: group.counter(FROM_GUEST_PACKETS),
            from_guest_bytes: group.counter(FROM_GUEST_BYTES),
            dropped: group.counter(DROPPED),
            connections: group.counter(CONNECTIONS),
            resets: group.counter(RESETS),
            open: group.gauge(OPEN),
            wakeups: Counter::default(),
        }
    }
}
