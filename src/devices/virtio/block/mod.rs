//! A disk (virtio 1.3 §5.2): a raw file or block device. Its format is never guessed.
//!
//! The guest's memory is read and written by the kernel itself, from the file and to it; nothing is copied on the way.
//! Each queue has a thread of its own (`worker.rs`), which has io_uring or a pool of threads do the work (`engine.rs`),
//! so that a slow disk holds up neither vCPUs nor other devices.

mod control;
mod counters;
mod engine;
mod image;
mod piece;
mod request;
#[cfg(test)]
pub(super) mod tests;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{DiskConfig, DiskEngine};
use crate::devices::DeviceControl;
use crate::devices::timer::Timer;
use crate::metrics::Registry;
use crate::sandbox::{Confined, Kept};
use crate::sys::event::new_event;
use crate::sys::uring::Ring;
use crate::vm::Memory;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, NotStarted, Served, VirtioDevice, Worker,
    WorkerControl, read_config_space, take_queue,
};
use engine::{Engine, Pool};
use image::Image;
use worker::{BlockWorker, Shared, WorkerParts};

pub use counters::BlockCounters;
pub use image::ImageError;

/// What positions and lengths are counted in, whatever the block size (§5.2.4).
const SECTOR: u64 = 512;

/// `VIRTIO_BLK_F_SEG_MAX` (§5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// As deep as disks and drivers make use of.
const QUEUE_SIZE: u16 = 256;
/// One for each vCPU up to this many: each has a thread.
const MAX_QUEUES: u32 = 8;
/// A chain has two descriptors beside the data's.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The longest range of one discard: 1 GiB, so that one which has to be written with zeros ends soon.
const MAX_RANGE_SECTORS: u32 = (1 << 30) / SECTOR as u32;

/// Length of the configuration space, up to `write_zeroes_may_unmap` and its padding.
const CONFIG_LEN: usize = 60;
const CONFIG_WRITEBACK: u64 = 32;

