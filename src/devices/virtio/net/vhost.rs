//! A card on a tap whose queues the kernel serves (vhost-net): frames pass without a thread of ours between, and the
//! kernel raises the guest's interrupt. What is left to do here is to set the kernel up, to stop it for a pause or a reset,
//! and the queue for commands.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::config::Mac;
use crate::devices::DeviceControl;
use crate::sandbox::{Kept, ThreadKind};
use crate::sys::event::new_event;
use crate::sys::link_changes::LinkChanges;
use crate::sys::vhost::{self, Region, Ring};
use crate::vm::Memory;

use super::super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt,
    NotStarted, Served, VirtioDevice, Worker, WorkerControl, read_config_space,
};
use super::backend::{Backend, is_gone};
use super::card::{Card, CardQueues, PairQueues, Shared};
use super::commands::Commands;
use super::control::NetControl;
use super::tap::Tap;
use super::{F_MRG_RXBUF, no_parts};

/// What the kernel has to speak, as the card offers it. The offloads are the tap's.
const KERNEL_FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_MRG_RXBUF;

const RX: u32 = 0;
const TX: u32 = 1;

const ERROR: u64 = 0;
const COMMAND: u64 = 1;
const LINK: u64 = 2;

/// The kernel cannot serve a tap's queues.
#[derive(Debug, Error)]
pub enum VhostError {
    /// It has no vhost-net.
    #[error("--net vhost=on: {path} cannot be opened: load its module (sudo modprobe vhost_net), or use vhost=off", path = vhost::DEVICE)]
    NoDevice(#[source] io::Error),
    /// vhost-net is not for everybody on this host.
    #[error("--net vhost=on: {path} may not be opened by this user: let them (sudo chmod 666 {path}), or use vhost=off", path = vhost::DEVICE)]
    Permission,
    /// It lacks what the card offers.
    #[error("--net vhost=on: this host's kernel is too old for it: use vhost=off")]
    Old,
    /// Something else.
    #[error("--net vhost=on: the host refuses it: use vhost=off")]
    Other(#[source] io::Error),
}

/// Kernel workers that were opened and not started.
pub struct Kernels(Vec<vhost::VhostNet>);

impl Kernels {
    /// Opens as many as there are pairs of queues.
    ///
    /// # Errors
    /// The host has none, or not for us.
    pub fn open(pairs: usize) -> Result<Self, VhostError> {
        (0..pairs).map(|_| Self::open_one()).collect::<Result<_, _>>().map(Self)
    }

    fn open_one() -> Result<vhost::VhostNet, VhostError> {
        let kernel = vhost::VhostNet::open().map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => VhostError::Permission,
            _ => VhostError::NoDevice(e),
        })?;
        let features = kernel.features().map_err(VhostError::Other)?;
        if features & KERNEL_FEATURES == KERNEL_FEATURES { Ok(kernel) } else { Err(VhostError::Old) }
    }

    /// Starts the kernel's threads, in a thread beside, as it may take some 10 ms.
    fn start(self) -> io::Result<JoinHandle<io::Result<Self>>> {
        let start = || self.0.iter().try_for_each(vhost::VhostNet::set_owner).map(|()| self);
        thread::Builder::new().name("vhost".into()).spawn(start)
    }
}

/// What a card is made from.
pub struct VhostParts {
    /// Its name on this host.
    pub id: String,
    /// Its address.
    pub mac: Mac,
    /// A queue of the tap for each pair of queues, of which all but the first are off.
    pub taps: Vec<Tap>,
    /// As many.
    pub kernels: Kernels,
    /// What the other end is called, as in `--net`.
    pub name: String,
}

/// A network card that the kernel serves.
pub struct VhostNet {
    card: Card,
    starting: Option<Starting>,
    /// None before it was prepared; away while the thread has it; lost with one that panicked.
    host: Option<Host>,
    worker: Option<Worker<VhostWorker>>,
}

