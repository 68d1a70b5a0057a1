//! From the network to the guest (virtio 1.3 §5.1.6.3, §5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::super::{ActiveQueue, Chain, QueueError, Segment};
use super::backend::{Backend, HEADER, MAX_FRAME, MIN_FRAME, Room, is_gone, scatter};
use super::worker::Context;
use super::{F_GUEST_TSO4, F_GUEST_TSO6, F_MRG_RXBUF, F_MTU, NetCounters};

/// Pieces of memory held at once, below the kernel's limit of 1024 with those of one more chain.
const MAX_HELD: usize = 512;
/// How long nothing is received after an error that is not the end. It may have been about one frame, as of the tap's when
/// the kernel cannot say what it is in virtio's words, or come again at once, which must not keep the thread awake.
const RETRY: Duration = Duration::from_millis(10);
/// Where the header counts the buffers of a frame.
const NUM_BUFFERS: usize = 10;

/// How serving the queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RxEnd {
    /// Nothing more to receive, or the queue will be served again.
    Idle,
    /// The driver has given no buffers: there is no use in waiting for frames.
    Starved,
    /// The backend is gone.
    Gone,
    /// Enough for now: served again after this long.
    Throttled(Duration),
}

/// A chain that was taken and waits for its frame.
struct Held {
    chain: Chain,
    segments: usize,
}

/// A frame that waits for its turn, or for buffers for what is in the spill.
#[derive(Clone, Copy)]
struct Pending {
    len: usize,
    placed: usize,
}

/// The receive queue.
pub(super) struct Rx {
    pub(super) queue: ActiveQueue,
    mergeable: bool,
    /// Bytes that are taken from the queue before a frame is asked for.
    wanted: usize,
    held: VecDeque<Held>,
    segments: VecDeque<Segment>,
    capacity: usize,
    spare: Vec<Chain>,
    pending: Option<Pending>,
    spill: Box<[u8]>,
}

impl Rx {
    pub(super) fn new(queue: ActiveQueue, features: u64) -> Self {
        let mergeable = features & F_MRG_RXBUF != 0;
        let large = features & (F_GUEST_TSO4 | F_GUEST_TSO6 | F_MTU) != 0;
        Self {
            queue,
            mergeable,
            wanted: if mergeable && large { MAX_FRAME } else { 1 },
            held: VecDeque::new(),
            segments: VecDeque::new(),
            capacity: 0,
            spare: Vec::new(),
            pending: None,
            // One more than any frame, so that a longer one is seen to be longer.
            spill: vec![0; MAX_FRAME + 1].into_boxed_slice(),
        }
    }

    /// Receives into what the driver offers, at most a queue full of frames.
    pub(super) fn serve(
        &mut self,
        context: &mut Context<'_>,
        backend: &mut dyn Backend,
    ) -> Result<RxEnd, QueueError> {
        let (memory, interrupt) = (context.memory, context.interrupt);
        self.queue.queue.disable_notify(memory)?;
        for _ in 0..self.queue.queue.size() {
            let wanted = self.pending.map_or(self.wanted, |p| p.len);
            self.hold(memory, wanted)?;
            if self.held.is_empty() || self.pending.is_some_and(|p| p.len > self.capacity) {
                if self.drop_endless(context.counters) {
                    continue;
                }
                self.queue.queue.publish_to(memory, interrupt)?;
                if self.queue.queue.enable_notify(memory)? {
                    continue;
                }
                return Ok(RxEnd::Starved);
            }
            match self.one(context, backend)? {
                None => {}
                Some(end) => {
                    self.queue.queue.publish_to(memory, interrupt)?;
                    return Ok(end);
                }
            }
        }
        self.queue.queue.publish_to(memory, interrupt)?;
        self.queue.serve_again();
        Ok(RxEnd::Idle)
    }

