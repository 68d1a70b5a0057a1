//! The entropy source (virtio 1.3 §5.4): fills the driver's buffers with the host's random bytes.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Value, json};
use vmm_sys_util::epoll::{Epoll, EventSet};

use crate::devices::DeviceControl;
use crate::metrics::{Counter, Metric, Registry};
use crate::vm::Memory;

use super::{
    ActivateError, Activation, ActiveQueue, Chain, DeviceKind, Interrupt, QueueError, Served, VirtioDevice,
    Worker, WorkerControl, take_queue,
};

/// Linux asks for 64 bytes at a time.
const QUEUE_SIZES: [u16; 1] = [16];
/// The most that one request gets, whatever it has room for: a guest must not make us work or allocate without bound.
const MAX_BYTES: usize = 4096;

/// The entropy source.
pub struct Rng {
    bytes: Counter,
    worker: Option<Worker<RngWorker>>,
}

const BYTES: Metric = Metric::counter("microvm_rng_bytes_total", "Random bytes that the guest was given.");

struct RngWorker {
    memory: Memory,
    interrupt: Arc<Interrupt>,
    requests: ActiveQueue,
    chain: Chain,
    bytes: Counter,
}

const NAME: &str = "rng";

impl Rng {
    /// An entropy source that counts in `metrics`.
    #[must_use]
    pub fn new(metrics: &Registry) -> Self {
        Self { bytes: metrics.group(&[("device", NAME)]).counter(BYTES), worker: None }
    }

    /// It in the list of devices.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        Box::new(RngControl)
    }
}

/// There is nothing to change; its counter says all.
struct RngControl;

impl DeviceControl for RngControl {
    fn id(&self) -> &str {
        NAME
    }

    fn kind(&self) -> &'static str {
        "rng"
    }

    fn describe(&self) -> Value {
        json!({})
    }
}

/// One whose counters nobody reads.
impl Default for Rng {
    fn default() -> Self {
        Self::new(&Registry::new(false))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn id(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = RngWorker {
            requests: take_queue(&mut activation.queues, 0)?,
            memory: activation.memory,
            interrupt: activation.interrupt,
            chain: Chain::default(),
            bytes: self.bytes.clone(),
        };
        self.worker = Some(Worker::start(NAME, activation.confined, worker)?);
        Ok(())
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.worker.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        self.worker.take().and_then(Worker::stop).map(|w| w.requests).into_iter().collect()
    }
}

impl Served for RngWorker {
    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        vec![(self.requests.notify.as_raw_fd(), EventSet::IN, 0)]
    }

    fn event(&mut self, _token: u64, _ready: EventSet, _epoll: &Epoll) {
        let _ = self.requests.notify.read();
        if let Err(e) = self.serve() {
            self.interrupt.needs_reset(NAME, &e);
        }
    }
}

impl RngWorker {
    fn serve(&mut self) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        let (memory, queue) = (self.memory.guest(), &mut self.requests.queue);
        queue.disable_notify(memory)?;
        // At most one queue full at a time: a guest that offers on and on must not keep us from hearing of the end.
        for _ in 0..queue.size() {
            if queue.pop(memory, &mut self.chain)? {
                let mut bytes = [0; MAX_BYTES];
                let room = (self.chain.writable_len() as usize).min(MAX_BYTES);
                // The host's generator is seeded long before a VM starts, so this neither waits nor fails.
                let filled = getrandom(&mut bytes[..room], GetRandomFlags::empty()).unwrap_or(0);
                self.chain.write(memory, 0, &bytes[..filled])?;
                self.bytes.add(filled as u64);
                queue.push_used(memory, self.chain.head(), filled as u32)?;
                queue.publish_to(memory, &self.interrupt)?;
            } else if !queue.enable_notify(memory)? {
                return Ok(());
            }
        }
        self.requests.serve_again();
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testing::{Driver, Rig};
    use super::*;

    /// For tests of all kinds of devices.
    pub fn rig() -> Rig {
        Rig {
            name: "rng",
            driver: Driver::start(Box::new(Rng::default()), &[16]),
            sizes: vec![16],
            queues: vec![0],
            stir: Box::new(|| {}),
            offer: Box::new(|driver| {
                let buffer = driver.buffer(4096);
                driver.post(0, &[], &[buffer]);
            }),
            works: Box::new(|driver| {
                let buffer = driver.buffer(64);
                driver.offer(0, &[], &[buffer]);
                assert_eq!(driver.wait_used(0), (0, 64));
            }),
        }
    }

    #[test]
    fn a_request_gets_random_bytes() {
        let mut driver = Driver::start(Box::new(Rng::new(&Registry::default())), &[16]);
        let (a, b) = (driver.buffer(64), driver.buffer(64));
        driver.offer(0, &[], &[a]);
        driver.offer(0, &[], &[b]);
        assert_eq!(driver.wait_used(0), (0, 64));
        assert_eq!(driver.wait_used(0).1, 64);
        assert_ne!(driver.bytes(a), driver.bytes(b));
    }

    #[test]
    fn a_huge_request_is_capped() {
        let mut driver = Driver::start(Box::new(Rng::new(&Registry::default())), &[16]);
        let buffer = driver.buffer(1 << 20);
        driver.offer(0, &[], &[buffer]);
        assert_eq!(driver.wait_used(0).1, MAX_BYTES as u32);
    }

    #[test]
    fn a_request_without_room_is_given_back() {
        let mut driver = Driver::start(Box::new(Rng::new(&Registry::default())), &[16]);
        let buffer = driver.buffer(64);
        driver.offer(0, &[buffer], &[]);
        assert_eq!(driver.wait_used(0).1, 0);
    }
}