/// What guest memory is awaited for.
struct Starting {
    taps: Vec<Tap>,
    kernels: JoinHandle<io::Result<Kernels>>,
}

impl VhostNet {
    /// A card, whose kernel workers start meanwhile.
    ///
    /// # Errors
    /// No thread is left.
    pub fn new(parts: VhostParts) -> Result<Self, VhostError> {
        let VhostParts { id, mac, taps, kernels, name } = parts;
        let features = taps.first().map_or(0, Backend::features);
        let shared = Shared { id, mac, name, is_vhost: true, link: AtomicBool::new(true) };
        Ok(Self {
            card: Card::new(shared, features, None, taps.len()),
            starting: Some(Starting { taps, kernels: kernels.start().map_err(VhostError::Other)? }),
            host: None,
            worker: None,
        })
    }

    /// Its place on the control socket.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(NetControl(self.card.shared.clone()))
    }
}

/// What the card has of the host.
struct Host {
    pairs: Vec<HostPair>,
    /// Signalled when the driver breaks a ring's rules.
    errors: EventFd,
    /// A tap that is removed is one, of which vhost says nothing. None where the host lets nobody listen.
    changes: Option<LinkChanges>,
}

/// One of the tap's queues, and who serves it.
struct HostPair {
    tap: Tap,
    kernel: vhost::VhostNet,
}

impl Host {
    fn new(taps: Vec<Tap>, kernels: Kernels, memory: &Memory) -> io::Result<Self> {
        let errors = new_event()?;
        let regions = regions(memory)?;
        for kernel in &kernels.0 {
            // SAFETY: guest memory, which the guest and devices share, stays mapped at these addresses until the last
            // `Memory` goes; the transport keeps one next to this card.
            unsafe { kernel.set_memory(&regions) }?;
            kernel.set_error(RX, &errors)?;
            kernel.set_error(TX, &errors)?;
        }
        let pairs = taps.into_iter().zip(kernels.0).map(|(tap, kernel)| HostPair { tap, kernel });
        let unheard = |e: &io::Error| log::info!("a tap that is removed will not be noticed: {e}");
        let changes = LinkChanges::new().inspect_err(unheard).ok();
        Ok(Self { pairs: pairs.collect(), errors, changes })
    }

    /// Whether the tap was removed, as far as its first queue knows, which is never off.
    fn is_gone(&self) -> bool {
        self.pairs.first().is_some_and(|pair| pair.tap.is_gone())
    }

    /// Sets up what the driver has set up. Nothing is served yet.
    fn set_up(&mut self, queues: &[PairQueues], activation: &Activation) -> io::Result<()> {
        let Some(first) = self.pairs.first_mut() else { return Err(no_parts()) };
        // All queues of a tap share its offloads.
        first.tap.set_features(activation.features)?;
        let call = activation.interrupt.share_with_kernel();
        for (HostPair { kernel, .. }, PairQueues { rx, tx }) in self.pairs.iter().zip(queues) {
            kernel.set_features(activation.features & KERNEL_FEATURES)?;
            set_ring(kernel, RX, rx, &activation.memory, call)?;
            set_ring(kernel, TX, tx, &activation.memory, call)?;
        }
        Ok(())
    }
}

/// Guest memory as the kernel wants to know it.
fn regions(memory: &Memory) -> io::Result<Vec<Region>> {
    let region = |region: &vm_memory::GuestRegionMmap| {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        Ok(Region { guest: region.start_addr().0, size: region.len(), host: host as u64, flags: 0 })
    };
    memory.guest().iter().map(region).collect()
}

