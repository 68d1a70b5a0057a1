//! The network card (virtio 1.3 §5.1): one pair of queues, on a tap or on `passt`.

mod backend;
mod passt;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::config::Mac;
use crate::devices::rate_limiter::RateLimiter;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, VirtioDevice, Worker, read_config_space, take_queue,
};

pub use backend::Backend;
pub use passt::{Passt, PasstError};
pub use tap::{Tap, TapError};

use rx::Rx;
use tx::Tx;
use worker::{Limit, NetWorker};

/// The device takes frames without a checksum (§5.1.3).
pub const F_CSUM: u64 = 1 << 0;
/// The driver takes frames without a checksum.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// The device says how large packets may be.
pub const F_MTU: u64 = 1 << 3;
/// The device has an address.
pub const F_MAC: u64 = 1 << 5;
/// The driver takes segments of TCP over IPv4 that are larger than the MTU.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// The same over IPv6.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// The device takes segments of TCP over IPv4 that are larger than the MTU.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// The same over IPv6.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// A received frame may take several of the driver's buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// The device says whether there is a link.
pub const F_STATUS: u64 = 1 << 16;

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
const LINK_UP: u16 = 1;

/// What a card has done so far.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames to the guest.
    pub rx_packets: AtomicU64,
    /// Their bytes, without virtio's header.
    pub rx_bytes: AtomicU64,
    /// Frames to the guest that were too short or too long.
    pub rx_dropped: AtomicU64,
    /// Frames to the guest that the host failed to hand over.
    pub rx_errors: AtomicU64,
    /// Frames from the guest.
    pub tx_packets: AtomicU64,
    /// Their bytes, without virtio's header.
    pub tx_bytes: AtomicU64,
    /// Frames from the guest that were too short or too long, or found no link.
    pub tx_dropped: AtomicU64,
    /// Frames from the guest that the host refused.
    pub tx_errors: AtomicU64,
    /// How often a frame of either direction had to wait for the rate limit.
    pub throttled: AtomicU64,
}

/// A network card.
pub struct Net {
    id: String,
    mac: Mac,
    features: u64,
    mtu: u16,
    /// Away while the card is active; lost with a link that is.
    backend: Option<Box<dyn Backend>>,
    link: Arc<AtomicBool>,
    counters: Arc<NetCounters>,
    worker: Option<Worker<NetWorker>>,
    iops: Option<u64>,
    bandwidth: Option<u64>,
}

impl Net {
    /// A card of address `mac` on `backend`.
    #[must_use]
    pub fn new(id: String, mac: Mac, backend: Box<dyn Backend>) -> Self {
        let mtu = backend.mtu();
        Self {
            id,
            mac,
            features: backend.features() | F_MAC | F_STATUS | if mtu.is_some() { F_MTU } else { 0 },
            mtu: mtu.unwrap_or(0),
            backend: Some(backend),
            link: Arc::new(AtomicBool::new(true)),
            counters: Arc::default(),
            worker: None,
            iops: None,
            bandwidth: None,
        }
    }

    /// With so many frames and bytes a second in each direction at most.
    #[must_use]
    pub fn with_limits(self, iops: Option<u64>, bandwidth: Option<u64>) -> Self {
        Self { iops, bandwidth, ..self }
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> Arc<NetCounters> {
        self.counters.clone()
    }

    /// The configuration space (§5.1.4): address, link, number of queue pairs, MTU.
    fn config(&self) -> [u8; 12] {
        let mut space = [0; 12];
        let link = if self.link.load(Ordering::SeqCst) { LINK_UP } else { 0 };
        space[..6].copy_from_slice(&self.mac.0);
        space[6..8].copy_from_slice(&link.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let rx = take_queue(&mut activation.queues, RX)?;
        let tx = take_queue(&mut activation.queues, TX)?;
        // What the last driver accepted counts no more, and neither does a default of the host's.
        if let Some(backend) = &mut self.backend {
            backend.set_features(activation.features)?;
        }
        let limiter = || RateLimiter::new(self.iops, self.bandwidth);
        let (rx_limit, tx_limit) = (Limit::new()?, Limit::new()?);
        let worker = NetWorker {
            id: self.id.clone(),
            rx: Rx::new(rx, activation.features, limiter()),
            tx: Tx::new(tx, limiter()),
            memory: activation.memory,
            interrupt: activation.interrupt,
            backend: self.backend.take(),
            link: self.link.clone(),
            counters: self.counters.clone(),
            is_starved: false,
            is_blocked: false,
            rx_limit,
            tx_limit,
        };
        self.worker = Some(Worker::start(&self.id, activation.confined, worker)?);
        Ok(())
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        let Some(worker) = self.worker.take().and_then(Worker::stop) else { return Vec::new() };
        self.backend = worker.backend;
        vec![worker.rx.queue, worker.tx.queue]
    }
}
