//! A driver and a device without a thread: what the device would serve on its own is served here, so that an input
//! always takes the same way.
#![allow(dead_code, reason = "each target uses its part")]

use std::sync::Arc;

use arbitrary::Arbitrary;
use microvm::devices::virtio::{
    Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt, Queue, QueueSetup, Served,
};
use microvm::sandbox::Confined;
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Each queue's rings lie in 8 KiB of their own, from here on; buffers behind them.
const RINGS: u64 = 0x1000;
const RING_STEP: u64 = 0x2000;
pub const BUFFERS: u64 = 0x1_0000;
/// What a target writes to is below this.
pub const END: u64 = 0x10_0000;
/// A device that has something to do in so many rounds without anything new is in a busy loop.
const ROUNDS: usize = 10_000;

/// A descriptor as an input gives it: where, how long, and whether the device may write.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Piece {
    at: u16,
    len: u16,
    writable: bool,
    /// The length is of the wrong size altogether.
    huge: bool,
}

impl Piece {
    /// Its descriptor: address and length.
    fn place(self) -> (u64, u32) {
        let len = if self.huge { u32::from(self.len) << 16 } else { self.len.into() };
        (BUFFERS + 8 * u64::from(self.at), len)
    }
}

struct Ring {
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    seen_used: u16,
    notify: Arc<EventFd>,
}

impl Ring {
    fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x1800
    }
}

/// The guest.
pub struct Guest {
    pub memory: Memory,
    pub interrupt: Arc<Interrupt>,
    rings: Vec<Ring>,
    epoll: Epoll,
}

impl Guest {
    /// A guest with queues of these sizes, at most 128 each, and what a device is activated with.
    pub fn new(memory: &Memory, sizes: &[u16], features: u64) -> (Self, Activation) {
        memory.guest().write_slice(&vec![0; END as usize], GuestAddress(0)).unwrap();
        let event = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let interrupt = Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let features = features | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        let ring = |(index, size): (usize, &u16)| Ring {
            base: RINGS + RING_STEP * index as u64,
            size: *size,
            next_descriptor: 0,
            available: 0,
            seen_used: 0,
            notify: event(),
        };
        let rings: Vec<_> = sizes.iter().enumerate().map(ring).collect();
        let queue = |(index, ring): (usize, &Ring)| {
            let (available, used) = (ring.available_ring(), ring.used_ring());
            let setup = QueueSetup { size: ring.size, ready: true, descriptors: ring.base, available, used };
            let queue = Queue::new(memory.guest(), setup, ring.size, features).unwrap();
            ActiveQueue { index: index as u16, queue, notify: ring.notify.clone() }
        };
        let queues = rings.iter().enumerate().map(queue).collect();
        let activation = Activation {
            memory: memory.clone(),
            features,
            interrupt: interrupt.clone(),
            queues,
            confined: Confined::not(),
        };
        (Self { memory: memory.clone(), interrupt, rings, epoll: Epoll::new().unwrap() }, activation)
    }

    /// Waits for the events of `device` from now on.
    pub fn watch(&self, device: &impl Served) {
        for (fd, set, token) in device.events() {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token)).unwrap();
        }
    }

    /// Serves the device until it has nothing to do, which must come soon. Where other threads work for it, that is not
    /// before `is_done`.
    pub fn serve(&self, device: &mut impl Served, is_done: impl Fn(&Self) -> bool) {
        let mut events = [EpollEvent::default(); 16];
        for _ in 0..ROUNDS {
            let timeout = if is_done(self) { 0 } else { 1000 };
            let count = self.epoll.wait(timeout, &mut events).unwrap();
            if count == 0 {
                assert!(timeout == 0, "a request is never answered");
                return;
            }
            for event in &events[..count] {
                device.event(event.data(), EventSet::from_bits_truncate(event.events()), &self.epoll);
            }
        }
        panic!("the device finds no rest");
    }

    /// Whether a chain of up to four descriptors can be offered by a driver that does nothing wrong.
    pub fn has_room(&self, queue: usize) -> bool {
        let ring = &self.rings[queue];
        ring.available.wrapping_sub(self.used_index(queue)) < ring.size / 4
    }

    /// Offers a chain of these descriptors (address, length, flags) and notifies.
    pub fn offer(&mut self, queue: usize, chain: &[(u64, u32, bool)]) {
        let memory = self.memory.guest();
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (i, (address, len, writable)) in chain.iter().enumerate() {
            let index = (head + i as u16) % ring.size;
            let at = ring.base + 16 * u64::from(index);
            let flags = u16::from(i + 1 < chain.len()) | u16::from(*writable) << 1;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj((index + 1) % ring.size, GuestAddress(at + 14)).unwrap();
        }
        ring.next_descriptor = (head + chain.len() as u16) % ring.size;
        let entry = ring.available_ring() + 4 + 2 * u64::from(ring.available % ring.size);
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        memory.write_obj(ring.available, GuestAddress(ring.available_ring() + 2)).unwrap();
        let _ = ring.notify.write(1);
    }

    /// Offers a chain as an input gives it.
    pub fn offer_pieces(&mut self, queue: usize, pieces: &[Piece]) {
        let count = pieces.len().min(self.rings[queue].size.into());
        let chain = pieces[..count].iter().map(|p| {
            let (address, len) = p.place();
            (address, len, p.writable)
        });
        let chain: Vec<_> = chain.collect();
        if !chain.is_empty() {
            self.offer(queue, &chain);
        }
    }

    /// The next chain that came back: its head and how much the device says to have written.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let memory = self.memory.guest();
        let ring = &mut self.rings[queue];
        let index: u16 = memory.read_obj(GuestAddress(ring.used_ring() + 2)).unwrap();
        if index == ring.seen_used {
            return None;
        }
        let at = ring.used_ring() + 4 + 8 * u64::from(ring.seen_used % ring.size);
        ring.seen_used = ring.seen_used.wrapping_add(1);
        Some((memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Whether all that was offered has come back.
    pub fn is_idle(&self, queue: usize) -> bool {
        self.used_index(queue) == self.rings[queue].available
    }

    fn used_index(&self, queue: usize) -> u16 {
        self.memory.guest().read_obj(GuestAddress(self.rings[queue].used_ring() + 2)).unwrap()
    }

    /// Where the descriptor `head` of a queue points.
    pub fn descriptor(&self, queue: usize, head: u32) -> (u64, u32) {
        let at = self.rings[queue].base + 16 * u64::from(head);
        let memory = self.memory.guest();
        (memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + 8)).unwrap())
    }

    /// Writes anywhere below [`END`], rings included.
    pub fn scribble(&self, at: u32, bytes: &[u8]) {
        let at = u64::from(at) % END;
        let len = bytes.len().min((END - at) as usize);
        self.memory.guest().write_slice(&bytes[..len], GuestAddress(at)).unwrap();
    }

    /// Notifies without having offered.
    pub fn notify(&self, queue: usize) {
        let _ = self.rings[queue].notify.write(1);
    }
}