fn set_ring(
    kernel: &vhost::VhostNet,
    index: u32,
    queue: &ActiveQueue,
    memory: &Memory,
    call: &EventFd,
) -> io::Result<()> {
    let host = |address| {
        let host = memory.guest().get_host_address(GuestAddress(address)).map_err(io::Error::other)?;
        Ok::<_, io::Error>(host as u64)
    };
    let setup = queue.queue.setup();
    let ring = Ring {
        size: setup.size,
        descriptors: host(setup.descriptors)?,
        available: host(setup.available)?,
        used: host(setup.used)?,
        next: queue.queue.position(),
        kick: &queue.notify,
        call,
    };
    // SAFETY: a `Queue` is made of rings that lie in guest memory, each in one piece of it.
    unsafe { kernel.set_ring(index, &ring) }
}

impl HostPair {
    /// Has the kernel serve the queues, also what it was not told of while it did not.
    fn go_on(&self, queues: &PairQueues) -> io::Result<()> {
        for (index, queue) in [(RX, &queues.rx), (TX, &queues.tx)] {
            self.kernel.set_backend(index, Some(self.tap.as_fd()))?;
            queue.serve_again();
        }
        Ok(())
    }

    /// When this returns, the kernel touches neither queues nor buffers.
    fn halt(&self) -> io::Result<()> {
        self.kernel.set_backend(RX, None)?;
        self.kernel.set_backend(TX, None)
    }
}

/// The rings, or what lies in them, cannot be served.
#[derive(Debug, Error)]
#[error("the host's kernel cannot serve a ring")]
struct Broken;

/// The state of the card's thread, which the kernel needs to be told to stop and to go on.
struct VhostWorker {
    host: Host,
    queues: Vec<PairQueues>,
    commands: Option<Commands>,
    /// How many pairs the driver uses (§5.1.6.5.6).
    used: usize,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    shared: Arc<Shared>,
}

impl VhostWorker {
    fn command(&mut self) {
        let Self { host, queues, commands, used, memory, interrupt, shared } = self;
        let Some(commands) = commands.as_mut().filter(|_| !interrupt.is_reset_needed()) else { return };
        let mut use_pairs = |wanted| {
            if let Err(e) = turn(host, queues, *used, wanted) {
                lose_link(shared, interrupt, &e);
            }
            *used = wanted;
        };
        if let Err(e) = commands.serve(memory.guest(), interrupt, &mut use_pairs) {
            self.interrupt.needs_reset(&self.shared.id, &e);
            self.drain();
        }
    }
}

