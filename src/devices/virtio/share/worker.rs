//! The device's thread: takes requests from the queues, has the share's threads do them, and gives them back.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use vmm_sys_util::epoll::{Epoll, EventSet};

use crate::sys::event::new_event;
use crate::vm::Memory;

use super::super::{
    ActivateError, Activation, ActiveQueue, Chain, Interrupt, QueueError, Served, take_queue,
};
use super::server::{Done, Job, Order};

/// What has no answer comes in a queue of its own (virtio 1.3 §5.11.2).
pub const QUEUES: usize = 2;
const ENDED: u64 = QUEUES as u64;

/// The state of an active device.
pub struct ShareWorker {
    id: String,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    queues: [ActiveQueue; QUEUES],
    orders: Sender<Order>,
    done: Arc<Done>,
    in_flight: usize,
    /// Kept, so that a busy queue does not allocate.
    spare: Vec<Chain>,
}

impl ShareWorker {
    /// Fails where a queue is missing or the host has no descriptor left.
    pub fn new(id: &str, mut activation: Activation, orders: Sender<Order>) -> Result<Self, ActivateError> {
        let mut queue = |index| take_queue(&mut activation.queues, index);
        Ok(Self {
            id: id.into(),
            queues: [queue(0)?, queue(1)?],
            memory: activation.memory,
            interrupt: activation.interrupt,
            orders,
            done: Arc::new(Done::new(new_event()?)),
            in_flight: 0,
            spare: Vec::new(),
        })
    }

    /// Gives the queues back.
    pub fn into_queues(self) -> Vec<ActiveQueue> {
        self.queues.into()
    }

    /// Takes what is available, at most one queue full.
    fn serve(&mut self, index: usize) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        let queue = &mut self.queues[index].queue;
        queue.disable_notify(self.memory.guest())?;
        for _ in 0..queue.size() {
            let mut chain = self.spare.pop().unwrap_or_default();
            if queue.pop(self.memory.guest(), &mut chain)? {
                let (memory, done) = (self.memory.clone(), self.done.clone());
                // The threads live as long as the VM; at its very end nobody waits for an answer.
                let job = Job { queue: index, chain, memory, done };
                if self.orders.send(Order::Work(job)).is_ok() {
                    self.in_flight += 1;
                }
            } else {
                self.spare.push(chain);
                if !queue.enable_notify(self.memory.guest())? {
                    return Ok(());
                }
            }
        }
        self.queues[index].serve_again();
        Ok(())
    }

    /// Gives back what is done.
    fn give_back(&mut self) -> Result<(), QueueError> {
        let mut result = Ok(());
        for ended in self.done.take() {
            self.in_flight -= 1;
            let queue = &mut self.queues[ended.queue].queue;
            let pushed = ended
                .written
                .and_then(|written| queue.push_used(self.memory.guest(), ended.chain.head(), written));
            result = result.and(pushed);
            self.spare.push(ended.chain);
        }
        for queue in &mut self.queues {
            result = result.and(queue.queue.publish_to(self.memory.guest(), &self.interrupt));
        }
        result
    }

    fn complain(&self, result: Result<(), QueueError>) {
        if let Err(e) = result {
            self.interrupt.needs_reset(&self.id, &e);
        }
    }
}

impl Served for ShareWorker {
    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        let queues = self.queues.iter().enumerate();
        let mut events: Vec<_> =
            queues.map(|(token, queue)| (queue.notify.as_raw_fd(), EventSet::IN, token as u64)).collect();
        events.push((self.done.event.as_raw_fd(), EventSet::IN, ENDED));
        events
    }

    fn event(&mut self, token: u64, _ready: EventSet, _epoll: &Epoll) {
        if token == ENDED {
            let _ = self.done.event.read();
            let result = self.give_back();
            return self.complain(result);
        }
        // There are no other tokens.
        let index = (token as usize).min(QUEUES - 1);
        let _ = self.queues[index].notify.read();
        let result = self.serve(index);
        self.complain(result);
    }

    /// Waits for what is under way: afterwards nothing reaches guest memory any more.
    fn drain(&mut self) {
        while self.in_flight > 0 {
            self.done.wait();
            let result = self.give_back();
            self.complain(result);
        }
    }
}
