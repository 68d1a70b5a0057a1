//! The device's thread: moves packets between the queues and the connections.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::devices::timer::Timer;
use crate::sandbox::ThreadKind;
use crate::vm::Memory;

use super::super::{
    ActivateError, Activation, ActiveQueue, Chain, EACH_SIGNAL, Interrupt, QueueError, Served, take_queue,
};
use super::NAME;
use super::credit::BUF_ALLOC;
use super::muxer::Muxer;
use super::packet::{HEADER_LEN, Header, Op};

const RX: u64 = 0;
const TX: u64 = 1;
const LISTENER: u64 = 2;
const TIMER: u64 = 3;

/// Host programs taken in at once.
const ACCEPT_BATCH: usize = 16;
/// How exact deadlines are.
const TICK: Duration = Duration::from_secs(1);
/// The most data that goes through at once: no more is ever granted to the guest.
const MAX_DATA: usize = BUF_ALLOC as usize;

/// The state of an active device.
pub struct VsockThread {
    memory: Memory,
    interrupt: Arc<Interrupt>,
    rx: ActiveQueue,
    tx: ActiveQueue,
    /// The driver's buffers for events: they wait for `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (§5.10.6.7), which only a
    /// restored VM needs.
    events: ActiveQueue,
    muxer: Muxer,
    timer: Timer,
    is_ticking: bool,
    /// The host had no descriptor left: no program is taken in until the next tick.
    is_deaf: bool,
    chain: Chain,
    data: Box<[u8]>,
}

impl VsockThread {
    /// Fails where one of the three queues is missing or the host has no descriptor left.
    pub(super) fn new(mut activation: Activation, muxer: Muxer) -> Result<Self, ActivateError> {
        let mut queue = |index| take_queue(&mut activation.queues, index);
        let (rx, tx, events) = (queue(0)?, queue(1)?, queue(2)?);
        Ok(Self {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rx,
            tx,
            events,
            muxer,
            timer: Timer::new()?,
            is_ticking: false,
            is_deaf: false,
            chain: Chain::default(),
            data: vec![0; MAX_DATA].into_boxed_slice(),
        })
    }

    /// Gives the queues back.
    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        vec![self.rx, self.tx, self.events]
    }
}

impl Served for VsockThread {
    const THREAD: ThreadKind = ThreadKind::Vsock;

    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        vec![
            (self.rx.notify.as_raw_fd(), EACH_SIGNAL, RX),
            (self.tx.notify.as_raw_fd(), EACH_SIGNAL, TX),
            (self.muxer.listener().as_raw_fd(), EventSet::IN, LISTENER),
            (self.timer.as_raw_fd(), EventSet::IN, TIMER),
        ]
    }

    fn event(&mut self, token: u64, ready: EventSet, epoll: &Epoll) {
        self.muxer.counters().wakeups.increment();
        let mut served = Ok(());
        match token {
            RX => {}
            TX => served = self.serve_tx(epoll),
            LISTENER => self.accept(epoll),
            TIMER => self.tick(epoll),
            stream => self.muxer.stream_event(stream, ready),
        }
        if let Err(e) = served.and_then(|()| self.serve_rx()) {
            self.interrupt.needs_reset(NAME, &e);
        }
        self.muxer.count_open();
        self.set_timer();
    }

    /// A reset ends all connections: host programs find their streams closed.
    fn stop(&mut self) {
        self.muxer.clear();
    }
}