/// Turns pairs on or off, so that the first `wanted` are on.
fn turn(host: &mut Host, queues: &[PairQueues], used: usize, wanted: usize) -> io::Result<()> {
    for (index, (pair, queues)) in host.pairs.iter_mut().zip(queues).enumerate() {
        match (index < used, index < wanted) {
            (true, false) => {
                pair.halt()?;
                pair.tap.switch(false)?;
            }
            (false, true) => {
                pair.tap.switch(true)?;
                pair.go_on(queues)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn lose_link(shared: &Shared, interrupt: &Interrupt, error: &io::Error) {
    if shared.has_link() {
        log::warn!("{}: its tap is gone; the guest goes on without a link: {error}", shared.id);
    }
    interrupt.change_config(|| shared.lose_link());
}

impl Served for VhostWorker {
    const THREAD: ThreadKind = ThreadKind::Vhost;

    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        let mut events = vec![(self.host.errors.as_raw_fd(), EventSet::IN, ERROR)];
        events.extend(self.commands.iter().map(|c| (c.queue.notify.as_raw_fd(), EventSet::IN, COMMAND)));
        events.extend(self.host.changes.iter().map(|c| (c.as_raw_fd(), EventSet::IN, LINK)));
        events
    }

    fn begin(&mut self) {
        if self.interrupt.is_reset_needed() || !self.shared.has_link() {
            return;
        }
        let mut pairs = self.host.pairs.iter().zip(&self.queues).take(self.used);
        if let Err(e) = pairs.try_for_each(|(pair, queues)| pair.go_on(queues)) {
            lose_link(&self.shared, &self.interrupt, &e);
        }
    }

    fn event(&mut self, token: u64, _ready: EventSet, _epoll: &Epoll) {
        match token {
            COMMAND => {
                self.commands.iter().for_each(|commands| drop(commands.queue.notify.read()));
                self.command();
            }
            LINK => {
                self.host.changes.iter().for_each(LinkChanges::acknowledge);
                // The kernel goes on to serve: what is sent goes nowhere, and comes back.
                if self.shared.has_link() && self.host.is_gone() {
                    lose_link(&self.shared, &self.interrupt, &io::Error::from_raw_os_error(libc::ENODEV));
                }
            }
            _ => {
                let _ = self.host.errors.read();
                self.interrupt.needs_reset(&self.shared.id, &Broken);
                self.drain();
            }
        }
    }

    fn drain(&mut self) {
        for pair in &self.host.pairs {
            if let Err(e) = pair.halt() {
                // It takes numbers of its own descriptors alone, so that it cannot be refused.
                log::error!("{}: the host's kernel does not stop serving it: {e}", self.shared.id);
            }
        }
    }

    fn stop(&mut self) {
        for (index, pair) in self.host.pairs.iter_mut().enumerate() {
            // What fails here fails again when the next driver comes. As it was before the driver: the first queue on,
            // and plain frames.
            let _ = match index {
                0 => pair.tap.set_features(0),
                _ if index < self.used => pair.tap.switch(false),
                _ => Ok(()),
            };
        }
        for (pair, queues) in self.host.pairs.iter().zip(&mut self.queues) {
            for (index, queue) in [(RX, &mut queues.rx), (TX, &mut queues.tx)] {
                let position = pair.kernel.next(index);
                position.iter().for_each(|position| queue.queue.go_on_at(*position));
            }
        }
        // A word about the old driver's rings is not about the next one's.
        let _ = self.host.errors.read();
    }
}

impl VirtioDevice for VhostNet {
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

    fn prepare(&mut self, memory: &Memory) -> io::Result<()> {
        let Some(Starting { taps, kernels }) = self.starting.take() else { return Ok(()) };
        let kernels = kernels.join().map_err(|_| io::ErrorKind::BrokenPipe)??;
        self.host = Some(Host::new(taps, kernels, memory)?);
        Ok(())
    }

    fn keep(&self, kept: &mut Kept) {
        if let Some(host) = &self.host {
            kept.add("a network card's word of a broken ring", &host.errors);
            host.changes.iter().for_each(|changes| kept.add("the word of a removed tap", changes));
            for pair in &host.pairs {
                kept.add("a network card's tap", &pair.tap.as_fd());
                kept.add("a network card's vhost-net", &pair.kernel.as_fd());
            }
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let CardQueues { pairs: queues, commands } = self.card.take_queues(&mut activation)?;
        let mut host = self.host.take().ok_or_else(no_parts)?;
        match host.set_up(&queues, &activation) {
            // Gone between two drivers: the new one finds no link.
            Err(e) if is_gone(&e) => self.card.shared.lose_link(),
            Err(e) => {
                self.host = Some(host);
                return Err(e.into());
            }
            Ok(()) => {}
        }
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        let shared = self.card.shared.clone();
        let worker = VhostWorker { host, queues, commands, used: 1, memory, interrupt, shared };
        match Worker::start(&self.card.shared.id, activation.confined, worker) {
            Ok(worker) => {
                self.worker = Some(worker);
                Ok(())
            }
            Err(NotStarted { error, state }) => {
                self.host = state.map(|worker| worker.host);
                Err(error)
            }
        }
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.worker.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        let Some(VhostWorker { host, queues, commands, .. }) = worker.stop() else {
            self.card.shared.lose_link();
            return Vec::new();
        };
        self.host = Some(host);
        let pairs = queues.into_iter().flat_map(|PairQueues { rx, tx }| [rx, tx]);
        pairs.chain(commands.map(|c| c.queue)).collect()
    }
}

#[cfg(test)]
#[path = "vhost_tests.rs"]
mod tests;
