//! The network card (virtio 1.3 §5.1): one pair of queues, on a tap or on `passt`.

mod backend;
mod control;
mod counters;
mod limit;
mod passt;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::Mac;
use crate::devices::DeviceControl;
use crate::metrics::Registry;
use crate::sandbox::Kept;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, NotStarted, VirtioDevice, Worker, read_config_space,
    take_queue,
};

pub use backend::Backend;
pub use passt::{Passt, PasstError};
pub use tap::{Tap, TapError};

use backend::is_gone;
use control::NetControl;
use counters::NetCounters;
use limit::Limit;
use rx::Rx;
use tx::Tx;
use worker::{NetWorker, WorkerParts};

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

/// What a card is made from.
pub struct NetParts {
    /// Its name on this host.
    pub id: String,
    /// Its address.
    pub mac: Mac,
    /// The other end.
    pub backend: Box<dyn Backend>,
    /// What the other end is called, as in `--net`.
    pub name: String,
    /// The most frames a second in each direction.
    pub iops: Option<u64>,
    /// The most bytes a second in each direction.
    pub bandwidth: Option<u64>,
}

/// What the card, its thread and the control socket know.
struct Shared {
    id: String,
    mac: Mac,
    name: String,
    link: AtomicBool,
    counters: NetCounters,
}

impl Shared {
    fn has_link(&self) -> bool {
        self.link.load(Ordering::SeqCst)
    }
}

/// What a card's thread needs of the host, made before the VM confines itself.
struct HostParts {
    /// None once it is gone.
    backend: Option<Box<dyn Backend>>,
    rx_limit: Limit,
    tx_limit: Limit,
}

/// A network card.
pub struct Net {
    shared: Arc<Shared>,
    features: u64,
    mtu: u16,
    /// Away while the card is active; lost with a thread that panicked.
    parts: Option<HostParts>,
    worker: Option<Worker<NetWorker>>,
}

impl Net {
    /// A card that counts in `metrics`.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(parts: NetParts, metrics: &Registry) -> io::Result<Self> {
        let NetParts { id, mac, backend, name, iops, bandwidth } = parts;
        let limit = || Limit::new(iops, bandwidth);
        let mtu = backend.mtu();
        let counters = NetCounters::new(metrics, &id);
        Ok(Self {
            shared: Arc::new(Shared { id, mac, name, link: AtomicBool::new(true), counters }),
            features: backend.features() | F_MAC | F_STATUS | if mtu.is_some() { F_MTU } else { 0 },
            mtu: mtu.unwrap_or(0),
            parts: Some(HostParts { backend: Some(backend), rx_limit: limit()?, tx_limit: limit()? }),
            worker: None,
        })
    }

    /// Its place on the control socket.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(NetControl(self.shared.clone()))
    }

    /// The configuration space (§5.1.4): address, link, number of queue pairs, MTU.
    fn config(&self) -> [u8; 12] {
        let mut space = [0; 12];
        let link = if self.shared.has_link() { LINK_UP } else { 0 };
        space[..6].copy_from_slice(&self.shared.mac.0);
        space[6..8].copy_from_slice(&link.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }
}

/// The thread that had them panicked.
fn no_parts() -> io::Error {
    io::Error::other("its connection to the host is lost")
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn id(&self) -> &str {
        &self.shared.id
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

    fn keep(&self, kept: &mut Kept) {
        let Some(parts) = &self.parts else { return };
        kept.add("a network card's rate limit", &parts.rx_limit);
        kept.add("a network card's rate limit", &parts.tx_limit);
        if let Some(backend) = &parts.backend {
            kept.add("a network card's tap or passt", &backend.as_fd());
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let rx = take_queue(&mut activation.queues, RX)?;
        let tx = take_queue(&mut activation.queues, TX)?;
        let mut host = self.parts.take().ok_or_else(no_parts)?;
        // What the last driver accepted counts no more, and neither does a default of the host's.
        match host.backend.as_mut().map_or(Ok(()), |b| b.set_features(activation.features)) {
            Ok(()) => {}
            // Gone between two drivers: the new one finds no link.
            Err(e) if is_gone(&e) => {
                host.backend = None;
                self.shared.link.store(false, Ordering::SeqCst);
            }
            Err(e) => {
                self.parts = Some(host);
                return Err(e.into());
            }
        }
        let worker = NetWorker::new(WorkerParts {
            rx: Rx::new(rx, activation.features),
            tx: Tx::new(tx),
            memory: activation.memory,
            interrupt: activation.interrupt,
            shared: self.shared.clone(),
            host,
        });
        match Worker::start(&self.shared.id, activation.confined, worker) {
            Ok(worker) => self.worker = Some(worker),
            Err(NotStarted { error, state }) => {
                self.parts = state.map(|worker| worker.host);
                return Err(error);
            }
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        let Some(worker) = worker.stop() else {
            self.shared.link.store(false, Ordering::SeqCst);
            return Vec::new();
        };
        self.parts = Some(worker.host);
        vec![worker.rx.queue, worker.tx.queue]
    }
}
