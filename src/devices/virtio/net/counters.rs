//! What a card counts.

use crate::metrics::{Counter, Metric, Registry};

const RX_PACKETS: Metric =
    Metric::counter("microvm_net_rx_packets_total", "Frames that the guest was given.");
const RX_BYTES: Metric =
    Metric::counter("microvm_net_rx_bytes_total", "Bytes of frames that the guest was given.");
const RX_DROPPED: Metric = Metric::counter(
    "microvm_net_rx_dropped_total",
    "Frames to the guest that did not fit its buffers, or were none.",
);
const RX_ERRORS: Metric =
    Metric::counter("microvm_net_rx_errors_total", "Frames to the guest that the host failed to hand over.");
const TX_PACKETS: Metric = Metric::counter("microvm_net_tx_packets_total", "Frames that the guest sent.");
const TX_BYTES: Metric =
    Metric::counter("microvm_net_tx_bytes_total", "Bytes of frames that the guest sent.");
const TX_DROPPED: Metric =
    Metric::counter("microvm_net_tx_dropped_total", "Frames of the guest that were none, or found no link.");
const TX_ERRORS: Metric =
    Metric::counter("microvm_net_tx_errors_total", "Frames of the guest that the host refused.");
const THROTTLED: Metric = Metric::counter(
    "microvm_net_throttled_total",
    "Waits for the limits of iops and bandwidth, both directions.",
);

/// What a card has done so far. Bytes are without virtio's header.
#[derive(Clone)]
pub(super) struct NetCounters {
    pub(super) rx_packets: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) rx_dropped: Counter,
    pub(super) rx_errors: Counter,
    pub(super) tx_packets: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) tx_dropped: Counter,
    pub(super) tx_errors: Counter,
    pub(super) throttled: Counter,
}

impl NetCounters {
    /// Those of card `id`.
    pub(super) fn new(metrics: &Registry, id: &str) -> Self {
        let group = metrics.group(&[("device", id)]);
        Self {
            rx_packets: group.counter(RX_PACKETS),
            rx_bytes: group.counter(RX_BYTES),
            rx_dropped: group.counter(RX_DROPPED),
            rx_errors: group.counter(RX_ERRORS),
            tx_packets: group.counter(TX_PACKETS),
            tx_bytes: group.counter(TX_BYTES),
            tx_dropped: group.counter(TX_DROPPED),
            tx_errors: group.counter(TX_ERRORS),
            throttled: group.counter(THROTTLED),
        }
    }
}
