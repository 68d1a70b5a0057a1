//! A driver for unit tests: plays the guest's side of a device, through the registers that a guest has.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::vm::Memory;

use super::{
    F_VERSION_1, Interrupt, MmioTransport, NOTIFY_OFFSET, Transport, TransportParts, VirtioDevice, VmmThread,
};

/// A piece of guest memory: address and length.
pub type Buffer = (u64, u32);

const MEMORY: &str = "64M";
/// Each queue has 64 KiB for its rings.
const RINGS: u64 = 0x10_0000;
const RING_STEP: u64 = 0x1_0000;
/// Buffers come behind the rings.
const BUFFERS: u64 = 0x40_0000;

/// Rings, and 4 MiB of buffers.
const SHARED: usize = 7 << 20;

/// A device of one kind and what it needs of the host, for tests that treat all kinds alike.
pub struct Rig {
    /// Its kind, for messages.
    pub name: &'static str,
    /// Its driver, which has set up all queues.
    pub driver: Driver,
    /// The sizes of its queues.
    pub sizes: Vec<u16>,
    /// The queues that it looks at in this state.
    pub queues: Vec<usize>,
    /// Something comes from the host, so that queues are looked at in which the device waits for nothing.
    pub stir: Box<dyn FnMut()>,
    /// Makes good requests available in each queue.
    pub offer: Box<dyn FnMut(&mut Driver)>,
    /// Shows that the device works, with its driver newly started.
    pub works: Box<dyn FnMut(&mut Driver)>,
}

impl Rig {
    /// Resets the device, starts it again, and sees that it works.
    pub fn start_again(&mut self) {
        self.driver.free_buffers();
        self.driver.restart(&self.sizes);
        (self.works)(&mut self.driver);
        self.driver.free_buffers();
    }
}

struct Ring {
    size: u16,
    base: u64,
    next_descriptor: u16,
    available: u16,
    /// `available` as the device last heard of it by [`Driver::notify_where_asked`].
    told: u16,
    seen_used: u16,
}

impl Ring {
    fn available_ring(&self) -> u64 {
        self.base + 0x8000
    }
    fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }
}

/// The guest's side of one device.
pub struct Driver {
    /// The device's registers.
    pub mmio: MmioTransport,
    /// Guest memory.
    pub memory: Memory,
    /// Signalled by the device's interrupt.
    pub line: EventFd,
    /// Waits for `line`.
    interrupted: Epoll,
    rings: Vec<Ring>,
    next_buffer: u64,
}

