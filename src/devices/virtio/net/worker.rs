//! A card's thread: which queue is served when, and what is waited for.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::vm::Memory;

use super::super::{EACH_SIGNAL, Interrupt, QueueError, Served};
use super::backend::Sent;
use super::card::Shared;
use super::commands::Commands;
use super::rx::{Rx, RxEnd};
use super::switch::Switch;
use super::tx::{Tx, TxEnd};
use super::{HostParts, Limit, NetCounters};

const RX_NOTIFY: u64 = 0;
const TX_NOTIFY: u64 = 1;
const BACKEND: u64 = 2;
const RX_TIMER: u64 = 3;
const TX_TIMER: u64 = 4;
const SWITCH: u64 = 5;
const COMMAND: u64 = 6;

/// The state of the thread of one pair of queues.
pub(super) struct NetWorker {
    pub(super) pair: usize,
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    /// The first pair's thread serves it.
    pub(super) commands: Option<Commands>,
    /// What it controls: every pair but the first that the driver has set up.
    switches: Vec<Arc<Switch>>,
    counters: NetCounters,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    shared: Arc<Shared>,
    pub(super) host: HostParts,
    /// The pair's backend takes part in the network, and is waited for.
    is_on: bool,
    /// The driver has given no buffers.
    is_starved: bool,
    /// The backend has no room.
    is_blocked: bool,
}

/// What a worker is made from.
pub(super) struct WorkerParts {
    pub(super) pair: usize,
    pub(super) commands: Option<Commands>,
    pub(super) switches: Vec<Arc<Switch>>,
    pub(super) counters: NetCounters,
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
        let WorkerParts { pair, commands, switches, counters, rx, tx, memory, interrupt, shared, host } =
            parts;
        let is_on = host.switch.is_none();
        let (is_starved, is_blocked) = (false, false);
        Self {
            pair,
            rx,
            tx,
            commands,
            switches,
            counters,
            memory,
            interrupt,
            shared,
            host,
            is_on,
            is_starved,
            is_blocked,
        }
    }

    fn serve(&mut self, token: u64, ready: EventSet, epoll: &Epoll) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        match token {
            COMMAND => match &mut self.commands {
                Some(commands) => {
                    let mut turn = |pairs| {
                        let switches = self.switches.iter().enumerate();
                        switches.for_each(|(index, switch)| switch.turn(index + 1 < pairs));
                    };
                    commands.serve(self.memory.guest(), &self.interrupt, &mut turn)
                }
                None => Ok(()),
            },
            SWITCH => self.follow_switch(epoll),
            RX_NOTIFY | RX_TIMER if self.host.rx_limit.is_reached() => Ok(()),
            TX_NOTIFY | TX_TIMER if self.is_blocked || self.host.tx_limit.is_reached() => Ok(()),
            RX_NOTIFY | RX_TIMER => {
                if token == RX_TIMER {
                    self.watch(epoll);
                }
                self.receive(epoll)
            }
            TX_NOTIFY | TX_TIMER => self.transmit(epoll),
            // It came together with the word that the backend is off.
            _ if !self.is_on => Ok(()),
            _ => self.backend_ready(ready, epoll),
        }
    }

    /// Turns the backend on or off, as the driver has said.
    fn follow_switch(&mut self, epoll: &Epoll) -> Result<(), QueueError> {
        let Some(on) = self.host.switch.as_ref().map(|switch| *switch.lock()) else { return Ok(()) };
        let Some(backend) = &mut self.host.backend else { return Ok(()) };
        if on == self.is_on {
            return Ok(());
        }
        let fd = backend.as_fd().as_raw_fd();
        if !on {
            // First, because a backend that is off is always ready, with an error.
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        self.is_on = on;
        if backend.switch(on).is_err() {
            self.lose_link(epoll);
            return Ok(());
        }
        if on {
            let event = EpollEvent::new(self.interest(), BACKEND);
            if let Err(e) = epoll.ctl(ControlOperation::Add, fd, event) {
                log::error!("{}: the network cannot be waited for: {e}", self.shared.id);
            }
            return self.receive(epoll);
        }
        if self.is_blocked {
            // What waited for room goes nowhere.
            self.is_blocked = false;
            self.tx.queue.serve_again();
        }
        Ok(())
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
        if !self.is_on {
            return Ok(());
        }
        let Some(backend) = &mut self.host.backend else { return Ok(()) };
        // Held for as long as buffers are filled: a driver that is told that the pair is off finds none filled later.
        let switch = self.host.switch.as_ref().map(|switch| switch.lock());
        if switch.as_deref() == Some(&false) {
            return Ok(());
        }
        let mut context = Context {
            memory: self.memory.guest(),
            interrupt: &self.interrupt,
            counters: &self.counters,
            limit: &mut self.host.rx_limit,
        };
        let end = self.rx.serve(&mut context, backend.as_mut())?;
        drop(switch);
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
        // A driver may send as soon as it was told that the pair is on, which this thread may not have heard of.
        self.follow_switch(epoll)?;
        let mut context = Context {
            memory: self.memory.guest(),
            interrupt: &self.interrupt,
            counters: &self.counters,
            limit: &mut self.host.tx_limit,
        };
        let backend = self.host.backend.as_deref_mut().filter(|_| self.is_on);
        let end = self.tx.serve(&mut context, backend)?;
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
        let Some(backend) = self.host.backend.as_ref().filter(|_| self.is_on) else { return };
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
        if self.shared.has_link() {
            log::warn!("{}: its tap or passt is gone; the guest goes on without a link", self.shared.id);
        }
        self.interrupt.change_config(|| self.shared.lose_link());
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
            (self.rx.queue.notify.as_raw_fd(), EACH_SIGNAL, RX_NOTIFY),
            (self.tx.queue.notify.as_raw_fd(), EACH_SIGNAL, TX_NOTIFY),
            (self.host.rx_limit.as_raw_fd(), EventSet::IN, RX_TIMER),
            (self.host.tx_limit.as_raw_fd(), EventSet::IN, TX_TIMER),
        ];
        events.extend(self.host.switch.iter().map(|s| (s.as_raw_fd(), EventSet::IN, SWITCH)));
        events.extend(self.commands.iter().map(|c| (c.queue.notify.as_raw_fd(), EventSet::IN, COMMAND)));
        let backend = self.host.backend.iter().filter(|_| self.is_on);
        events.extend(backend.map(|b| (b.as_fd().as_raw_fd(), self.interest(), BACKEND)));
        events
    }

    fn event(&mut self, token: u64, ready: EventSet, epoll: &Epoll) {
        match token {
            RX_TIMER => self.host.rx_limit.is_over(),
            TX_TIMER => self.host.tx_limit.is_over(),
            SWITCH => self.host.switch.iter().for_each(|switch| switch.acknowledge()),
            COMMAND => self.commands.iter().for_each(|commands| drop(commands.queue.notify.read())),
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
        let Some(backend) = &mut self.host.backend else { return };
        // What fails here fails again when the next driver comes.
        let _ = match &self.host.switch {
            // A tap whose guest takes no offloads any more must hand over plain frames. All of its queues share that.
            None => backend.set_features(0),
            Some(switch) => {
                switch.turn(false);
                switch.acknowledge();
                if std::mem::take(&mut self.is_on) { backend.switch(false) } else { Ok(()) }
            }
        };
    }
}
