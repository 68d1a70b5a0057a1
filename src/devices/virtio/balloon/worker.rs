//! The balloon's thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EventSet};

use crate::devices::timer::Timer;
use crate::vm::Memory;

use super::super::{ActiveQueue, Chain, Interrupt, QueueError, Served};
use super::{BalloonHandle, BalloonStats, NAME, PAGE};

const INFLATE: u64 = 0;
const DEFLATE: u64 = 1;
const STATS: u64 = 2;
const REPORTS: u64 = 3;
const TIMER: u64 = 4;

/// Page numbers read at once: as many as Linux offers at once.
const BATCH: usize = 256;
/// Page numbers in one request. One that is as long as a chain may be would keep us for minutes.
const MAX_PAGES: u32 = 1 << 16;
/// How long requests are served before other events are looked at: a queue full of the longest takes many seconds, and a
/// reset, for which the guest's vCPU stands still, waits for it.
const TURN: Duration = Duration::from_millis(20);
/// A tag of 16 bits and a value of 64 (§5.5.6.3).
const STAT_LEN: usize = 10;
/// Statistics read of one answer; there are 16 tags so far.
const MAX_STATS: usize = 64;

/// The statistics queue. The driver's buffer waits here until the next answer is wanted (§5.5.6.3).
pub(super) struct Stats {
    pub requests: ActiveQueue,
    pub interval: Duration,
    pub timer: Timer,
    pub waiting: Option<u16>,
}

pub(super) struct BalloonWorker {
    pub memory: Memory,
    pub interrupt: Arc<Interrupt>,
    pub handle: BalloonHandle,
    pub inflate: ActiveQueue,
    pub deflate: ActiveQueue,
    pub stats: Option<Stats>,
    pub reports: Option<ActiveQueue>,
    pub chain: Chain,
    /// The host has refused to take a page back, which is said once.
    pub refused: bool,
}

impl Served for BalloonWorker {
    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        let watch = |fd: &dyn AsRawFd, token| (fd.as_raw_fd(), EventSet::IN, token);
        let mut events = vec![watch(&*self.inflate.notify, INFLATE), watch(&*self.deflate.notify, DEFLATE)];
        if let Some(stats) = &self.stats {
            events.extend([watch(&*stats.requests.notify, STATS), watch(&stats.timer, TIMER)]);
        }
        events.extend(self.reports.as_ref().map(|queue| watch(&*queue.notify, REPORTS)));
        events
    }

    fn event(&mut self, token: u64, _ready: EventSet, _epoll: &Epoll) {
        if let Err(e) = self.serve(token) {
            self.interrupt.needs_reset(NAME, &e);
        }
    }
}

impl BalloonWorker {
    pub fn into_queues(self) -> Vec<ActiveQueue> {
        let stats = self.stats.map(|s| s.requests);
        [Some(self.inflate), Some(self.deflate), stats, self.reports].into_iter().flatten().collect()
    }

    fn serve(&mut self, token: u64) -> Result<(), QueueError> {
        let Self { memory, interrupt, chain, refused, .. } = self;
        let mut release = |at, len| {
            let Err(e) = memory.release(at, len) else { return };
            if !std::mem::replace(refused, true) {
                log::warn!("{NAME}: this host does not take memory back: {e}");
            }
        };
        match (token, &mut self.stats, &mut self.reports) {
            (INFLATE, ..) => serve_queue(&mut self.inflate, memory.guest(), interrupt, chain, |chain| {
                for_each_run(memory.guest(), chain, &mut release)
            }),
            // The pages come back when the guest touches them.
            (DEFLATE, ..) => serve_queue(&mut self.deflate, memory.guest(), interrupt, chain, |_| Ok(())),
            (REPORTS, _, Some(queue)) => serve_queue(queue, memory.guest(), interrupt, chain, |chain| {
                chain.writable().iter().for_each(|s| release(s.address.0, s.len.into()));
                Ok(())
            }),
            (STATS, Some(stats), _) => stats.take_answers(memory.guest(), interrupt, chain, &self.handle),
            (TIMER, Some(stats), _) => stats.tick(memory.guest(), interrupt),
            _ => Ok(()),
        }
    }
}