impl Driver {
    /// A device that no driver has found yet.
    pub fn new(mut device: Box<dyn VirtioDevice>) -> Self {
        let memory = Memory::new(&MEMORY.parse().unwrap()).unwrap();
        device.prepare(&memory).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = event();
        let notify = device.queue_sizes().iter().map(|_| Arc::new(event())).collect();
        let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap()));
        let vmm = VmmThread::inline().unwrap();
        let parts = TransportParts { device, memory: memory.clone(), interrupt, notify, vmm };
        let mmio = MmioTransport::new(Transport::new(parts));
        let interrupted = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        interrupted.ctl(ControlOperation::Add, line.as_raw_fd(), event).unwrap();
        Self { mmio, memory, line, interrupted, rings: Vec::new(), next_buffer: BUFFERS }
    }

    /// A device with a driver that accepted every offered feature and set up queues of these sizes.
    pub fn start(device: Box<dyn VirtioDevice>, sizes: &[u16]) -> Self {
        Self::start_with(device, sizes, u64::MAX)
    }

    /// As [`Driver::start`], accepting only `features` of what is offered.
    pub fn start_with(device: Box<dyn VirtioDevice>, sizes: &[u16], features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.set_up(sizes, features);
        driver
    }

    /// Resets the device and starts it again, with empty queues of these sizes.
    pub fn restart(&mut self, sizes: &[u16]) {
        self.rings.clear();
        self.set_up(sizes, u64::MAX);
    }

    fn set_up(&mut self, sizes: &[u16], features: u64) {
        self.negotiate(features);
        for (index, size) in sizes.iter().enumerate() {
            self.set_up_queue(index as u32, *size);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "the device did not start");
    }

    /// Up to accepted features.
    pub fn negotiate(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for select in [0, 1] {
            self.write(0x14, select);
            let offered = self.read(0x10);
            self.write(0x24, select);
            self.write(0x20, offered & ((features | F_VERSION_1) >> (32 * select)) as u32);
        }
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "the features were refused");
    }

    /// Gives queue `index` its rings.
    pub fn set_up_queue(&mut self, index: u32, size: u16) {
        let base = RINGS + RING_STEP * u64::from(index);
        let ring = Ring { size, base, next_descriptor: 0, available: 0, told: 0, seen_used: 0 };
        self.write(0x30, index);
        self.write(0x38, size.into());
        for (register, address) in [(0x80, base), (0x90, ring.available_ring()), (0xa0, ring.used_ring())] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.memory.guest().write_slice(&[0; RING_STEP as usize], GuestAddress(base)).unwrap();
        self.write(0x44, 1);
        self.rings.push(ring);
    }

    /// Gives a device that was reset new queues of these sizes.
    pub fn restart_queues(&mut self, sizes: &[u16]) {
        self.rings.clear();
        for (index, size) in sizes.iter().enumerate() {
            self.set_up_queue(index as u32, *size);
        }
    }

    /// Forgets all buffers, so that their memory is used again.
    pub fn free_buffers(&mut self) {
        self.next_buffer = BUFFERS;
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    /// Fresh guest memory, filled with 0xaa.
    pub fn buffer(&mut self, len: u32) -> Buffer {
        let address = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(4096);
        self.memory.guest().write_slice(&vec![0xaa; len as usize], GuestAddress(address)).unwrap();
        (address, len)
    }

    /// Fresh guest memory with these bytes.
    pub fn filled(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.buffer(bytes.len() as u32);
        self.memory.guest().write_slice(bytes, GuestAddress(buffer.0)).unwrap();
        buffer
    }

    /// What a buffer holds.
    pub fn bytes(&self, (address, len): Buffer) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.guest().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes a raw descriptor.
    pub fn descriptor(&mut self, queue: usize, index: u16, (address, len): Buffer, flags: u16, next: u16) {
        let at = self.rings[queue].base + 16 * u64::from(index);
        let memory = self.memory.guest();
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Offers a chain of these buffers without notifying, and returns its head.
    pub fn post(&mut self, queue: usize, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_descriptor;
        let all: Vec<_> = readable.iter().map(|b| (*b, 0)).chain(writable.iter().map(|b| (*b, 2))).collect();
        for (i, (buffer, flags)) in all.iter().enumerate() {
            let index = (head + i as u16) % size;
            let last = i + 1 == all.len();
            self.descriptor(queue, index, *buffer, flags | u16::from(!last), (index + 1) % size);
        }
        self.rings[queue].next_descriptor = (head + all.len() as u16) % size;
        self.make_available(queue, head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let at = ring.available_ring() + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let index = GuestAddress(ring.available_ring() + 2);
        let available = ring.available;
        self.memory.guest().write_obj(head, GuestAddress(at)).unwrap();
        self.memory.guest().store(available, index, Ordering::SeqCst).unwrap();
    }

    /// Says that so many chains more are available, whatever the ring holds.
    pub fn jump(&mut self, queue: usize, by: u16) {
        let ring = &mut self.rings[queue];
        ring.available = ring.available.wrapping_add(by);
        let (available, index) = (ring.available, GuestAddress(ring.available_ring() + 2));
        self.memory.guest().store(available, index, Ordering::SeqCst).unwrap();
    }

    /// All memory that the driver has given to anyone, rings and buffers.
    pub fn shared_memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; SHARED];
        self.memory.guest().read_slice(&mut bytes, GuestAddress(RINGS)).unwrap();
        bytes
    }

    /// Offers a chain and notifies. Returns its head.
    pub fn offer(&mut self, queue: usize, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let head = self.post(queue, readable, writable);
        self.notify(queue);
        head
    }

    /// Notifies the device.
    pub fn notify(&mut self, queue: usize) {
        self.write(NOTIFY_OFFSET, queue as u32);
    }

    /// Notifies the device where it asked for it by its event index, as Linux does (§2.7.13.4.1). It must have accepted that.
    pub fn notify_where_asked(&mut self, queue: usize) {
        fence(Ordering::SeqCst);
        let ring = &mut self.rings[queue];
        let place = ring.used_ring() + 4 + 8 * u64::from(ring.size);
        let event: u16 = self.memory.guest().load(GuestAddress(place), Ordering::SeqCst).unwrap();
        let (old, new) = (ring.told, ring.available);
        ring.told = new;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.notify(queue);
        }
    }

    /// Waits as Linux does: sleeps until an interrupt that is about used buffers. Panics after ten seconds. All chains
    /// that were given back must have been taken before, by [`Driver::try_used`] of each queue until there is none.
    #[track_caller]
    pub fn wait_interrupt(&mut self) {
        loop {
            let ready = self.interrupted.wait(10_000, &mut [EpollEvent::default()]).unwrap();
            assert_eq!(ready, 1, "no interrupt comes");
            self.line.read().unwrap();
            let status = self.read(0x60);
            self.write(0x64, status);
            if status & 1 != 0 {
                return;
            }
        }
    }

    /// The next chain that the device gave back, and how many bytes it wrote; `None` where there is none yet.
    pub fn try_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let memory = self.memory.guest();
        let index: u16 = memory.load(GuestAddress(ring.used_ring() + 2), Ordering::SeqCst).unwrap();
        if index == ring.seen_used {
            return None;
        }
        let at = ring.used_ring() + 4 + 8 * u64::from(ring.seen_used % ring.size);
        ring.seen_used = ring.seen_used.wrapping_add(1);
        // Ask to be interrupted for the next one.
        let event = ring.available_ring() + 4 + 2 * u64::from(ring.size);
        memory.write_obj(ring.seen_used, GuestAddress(event)).unwrap();
        // Before the next look at the index: who finds nothing then will be interrupted (§2.7.7.1).
        fence(Ordering::SeqCst);
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        Some((head as u16, memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for [`Driver::try_used`], and panics after ten seconds.
    #[track_caller]
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        self.wait("the device gives nothing back", |d| d.try_used(queue))
    }

    /// Waits until the device asks for a reset, and panics after ten seconds.
    #[track_caller]
    pub fn wait_needs_reset(&mut self) {
        self.wait("the device does not ask for a reset", |d| (d.read(0x70) & 64 != 0).then_some(()));
    }

    /// Polls, as a guest without interrupts would.
    #[track_caller]
    pub fn wait<T>(&mut self, what: &str, mut poll: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            if let Some(value) = poll(self) {
                return value;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::yield_now();
        }
    }
}
