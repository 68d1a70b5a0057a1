//! A card's thread: which queue is served when, and what is waited for.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::vm::Memory;

use super::super::{Interrupt, QueueError, Served};
use super::backend::Sent;
use super::rx::{Rx, RxEnd};
use super::tx::{Tx, TxEnd};
use super::{HostParts, Limit, NetCounters, Shared};

const RX_NOTIFY: u64 = 0;
const TX_NOTIFY: u64 = 1;
const BACKEND: u64 = 2;
const RX_TIMER: u64 = 3;
const TX_TIMER: u64 = 4;

/// The state of a card's thread.
pub(super) struct NetWorker {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    shared: Arc<Shared>,
    pub(super) host: HostParts,
    /// The driver has given no buffers.
    is_starved: bool,
    /// The backend has no room.
    is_blocked: bool,
}

/// What a worker is made from.
pub(super) struct WorkerParts {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    pub(super) memory: Memory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) shared: Arc<Shared>,
    pub(super) host: HostParts,
}

/// What serving a queue takes beside the queue.
pub(super) struct Context<'a> {
    pub(super) memory: &'a GuestMemoryMmap,
    pub(super) interrupt: &'a Interrupt,
    pub(super) counters: &'a NetCounters,
    pub(super) limit: &'a mut Limit,
}

impl NetWorker {
    /// A worker that has not begun.
    pub(super) fn new(parts: WorkerParts) -> Self {
        let WorkerParts { rx, tx, memory, interrupt, shared, host } = parts;
        Self { rx, tx, memory, interrupt, shared, host, is_starved: false, is_blocked: false }
    }

    fn serve(&mut self, token: u64, ready: EventSet, epoll: &Epoll) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        match token {
            RX_NOTIFY | RX_TIMER if self.host.rx_limit.is_reached() => Ok(()),
            TX_NOTIFY | TX_TIMER if self.is_blocked || self.host.tx_limit.is_reached() => Ok(()),
            RX_NOTIFY | RX_TIMER => {
                if token == RX_TIMER {
                    self.watch(epoll);
                }
                self.receive(epoll)
            }
            TX_NOTIFY | TX_TIMER => self.transmit(epoll),
            _ => self.backend_ready(ready, epoll),
        }
    }

    fn backend_ready(&mut self, ready: EventSet, epoll: &Epoll) -> Result<(), QueueError> {
        if ready.contains(EventSet::OUT) && self.is_blocked {
            self.unblock(epoll)?;
        }
        if ready.contains(EventSet::IN) && self.receives() {
            self.receive(epoll)?;
        }
        // These come whether asked for or not, again and again. What was sent before is received first.
        if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) && !ready.contains(EventSet::IN) {
            self.lose_link(epoll);
        }
        Ok(())
    }

    fn receive(&mut self, epoll: &Epoll) -> Result<(), QueueError> {
        let Some(backend) = &mut self.host.backend else { return Ok(()) };
        let mut context = Context {
            memory: self.memory.guest(),
            interrupt: &self.interrupt,
            counters: &self.shared.counters,
            limit: &mut self.host.rx_limit,
        };
        let end = self.rx.serve(&mut context, backend.as_mut())?;
        if end == RxEnd::Gone {
            self.lose_link(epoll);
        }
        let before = self.interest();
        self.is_starved = end == RxEnd::Starved;
        if let RxEnd::Throttled(time) = end {
            self.host.rx_limit.wait(time);
        }
        if self.interest() != before {
            self.watch(epoll);
        }
        Ok(())
    }

    fn transmit(&mut self, epoll: &Epoll) -> Result<(), QueueError> {
        let mut context = Context {
            memory: self.memory.guest(),
            interrupt: &self.interrupt,
            counters: &self.shared.counters,
            limit: &mut self.host.tx_limit,
        };
        let end = self.tx.serve(&mut context, self.host.backend.as_deref_mut())?;
        if end == TxEnd::Gone {
            self.lose_link(epoll);
        }
        if let TxEnd::Throttled(time) = end {
            self.host.tx_limit.wait(time);
        }
        if end == TxEnd::Wait {
            self.is_blocked = true;
            self.watch(epoll);
        }
        Ok(())
    }

    fn unblock(&mut self, epoll: &Epoll) -> Result<(), QueueError> {
        match self.host.backend.as_mut().map_or(Ok(Sent::Done), |b| b.flush()) {
            Ok(Sent::Wait | Sent::Kept) => return Ok(()),
            Ok(Sent::Done) => {}
            Err(_) => self.lose_link(epoll),
        }
        self.is_blocked = false;
        self.watch(epoll);
        if self.host.tx_limit.is_reached() { Ok(()) } else { self.transmit(epoll) }
    }

    fn receives(&self) -> bool {
        !self.is_starved && !self.host.rx_limit.is_reached()
    }

    fn interest(&self) -> EventSet {
        let mut set = EventSet::empty();
        set.set(EventSet::IN, self.receives());
        set.set(EventSet::OUT, self.is_blocked);
        set
    }

    fn watch(&self, epoll: &Epoll) {
        let Some(backend) = &self.host.backend else { return };
        let event = EpollEvent::new(self.interest(), BACKEND);
        if let Err(e) = epoll.ctl(ControlOperation::Modify, backend.as_fd().as_raw_fd(), event) {
            log::error!("{}: the network cannot be waited for: {e}", self.shared.id);
        }
    }

    /// The other end is gone for good: the driver finds no link, and what it sends goes nowhere.
    fn lose_link(&mut self, epoll: &Epoll) {
        let Some(backend) = self.host.backend.take() else { return };
        let fd = backend.as_fd().as_raw_fd();
        let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        log::warn!("{}: its tap or passt is gone; the guest goes on without a link", self.shared.id);
        self.interrupt.change_config(|| self.shared.link.store(false, Ordering::SeqCst));
        if self.is_blocked {
            // What waited for room goes nowhere, too.
            self.is_blocked = false;
            self.tx.queue.serve_again();
        }
    }
}

impl Served for NetWorker {
    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        let mut events = vec![
            (self.rx.queue.notify.as_raw_fd(), EventSet::IN, RX_NOTIFY),
            (self.tx.queue.notify.as_raw_fd(), EventSet::IN, TX_NOTIFY),
            (self.host.rx_limit.as_raw_fd(), EventSet::IN, RX_TIMER),
            (self.host.tx_limit.as_raw_fd(), EventSet::IN, TX_TIMER),
        ];
        events.extend(self.host.backend.iter().map(|b| (b.as_fd().as_raw_fd(), self.interest(), BACKEND)));
        events
    }

    fn event(&mut self, token: u64, ready: EventSet, epoll: &Epoll) {
        match token {
            RX_NOTIFY => drop(self.rx.queue.notify.read()),
            TX_NOTIFY => drop(self.tx.queue.notify.read()),
            RX_TIMER => self.host.rx_limit.is_over(),
            TX_TIMER => self.host.tx_limit.is_over(),
            _ => {}
        }
        if let Err(e) = self.serve(token, ready, epoll) {
            self.interrupt.needs_reset(&self.shared.id, &e);
        }
        if self.interrupt.is_reset_needed()
            && let Some(backend) = &self.host.backend
        {
            // Nobody receives any more, so there is nothing to wake up for.
            let fd = backend.as_fd().as_raw_fd();
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    fn stop(&mut self) {
        self.rx.give_up();
        // A tap whose guest takes no offloads any more must hand over plain frames.
        if let Some(backend) = &mut self.host.backend {
            let _ = backend.set_features(0);
        }
    }
}