/// A disk cannot be made.
#[derive(Debug, Error)]
pub enum BlockError {
    /// Its image.
    #[error(transparent)]
    Image(ImageError),
    /// io_uring was asked for, and this host refuses it.
    #[error(
        "--disk {path},engine=uring: this host refuses io_uring: leave the option out, or engine=threads"
    )]
    NoUring {
        /// The path.
        path: std::path::PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The host has no descriptor left.
    #[error("--disk {path}: no descriptor is left: raise the limit (ulimit -n)")]
    Host {
        /// The path.
        path: std::path::PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

impl From<ImageError> for BlockError {
    fn from(error: ImageError) -> Self {
        match error {
            // A disk of many files takes many descriptors.
            ImageError::Open { path, source } if source.raw_os_error() == Some(libc::EMFILE) => {
                Self::Host { path, source }
            }
            other => Self::Image(other),
        }
    }
}

/// What a queue needs of the host, made before the VM confines itself.
struct QueueParts {
    /// None where threads do the work.
    ring: Option<Ring<Memory>>,
    done: Arc<EventFd>,
    timer: Timer,
}

impl QueueParts {
    fn new(uring: bool) -> io::Result<Self> {
        let done = Arc::new(new_event()?);
        let ring = if uring { Some(Ring::new(QUEUE_SIZE, &done)?) } else { None };
        Ok(Self { ring, done, timer: Timer::new()? })
    }
}

/// A disk.
pub struct Block {
    shared: Arc<Shared>,
    uring: bool,
    queue_sizes: Vec<u16>,
    /// By queue; away while a worker has them.
    parts: Vec<Option<QueueParts>>,
    workers: Vec<Worker<BlockWorker>>,
    /// Behind the workers, which have its clients.
    pool: Option<Pool>,
}

impl Block {
    /// Opens and locks the image of `config` for a VM with so many vCPUs, and counts in `metrics`. `place`: its number
    /// among disks.
    ///
    /// # Errors
    /// The image cannot be used, or the host is short of something.
    pub fn open(
        config: &DiskConfig,
        place: usize,
        cpus: u32,
        metrics: &Registry,
    ) -> Result<Self, BlockError> {
        let image = Image::open(config)?;
        let host = |source| BlockError::Host { path: config.path.clone(), source };
        let uring = use_uring(config)?;
        let queues = cpus.clamp(1, MAX_QUEUES) as usize;
        let parts = (0..queues).map(|_| QueueParts::new(uring).map(Some)).collect::<Result<_, _>>();
        let id = config.name(place);
        let counters = BlockCounters::new(&metrics.group(&[("device", &id)]));
        let shared = Shared::new(id, image, counters, (config.iops, config.bandwidth.map(|b| b.0)));
        Ok(Self {
            shared: Arc::new(shared),
            uring,
            queue_sizes: vec![QUEUE_SIZE; queues],
            parts: parts.map_err(host)?,
            workers: Vec::new(),
            pool: None,
        })
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> BlockCounters {
        self.shared.counters.clone()
    }

    /// It in the list of devices: its limits can be changed.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(control::BlockControl(self.shared.clone()))
    }

    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let image = &self.shared.image;
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &image.sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &image.logical_block.to_le_bytes());
        let physical = image.physical_block / image.logical_block;
        put(24, &[physical.ilog2() as u8]);
        put(26, &(physical as u16).to_le_bytes());
        put(32, &[self.shared.writeback.load(Ordering::Relaxed).into()]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        // Discard, then write zeroes: the longest range, how many, and what they are aligned to or whether they free.
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(image.physical_block / SECTOR as u32).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        space
    }

    /// What the thread of its first queue serves, for who serves it without a thread, as a fuzzer. Other threads do the
    /// operations, or io_uring does.
    ///
    /// # Errors
    /// The queue is missing, or the host is short of something.
    pub fn serving(&mut self, mut activation: Activation) -> Result<impl Served + use<>, ActivateError> {
        let queue = take_queue(&mut activation.queues, 0)?;
        self.start_pool(activation.confined)?;
        self.worker_of(queue, &activation)
    }

    fn start_pool(&mut self, confined: Confined) -> Result<(), ActivateError> {
        if !self.uring {
            self.pool = Some(Pool::start(&self.shared.id, confined)?);
        }
        Ok(())
    }

    fn worker_of(
        &mut self,
        queue: ActiveQueue,
        activation: &Activation,
    ) -> Result<BlockWorker, ActivateError> {
        let index = usize::from(queue.index);
        let parts = match self.parts.get_mut(index).and_then(Option::take) {
            Some(parts) => parts,
            // Lost with a thread that panicked. A confined process makes no new ring.
            None if self.uring => return Err(io::Error::other("its io_uring is gone").into()),
            None => QueueParts::new(false)?,
        };
        let engine = match (parts.ring, &self.pool) {
            (Some(ring), _) => Engine::Uring(Box::new(ring)),
            (None, Some(pool)) => pool.client(parts.done.clone()).map(Engine::Threads).ok_or_else(no_pool)?,
            (None, None) => return Err(no_pool().into()),
        };
        let worker = BlockWorker::new(WorkerParts {
            queue,
            memory: activation.memory.clone(),
            interrupt: activation.interrupt.clone(),
            shared: self.shared.clone(),
            features: activation.features,
            engine,
            done: parts.done,
            timer: parts.timer,
        });
        self.shared.limits_change_for(worker.queue.notify.clone());
        Ok(worker)
    }

    fn start(&mut self, queue: ActiveQueue, activation: &Activation) -> Result<(), ActivateError> {
        let name = format!("{}-q{}", self.shared.id, queue.index);
        let worker = self.worker_of(queue, activation)?;
        match Worker::start(&name, activation.confined, worker) {
            Ok(worker) => {
                self.workers.push(worker);
                Ok(())
            }
            Err(NotStarted { error, state }) => {
                state.map(|worker| self.take_back(worker));
                Err(error)
            }
        }
    }

    /// Keeps what a worker that has ended had of the host, for the next driver, and returns its queue.
    fn take_back(&mut self, worker: BlockWorker) -> ActiveQueue {
        let BlockWorker { queue, engine, done, timer, .. } = worker;
        let ring = match engine {
            Engine::Uring(ring) => Some(*ring),
            Engine::Threads(_) => None,
        };
        self.parts[usize::from(queue.index)] = Some(QueueParts { ring, done, timer });
        queue
    }
}

fn no_pool() -> io::Error {
    io::Error::other("its threads are gone")
}

/// io_uring where the host lets us: it takes a whole batch with one system call, and needs no threads. Containers
/// and hardened hosts refuse it.
fn use_uring(config: &DiskConfig) -> Result<bool, BlockError> {
    if config.engine == Some(DiskEngine::Threads) {
        return Ok(false);
    }
    match QueueParts::new(true) {
        Ok(_) => Ok(true),
        Err(source) if config.engine == Some(DiskEngine::Uring) => {
            Err(BlockError::NoUring { path: config.path.clone(), source })
        }
        Err(e) => {
            let path = config.path.display();
            log::info!("--disk {path}: this host refuses io_uring ({e}), so threads read and write");
            Ok(false)
        }
    }
}

/// A VM ends with requests under way: its threads end before what they work on goes.
impl Drop for Block {
    fn drop(&mut self) {
        drop(self.quiesce());
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn id(&self) -> &str {
        &self.shared.id
    }

    fn features(&self) -> u64 {
        let image = &self.shared.image;
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
        if self.queue_sizes.len() > 1 {
            features |= F_MQ;
        }
        if image.readonly {
            return features | F_RO;
        }
        features |= F_CONFIG_WCE | F_WRITE_ZEROES;
        if image.can_discard { features | F_DISCARD } else { features }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The one field that a driver may write (§5.2.5): it counts where the feature was accepted.
        if let (CONFIG_WRITEBACK, [value]) = (offset, data) {
            self.shared.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn keep(&self, kept: &mut Kept) {
        self.shared.image.keep(kept);
        for parts in self.parts.iter().flatten() {
            kept.add("a disk's ended operations", &*parts.done);
            kept.add("a disk's rate limit", &parts.timer);
            if let Some(ring) = &parts.ring {
                kept.add("a disk's io_uring", ring);
            }
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        if !activation.queues.iter().any(|q| q.index == 0) {
            return Err(ActivateError::QueueMissing(0));
        }
        // Without the choice, a driver that can flush has write-back, and one that cannot has write-through.
        if activation.features & F_CONFIG_WCE == 0 {
            let writeback = activation.features & F_FLUSH != 0;
            self.shared.writeback.store(writeback, Ordering::Relaxed);
        }
        self.start_pool(activation.confined)?;
        for queue in std::mem::take(&mut activation.queues) {
            if let Err(e) = self.start(queue, &activation) {
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
        self.shared.forget_queues();
        let workers = std::mem::take(&mut self.workers);
        let stopped = workers.into_iter().filter_map(Worker::stop);
        let queues = stopped.map(|worker| self.take_back(worker)).collect();
        self.pool = None;
        self.shared.writeback.store(true, Ordering::Relaxed);
        queues
    }
}
