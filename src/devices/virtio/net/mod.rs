//! The network card (virtio 1.3 §5.1), on a tap or on `passt`. Each pair of queues has a thread and a backend of its own;
//! only taps have several pairs. With vhost the kernel serves the queues of a tap ([`VhostNet`]).

mod backend;
mod card;
mod commands;
mod control;
mod counters;
mod limit;
mod passt;
mod rx;
mod switch;
mod tap;
#[cfg(test)]
pub(super) mod tests;
mod tx;
mod user_mode;
mod vhost;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::config::Mac;
use crate::devices::DeviceControl;
use crate::metrics::Registry;
use crate::sandbox::Kept;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, NotStarted, Served, VirtioDevice, Worker,
    WorkerControl, read_config_space,
};

pub use backend::Backend;
pub use passt::Passt;
pub use tap::{Tap, TapError};
pub use user_mode::{PasstError, guest_name_servers, start_pasta, user_mode_lacks};
pub use vhost::{Kernels, VhostError, VhostNet, VhostParts};

use backend::is_gone;
use card::{Card, PairQueues, Shared};
use commands::Commands;
use control::NetControl;
use counters::NetCounters;
use limit::{Limit, limiter};
use rx::Rx;
use switch::Switch;
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
/// There is a queue for commands.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// There are several pairs of queues.
pub const F_MQ: u64 = 1 << 22;

/// The most pairs of queues: each has a thread.
pub const MAX_PAIRS: usize = 8;

/// What a card is made from.
pub struct NetParts {
    /// Its name on this host.
    pub id: String,
    /// Its address.
    pub mac: Mac,
    /// The other end: one for each pair of queues, of which all but the first are off. At least one, at most
    /// [`MAX_PAIRS`].
    pub backends: Vec<Box<dyn Backend>>,
    /// What the other end is called, as in `--net`.
    pub name: String,
    /// The most frames a second in each direction.
    pub iops: Option<u64>,
    /// The most bytes a second in each direction.
    pub bandwidth: Option<u64>,
}

/// What the thread of a pair of queues needs of the host, made before the VM confines itself.
struct HostParts {
    /// None once it is gone.
    backend: Option<Box<dyn Backend>>,
    rx_limit: Limit,
    tx_limit: Limit,
    /// None for the first pair, which is always on.
    switch: Option<Arc<Switch>>,
}

/// A network card.
pub struct Net {
    card: Card,
    counters: NetCounters,
    /// By pair of queues. Away while a thread has them; lost with one that panicked.
    parts: Vec<Option<HostParts>>,
    /// By pair of queues, without gaps.
    workers: Vec<Worker<NetWorker>>,
}

