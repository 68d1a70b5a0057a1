//! From the guest to the network (virtio 1.3 §5.1.6.2).

use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::super::{ActiveQueue, Chain, QueueError};
use super::NetCounters;
use super::backend::{Backend, HEADER, MAX_FRAME, MIN_FRAME, Sent, is_gone};
use super::worker::Context;

/// How serving the queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TxEnd {
    /// The queue is empty, or will be served again.
    Idle,
    /// The backend has no room.
    Wait,
    /// The backend is gone.
    Gone,
    /// Enough for now: served again after this long.
    Throttled(Duration),
}

/// The backend is gone, and the frame with it.
struct Gone;

/// The transmit queue.
pub(super) struct Tx {
    pub(super) queue: ActiveQueue,
    chain: Chain,
}

impl Tx {
    pub(super) fn new(queue: ActiveQueue) -> Self {
        Self { queue, chain: Chain::default() }
    }

    /// Sends what the driver offers, at most a queue full of it. Without a backend, frames go nowhere.
    pub(super) fn serve(
        &mut self,
        context: &mut Context<'_>,
        mut backend: Option<&mut (dyn Backend + 'static)>,
    ) -> Result<TxEnd, QueueError> {
        let (memory, interrupt, counters) = (context.memory, context.interrupt, context.counters);
        self.queue.queue.disable_notify(memory)?;
        let mut end = TxEnd::Idle;
        for _ in 0..self.queue.queue.size() {
            if !self.queue.queue.pop(memory, &mut self.chain)? {
                self.queue.queue.publish_to(memory, interrupt)?;
                if self.queue.queue.enable_notify(memory)? {
                    continue;
                }
                return Ok(end);
            }
            if let Err(wait) = context.limit.take(self.chain.readable_len().into()) {
                counters.throttled.increment();
                self.queue.queue.undo_pop(&self.chain);
                self.queue.queue.publish_to(memory, interrupt)?;
                return Ok(TxEnd::Throttled(wait));
            }
            let sent = Self::send(memory, &self.chain, &mut backend, counters);
            match sent {
                Ok(Sent::Wait) => self.queue.queue.undo_pop(&self.chain),
                _ => self.queue.queue.push_used(memory, self.chain.head(), 0)?,
            }
            match sent {
                Ok(Sent::Done) => {}
                Ok(Sent::Wait | Sent::Kept) => {
                    self.queue.queue.publish_to(memory, interrupt)?;
                    return Ok(TxEnd::Wait);
                }
                Err(Gone) => (backend, end) = (None, TxEnd::Gone),
            }
        }
        self.queue.queue.publish_to(memory, interrupt)?;
        self.queue.serve_again();
        Ok(end)
    }

    fn send(
        memory: &GuestMemoryMmap,
        chain: &Chain,
        backend: &mut Option<&mut (dyn Backend + 'static)>,
        counters: &NetCounters,
    ) -> Result<Sent, Gone> {
        let len = chain.readable_len() as usize;
        let Some(backend) = backend.as_mut().filter(|_| (MIN_FRAME..=MAX_FRAME).contains(&len)) else {
            counters.tx_dropped.increment();
            return Ok(Sent::Done);
        };
        match backend.send(memory, chain.readable()) {
            Ok(Sent::Wait) => Ok(Sent::Wait),
            Ok(sent) => {
                counters.tx_packets.increment();
                counters.tx_bytes.add((len - HEADER) as u64);
                Ok(sent)
            }
            // An interface that is down (EIO), a full queue (ENOBUFS), a header that makes no sense (EINVAL).
            Err(e) => {
                counters.tx_errors.increment();
                if is_gone(&e) { Err(Gone) } else { Ok(Sent::Done) }
            }
        }
    }
}
