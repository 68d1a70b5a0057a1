//! The memory balloon (virtio 1.3 §5.5): the guest gives pages up, and the host has them back.
//!
//! How large it should be is set at run time through a [`BalloonHandle`]. The driver comes when it comes, or never:
//! a target waits in the configuration space, and nobody waits for it.

mod control;
mod handle;
#[cfg(test)]
pub(super) mod tests;
mod worker;

use std::time::Duration;

use crate::config::{BalloonConfig, Size};
use crate::devices::DeviceControl;
use crate::devices::timer::Timer;

use super::{
    ActivateError, Activation, ActiveQueue, Chain, DeviceKind, Served, VirtioDevice, Worker, WorkerControl,
    read_config_space, take_queue,
};

pub use handle::{BalloonHandle, BalloonStats, BalloonStatus, TargetTooLarge};
use worker::{BalloonWorker, Stats};

/// `VIRTIO_BALLOON_F_STATS_VQ` (§5.5.3).
const F_STATS: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_REPORTING: u64 = 1 << 5;

/// Linux uses one entry at a time, and 32 for reports.
const QUEUE_SIZES: [u16; 4] = [128; 4];
/// `actual` in the configuration space, which the driver writes (§5.5.4).
const ACTUAL: u64 = 4;
/// The balloon's page, whatever the guest's is (§5.5.6).
const PAGE: u64 = 4096;

/// Of statistics, which nobody gets who has not set one.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);

const NAME: &str = "balloon";

/// The memory balloon.
pub struct Balloon {
    features: u64,
    stats_interval: Option<Duration>,
    handle: BalloonHandle,
    worker: Option<Worker<BalloonWorker>>,
}

impl Balloon {
    /// A balloon for a guest with `memory`.
    #[must_use]
    pub fn new(config: &BalloonConfig, memory: Size) -> Self {
        let bit = |on, feature| if on { feature } else { 0 };
        Self {
            features: bit(config.stats.is_some(), F_STATS)
                | bit(config.deflate_on_oom, F_DEFLATE_ON_OOM)
                | bit(config.free_page_reporting, F_REPORTING),
            stats_interval: config.stats.map(|seconds| Duration::from_secs(seconds.into())),
            handle: BalloonHandle::new(config.size, memory),
            worker: None,
        }
    }

    /// The way to change its target and to see its state while the VM runs.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    /// Its place on the control socket.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(control::BalloonControl(self.handle()))
    }

    /// What its thread serves, for who serves it without a thread, as a fuzzer.
    ///
    /// # Errors
    /// A queue is missing, or the host has no descriptor left.
    pub fn serving(&self, activation: Activation) -> Result<impl Served + use<>, ActivateError> {
        self.worker_of(activation)
    }

    fn worker_of(&self, mut activation: Activation) -> Result<BalloonWorker, ActivateError> {
        let has = |feature| activation.features & feature != 0;
        let (has_stats, has_reports) = (has(F_STATS), has(F_REPORTING));
        let queues = &mut activation.queues;
        Ok(BalloonWorker {
            inflate: take_queue(queues, 0)?,
            deflate: take_queue(queues, 1)?,
            stats: has_stats.then(|| self.stats(queues)).transpose()?,
            // A queue that the driver left out shifts those behind it, as Linux and QEMU count (not as §5.5.2 does).
            reports: has_reports.then(|| take_queue(queues, 2 + u16::from(has_stats))).transpose()?,
            memory: activation.memory,
            interrupt: activation.interrupt,
            handle: self.handle.clone(),
            chain: Chain::default(),
            refused: false,
        })
    }

    /// The statistics queue, and when to ask.
    fn stats(&self, queues: &mut Vec<ActiveQueue>) -> Result<Stats, ActivateError> {
        let interval = self.stats_interval.unwrap_or(DEFAULT_INTERVAL);
        let timer = Timer::new()?;
        timer.set(interval)?;
        Ok(Stats { requests: take_queue(queues, 2)?, interval, timer, waiting: None })
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn id(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        let optional = (self.features & (F_STATS | F_REPORTING)).count_ones();
        &QUEUE_SIZES[..2 + optional as usize]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.handle.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.handle.actual().to_le_bytes();
        for (byte, i) in data.iter().zip(0..) {
            let at = offset.checked_add(i).and_then(|at| at.checked_sub(ACTUAL));
            if let Some(place) = at.and_then(|at| actual.get_mut(usize::try_from(at).ok()?)) {
                *place = *byte;
            }
        }
        self.handle.set_actual(u32::from_le_bytes(actual));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let confined = activation.confined;
        let interrupt = activation.interrupt.clone();
        let worker = self.worker_of(activation)?;
        // Before the thread, which may find the driver's first statistics at once.
        self.handle.start(interrupt);
        self.worker = Some(Worker::start(NAME, confined, worker).inspect_err(|_| self.handle.stop())?);
        Ok(())
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.worker.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        self.handle.stop();
        self.worker.take().and_then(Worker::stop).map(BalloonWorker::into_queues).unwrap_or_default()
    }
}