impl VsockThread {
    fn accept(&mut self, epoll: &Epoll) {
        for _ in 0..ACCEPT_BATCH {
            match self.muxer.accept(epoll) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // The program goes on waiting, so the listener would stay ready and we would spin.
                Err(_) => return self.listen(epoll, false),
            }
        }
    }

    fn listen(&mut self, epoll: &Epoll, on: bool) {
        let set = if on { EventSet::IN } else { EventSet::empty() };
        let listener = self.muxer.listener().as_raw_fd();
        self.is_deaf =
            epoll.ctl(ControlOperation::Modify, listener, EpollEvent::new(set, LISTENER)).is_ok() && !on;
    }

    fn tick(&mut self, epoll: &Epoll) {
        self.timer.acknowledge();
        self.is_ticking = false;
        if self.is_deaf {
            self.listen(epoll, true);
        }
        self.muxer.tick();
    }

    /// Ticks only while something has a deadline: an idle device wakes nobody.
    fn set_timer(&mut self) {
        if !self.is_ticking && (self.is_deaf || self.muxer.has_deadlines()) {
            self.is_ticking = self.timer.set(TICK).is_ok();
        }
    }

    /// Takes the guest's packets, at most one queue full.
    fn serve_tx(&mut self, epoll: &Epoll) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        let memory = self.memory.clone();
        let memory = memory.guest();
        self.tx.queue.disable_notify(memory)?;
        let mut is_done = false;
        for _ in 0..self.tx.queue.size() {
            if self.tx.queue.pop(memory, &mut self.chain)? {
                self.receive(epoll)?;
                self.tx.queue.push_used(memory, self.chain.head(), 0)?;
            } else if !self.tx.queue.enable_notify(memory)? {
                is_done = true;
                break;
            }
        }
        self.tx.queue.publish_to(memory, &self.interrupt)?;
        if !is_done {
            self.tx.serve_again();
        }
        Ok(())
    }

    /// Takes the packet in the current chain. Its header is copied once and the copy is checked.
    fn receive(&mut self, epoll: &Epoll) -> Result<(), QueueError> {
        let memory = self.memory.guest();
        if (self.chain.readable_len() as usize) < HEADER_LEN {
            self.muxer.drop_packet();
            return Ok(());
        }
        let mut raw = [0; HEADER_LEN];
        self.chain.read(memory, 0, &mut raw)?;
        let header = Header::parse(&raw);
        let len = if header.op == Op::Data as u16 { header.len as usize } else { 0 };
        if len > MAX_DATA || len > self.chain.readable_len() as usize - HEADER_LEN {
            self.muxer.receive_broken(&header);
            return Ok(());
        }
        let data = &mut self.data[..len];
        self.chain.read(memory, HEADER_LEN as u32, data)?;
        self.muxer.counters().from_guest_packets.increment();
        self.muxer.counters().from_guest_bytes.add(len as u64);
        self.muxer.receive(&header, data, epoll);
        Ok(())
    }

    /// Gives the guest what waits for it, at most one queue full. Without buffers it waits for the driver's notification.
    fn serve_rx(&mut self) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        let memory = self.memory.clone();
        let memory = memory.guest();
        self.rx.queue.disable_notify(memory)?;
        let mut is_done = false;
        for _ in 0..self.rx.queue.size() {
            if !self.muxer.has_packet() {
                is_done = true;
                break;
            }
            if self.rx.queue.pop(memory, &mut self.chain)? {
                self.send()?;
            } else if !self.rx.queue.enable_notify(memory)? {
                is_done = true;
                break;
            }
        }
        self.rx.queue.publish_to(memory, &self.interrupt)?;
        if !is_done {
            self.rx.serve_again();
        }
        Ok(())
    }

    /// Puts the next packet into the current chain. A chain without room for a header and a byte goes back empty.
    fn send(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.guest();
        let room = (self.chain.writable_len() as usize).saturating_sub(HEADER_LEN).min(MAX_DATA);
        if room == 0 {
            return self.rx.queue.push_used(memory, self.chain.head(), 0);
        }
        let Some(header) = self.muxer.next_packet(&mut self.data[..room]) else {
            self.rx.queue.undo_pop(&self.chain);
            return Ok(());
        };
        self.chain.write(memory, 0, &header.to_bytes())?;
        self.chain.write(memory, HEADER_LEN as u32, &self.data[..header.len as usize])?;
        self.muxer.counters().to_guest_packets.increment();
        self.muxer.counters().to_guest_bytes.add(header.len.into());
        self.rx.queue.push_used(memory, self.chain.head(), HEADER_LEN as u32 + header.len)
    }
}