    /// One frame. `None`: there may be another.
    fn one(
        &mut self,
        context: &mut Context<'_>,
        backend: &mut dyn Backend,
    ) -> Result<Option<RxEnd>, QueueError> {
        let (memory, counters) = (context.memory, context.counters);
        if let Some(pending) = self.pending {
            if let Err(wait) = context.limit.take(pending.len as u64) {
                counters.throttled.increment();
                return Ok(Some(RxEnd::Throttled(wait)));
            }
            self.pending = None;
            let rest = &self.spill[..pending.len - pending.placed];
            scatter(memory, self.segments.iter(), pending.placed, rest).map_err(|_| QueueError::Shape)?;
            self.complete(memory, pending.len, counters)?;
            return Ok(None);
        }
        let count = if self.mergeable { self.segments.len() } else { self.held[0].segments };
        let room = &mut Room { memory, segments: &self.segments, count, spill: &mut self.spill };
        match backend.receive(room) {
            Ok(len) => self.received(context, len)?,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(Some(RxEnd::Idle));
            }
            Err(e) => {
                counters.rx_errors.increment();
                return Ok(Some(if is_gone(&e) { RxEnd::Gone } else { RxEnd::Throttled(RETRY) }));
            }
        }
        Ok(None)
    }

    fn received(&mut self, context: &Context<'_>, len: usize) -> Result<(), QueueError> {
        let placed = if self.mergeable { self.capacity } else { self.held[0].chain.writable_len() as usize };
        let fits = len <= placed;
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) || (!fits && !self.mergeable) {
            context.counters.rx_dropped.increment();
            Ok(())
        } else if fits && !context.limit.is_limited() {
            self.complete(context.memory, len, context.counters)
        } else {
            self.pending = Some(Pending { len, placed: placed.min(len) });
            Ok(())
        }
    }

    /// Gives the chains of a frame back, the first of which says how many there are (§5.1.6.4).
    fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        len: usize,
        counters: &NetCounters,
    ) -> Result<(), QueueError> {
        let mut count = 0u16;
        let mut covered = 0;
        for held in &self.held {
            covered += held.chain.writable_len() as usize;
            count += 1;
            if covered >= len {
                break;
            }
        }
        // Without mergeable buffers it is 1, too (§5.1.6.4).
        scatter(memory, self.segments.iter(), NUM_BUFFERS, &count.to_le_bytes())
            .map_err(|_| QueueError::Shape)?;
        let mut left = len as u32;
        for _ in 0..count {
            let Some(held) = self.held.pop_front() else { break };
            let size = held.chain.writable_len();
            self.queue.queue.push_used(memory, held.chain.head(), size.min(left))?;
            left = left.saturating_sub(size);
            self.capacity -= size as usize;
            self.segments.drain(..held.segments);
            self.spare.push(held.chain);
        }
        counters.rx_packets.increment();
        counters.rx_bytes.add((len - HEADER) as u64);
        Ok(())
    }

    /// Takes chains until `wanted` bytes are held, or there are no more.
    fn hold(&mut self, memory: &GuestMemoryMmap, wanted: usize) -> Result<(), QueueError> {
        while self.capacity < wanted && self.segments.len() < MAX_HELD {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.queue.queue.pop(memory, &mut chain)? {
                self.spare.push(chain);
                return Ok(());
            }
            if !chain.readable().is_empty() || (chain.writable_len() as usize) < HEADER {
                return Err(QueueError::Shape);
            }
            self.segments.extend(chain.writable());
            self.capacity += chain.writable_len() as usize;
            self.held.push_back(Held { segments: chain.writable().len(), chain });
        }
        Ok(())
    }

    /// A frame for which as many buffers as can be held at once are too small never fits. Says whether there was one.
    fn drop_endless(&mut self, counters: &NetCounters) -> bool {
        let is_endless = self.segments.len() >= MAX_HELD && self.pending.take().is_some();
        if is_endless {
            counters.rx_dropped.increment();
        }
        is_endless
    }

    /// Puts back what was taken and not filled, last first.
    pub(super) fn give_up(&mut self) {
        while let Some(held) = self.held.pop_back() {
            self.queue.queue.undo_pop(&held.chain);
        }
        self.segments.clear();
        self.capacity = 0;
        self.pending = None;
    }
}