impl Net {
    /// A card that counts in `metrics`.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(parts: NetParts, metrics: &Registry) -> io::Result<Self> {
        let NetParts { id, mac, backends, name, iops, bandwidth } = parts;
        let (features, mtu) =
            backends.first().map_or((0, None), |backend| (backend.features(), backend.mtu()));
        let (rx, tx) = (limiter(iops, bandwidth), limiter(iops, bandwidth));
        let host_parts = |(pair, backend)| {
            let switch = if pair > 0 { Some(Arc::new(Switch::new()?)) } else { None };
            let (rx_limit, tx_limit) = (Limit::new(rx.clone())?, Limit::new(tx.clone())?);
            Ok(Some(HostParts { backend: Some(backend), rx_limit, tx_limit, switch }))
        };
        let counters = NetCounters::new(metrics, &id);
        let shared = Shared { id, mac, name, is_vhost: false, link: AtomicBool::new(true) };
        Ok(Self {
            card: Card::new(shared, features, mtu, backends.len()),
            counters,
            parts: backends.into_iter().enumerate().map(host_parts).collect::<io::Result<_>>()?,
            workers: Vec::new(),
        })
    }

    /// Its place on the control socket.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(NetControl(self.card.shared.clone()))
    }

    /// Makes the backends do as the driver has accepted. What the last driver accepted counts no more, and neither does a
    /// default of the host's.
    fn set_features(&mut self, features: u64) -> io::Result<()> {
        // All queues of a tap share its offloads.
        let Some(first) = self.parts.first_mut().and_then(Option::as_mut) else { return Err(no_parts()) };
        match first.backend.as_mut().map_or(Ok(()), |backend| backend.set_features(features)) {
            // Gone between two drivers: the new one finds no link.
            Err(e) if is_gone(&e) => {
                first.backend = None;
                self.card.shared.lose_link();
                Ok(())
            }
            other => other,
        }
    }

    /// What the thread of its first pair of queues serves, for who serves it without a thread, as a fuzzer.
    ///
    /// # Errors
    /// A queue is missing, or this is not the first time.
    pub fn serving(&mut self, mut activation: Activation) -> Result<impl Served + use<>, ActivateError> {
        let mut queues = self.card.take_queues(&mut activation)?;
        self.worker_of(0, queues.pairs.swap_remove(0), queues.commands, &activation)
    }

    /// The state of a pair's thread.
    fn worker_of(
        &mut self,
        pair: usize,
        queues: PairQueues,
        commands: Option<Commands>,
        activation: &Activation,
    ) -> Result<NetWorker, ActivateError> {
        let host = self.parts.get_mut(pair).and_then(Option::take).ok_or_else(no_parts)?;
        let others = self.parts.get(1..commands.as_ref().map_or(1, |c| c.pairs)).unwrap_or_default();
        let switches = others.iter().flatten().filter_map(|parts| parts.switch.clone()).collect();
        let PairQueues { rx, tx } = queues;
        Ok(NetWorker::new(WorkerParts {
            pair,
            commands,
            switches,
            counters: self.counters.clone(),
            rx: Rx::new(rx, activation.features),
            tx: Tx::new(tx),
            memory: activation.memory.clone(),
            interrupt: activation.interrupt.clone(),
            shared: self.card.shared.clone(),
            host,
        }))
    }

    /// Starts the thread of a pair.
    fn start(
        &mut self,
        pair: usize,
        queues: PairQueues,
        commands: Option<Commands>,
        activation: &Activation,
    ) -> Result<(), ActivateError> {
        let worker = self.worker_of(pair, queues, commands, activation)?;
        // The first pair's thread has the card's name.
        let id = &self.card.shared.id;
        let name = if pair == 0 { id.clone() } else { format!("{id}-q{pair}") };
        match Worker::start(&name, activation.confined, worker) {
            Ok(worker) => {
                self.workers.push(worker);
                Ok(())
            }
            Err(NotStarted { error, state }) => {
                self.parts[pair] = state.map(|worker| worker.host);
                Err(error)
            }
        }
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
        &self.card.shared.id
    }

    fn features(&self) -> u64 {
        self.card.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.card.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.card.config(), offset, data);
    }

    fn keep(&self, kept: &mut Kept) {
        for parts in self.parts.iter().flatten() {
            kept.add("a network card's rate limit", &parts.rx_limit);
            kept.add("a network card's rate limit", &parts.tx_limit);
            if let Some(switch) = &parts.switch {
                kept.add("a network card's switch of a pair of queues", &**switch);
            }
            if let Some(backend) = &parts.backend {
                kept.add("a network card's tap or passt", &backend.as_fd());
            }
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let mut queues = self.card.take_queues(&mut activation)?;
        self.set_features(activation.features)?;
        for (pair, pair_queues) in queues.pairs.into_iter().enumerate() {
            if let Err(e) = self.start(pair, pair_queues, queues.commands.take(), &activation) {
                drop(self.quiesce());
                return Err(e);
            }
        }
        Ok(())
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.workers.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        let mut queues = Vec::new();
        // The first pair last: it has the queue for commands, and puts the tap back as it was.
        for worker in self.workers.drain(..).rev() {
            let Some(worker) = worker.stop() else {
                self.card.shared.lose_link();
                continue;
            };
            let NetWorker { pair, rx, tx, commands, host, .. } = worker;
            self.parts[pair] = Some(host);
            queues.extend([rx.queue, tx.queue].into_iter().chain(commands.map(|c| c.queue)));
        }
        queues
    }
}