/// Serves what is available, at most one queue full and for at most a [`TURN`] and one request, and gives each chain back: the device writes nothing into it.
fn serve_queue(
    requests: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    chain: &mut Chain,
    mut handle: impl FnMut(&Chain) -> Result<(), QueueError>,
) -> Result<(), QueueError> {
    let _ = requests.notify.read();
    if interrupt.is_reset_needed() {
        return Ok(());
    }
    let queue = &mut requests.queue;
    queue.disable_notify(memory)?;
    let begin = Instant::now();
    for _ in 0..queue.size() {
        if queue.pop(memory, chain)? {
            handle(chain)?;
            queue.push_used(memory, chain.head(), 0)?;
            queue.publish_to(memory, interrupt)?;
            if begin.elapsed() > TURN {
                break;
            }
        } else if !queue.enable_notify(memory)? {
            return Ok(());
        }
    }
    requests.serve_again();
    Ok(())
}

/// Reads a request's page numbers (§5.5.6) and calls `release` for each run of neighbours with address and length. They
/// may be any; what is no memory is for `release` to refuse.
fn for_each_run(
    memory: &GuestMemoryMmap,
    chain: &Chain,
    release: &mut impl FnMut(u64, u64),
) -> Result<(), QueueError> {
    let count = chain.readable_len() / 4;
    if count > MAX_PAGES {
        return Err(QueueError::Shape);
    }
    let mut bytes = [0; 4 * BATCH];
    for first in (0..count).step_by(BATCH) {
        let bytes = &mut bytes[..4 * BATCH.min((count - first) as usize)];
        chain.read(memory, 4 * first, bytes)?;
        let mut pages = [0u32; BATCH];
        for (page, raw) in pages.iter_mut().zip(bytes.chunks_exact(4)) {
            *page = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        }
        let pages = &mut pages[..bytes.len() / 4];
        // Linux offers them in the order in which it found them, often downwards.
        pages.sort_unstable();
        for run in pages.chunk_by(|a, b| *b - *a <= 1) {
            let (start, end) = (u64::from(run[0]), u64::from(run[run.len() - 1]) + 1);
            release(start * PAGE, (end - start) * PAGE);
        }
    }
    Ok(())
}

impl Stats {
    /// Takes what the driver tells, and keeps its buffer; of several, the last.
    fn take_answers(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
        chain: &mut Chain,
        handle: &BalloonHandle,
    ) -> Result<(), QueueError> {
        let _ = self.requests.notify.read();
        if interrupt.is_reset_needed() {
            return Ok(());
        }
        for _ in 0..self.requests.queue.size() {
            if self.requests.queue.pop(memory, chain)? {
                *handle.stats() = read_stats(memory, chain)?;
                self.ask(memory, interrupt)?;
                self.waiting = Some(chain.head());
            } else if !self.requests.queue.enable_notify(memory)? {
                return Ok(());
            }
        }
        self.requests.serve_again();
        Ok(())
    }

    /// It is time for the next answer.
    fn tick(&mut self, memory: &GuestMemoryMmap, interrupt: &Interrupt) -> Result<(), QueueError> {
        self.timer.acknowledge();
        // Fails for times that no interval is.
        let _ = self.timer.set(self.interval);
        if interrupt.is_reset_needed() { Ok(()) } else { self.ask(memory, interrupt) }
    }

    /// Gives the driver its buffer back, for the next answer. Asks nothing where it has not answered yet.
    fn ask(&mut self, memory: &GuestMemoryMmap, interrupt: &Interrupt) -> Result<(), QueueError> {
        let Some(head) = self.waiting.take() else { return Ok(()) };
        self.requests.queue.push_used(memory, head, 0)?;
        self.requests.queue.publish_to(memory, interrupt)?;
        Ok(())
    }
}

/// Reads statistics, a bounded number of them; unknown ones and half ones are left out.
fn read_stats(memory: &GuestMemoryMmap, chain: &Chain) -> Result<BalloonStats, QueueError> {
    let mut bytes = [0; STAT_LEN * MAX_STATS];
    let bytes = &mut bytes[..(chain.readable_len() as usize).min(STAT_LEN * MAX_STATS)];
    chain.read(memory, 0, bytes)?;
    let mut stats = BalloonStats::default();
    for raw in bytes.chunks_exact(STAT_LEN) {
        let (tag, value) = raw.split_at(2);
        let tag = u16::from_le_bytes([tag[0], tag[1]]);
        if let Some(place) = stats.values.get_mut(usize::from(tag)) {
            *place = value.try_into().ok().map(u64::from_le_bytes);
        }
    }
    Ok(stats)
}
