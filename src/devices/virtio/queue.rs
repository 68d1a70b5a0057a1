//! The split virtqueue (virtio 1.3 §2.7), device side.
//!
//! Everything in a ring is written by the guest, which may be hostile and may change it at any moment. Each field is
//! read once and checked before it is used; what does not hold is a [`QueueError`], after which the device asks for a
//! reset. Nothing here loops further than the queue is long.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

use super::chain::{Chain, Segment};
use super::interrupt::Interrupt;

/// The largest queue that virtio allows (§2.7), a power of two.
pub const MAX_QUEUE_SIZE: u16 = 32768;

const DESCRIPTOR_LEN: u64 = 16;
const RING_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// What a driver did wrong with a queue. The device that meets one asks for a reset.
#[derive(Debug, Error)]
pub enum QueueError {
    /// A ring or a descriptor lies outside of memory.
    #[error("it reaches outside of guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The size is no power of two, or too large.
    #[error("its size {0} is no power of two up to the device's maximum")]
    Size(u16),
    /// A ring is not aligned (§2.7, table of alignments).
    #[error("a ring at {0:#x} is not aligned")]
    Alignment(u64),
    /// A ring or buffer lies outside of memory, or in two pieces of it.
    #[error("{len} bytes at {address:#x} are not in guest memory")]
    Range {
        /// First address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// More chains were made available than fit.
    #[error("the available index jumped from {from} to {to}")]
    AvailableIndex {
        /// The device's place.
        from: u16,
        /// The guest's index.
        to: u16,
    },
    /// A descriptor index past the table's end.
    #[error("descriptor {0} is past the end of its table")]
    Index(u16),
    /// A chain that is offered again before it was used.
    #[error("descriptor chain {0} was offered twice")]
    Twice(u16),
    /// A chain longer than the queue, a loop among them.
    #[error("a descriptor chain is longer than its queue")]
    TooLong,
    /// An indirect table where none may be, or a bad one (§2.7.5.3).
    #[error("an indirect descriptor is not allowed there, or its table has no whole descriptors")]
    Indirect,
    /// A buffer for reading behind one for writing (§2.7.4.2).
    #[error("a chain has a device-readable buffer behind a device-writable one")]
    Order,
    /// A chain without the buffers that the device needs.
    #[error("a request has not the buffers that it needs")]
    Shape,
}

/// What a driver has written to a queue's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Number of descriptors.
    pub size: u16,
    /// The driver has set the queue up.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

impl QueueSetup {
    /// Checks that the rings are aligned and lie in memory, each in one piece.
    fn check(&self, memory: &GuestMemoryMmap, max_size: u16) -> Result<(), QueueError> {
        if self.size > max_size || !self.size.is_power_of_two() {
            return Err(QueueError::Size(self.size));
        }
        let size = u64::from(self.size);
        // Both rings end with an event index of 2 bytes.
        let rings = [
            (self.descriptors, 16, DESCRIPTOR_LEN * size),
            (self.available, 2, RING_HEADER + AVAIL_ELEMENT * size + 2),
            (self.used, 4, RING_HEADER + USED_ELEMENT * size + 2),
        ];
        for (address, alignment, len) in rings {
            if address % alignment != 0 {
                return Err(QueueError::Alignment(address));
            }
            check_range(memory, address, len)?;
        }
        Ok(())
    }
}

/// Checks that a range is not empty, does not wrap and lies in one piece of guest memory.
fn check_range(memory: &GuestMemoryMmap, address: u64, len: u64) -> Result<(), QueueError> {
    let bad = QueueError::Range { address, len };
    let Some(region) = memory.find_region(GuestAddress(address)) else { return Err(bad) };
    let inside = address - region.start_addr().0;
    match inside.checked_add(len) {
        Some(end) if len > 0 && end <= region.len() => Ok(()),
        _ => Err(bad),
    }
}

/// One descriptor, read once.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemoryMmap, table: u64, index: u16) -> Result<Self, QueueError> {
        // The table has been checked to lie in memory; an index is below its length.
        let raw: [u8; 16] = memory.read_obj(GuestAddress(table + u64::from(index) * DESCRIPTOR_LEN))?;
        let (address, rest) = raw.split_at(8);
        let half = |i: usize| u16::from_le_bytes([rest[i], rest[i + 1]]);
        Ok(Self {
            address: u64::from_le_bytes(address.try_into().unwrap_or_default()),
            len: u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]),
            flags: half(4),
            next: half(6),
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A queue that a driver has set up and a device serves.
#[derive(Debug)]
pub struct Queue {
    setup: QueueSetup,
    event_idx: bool,
    indirect: bool,
    /// Next entry of the available ring to take; counts modulo 2¹⁶.
    next_available: u16,
    /// Next entry of the used ring to fill; counts modulo 2¹⁶.
    next_used: u16,
    /// `next_used` as the guest last saw it.
    published: u16,
    /// A bit for each chain taken and not yet given back.
    taken: Box<[u64]>,
}

impl Queue {
    /// A queue at its start.
    ///
    /// # Errors
    /// The rings do not lie where they may.
    pub fn new(
        memory: &GuestMemoryMmap,
        setup: QueueSetup,
        max_size: u16,
        features: u64,
    ) -> Result<Self, QueueError> {
        setup.check(memory, max_size)?;
        Ok(Self {
            setup,
            event_idx: features & super::F_EVENT_IDX != 0,
            indirect: features & super::F_INDIRECT_DESC != 0,
            next_available: 0,
            next_used: 0,
            published: 0,
            taken: vec![0; usize::from(setup.size).div_ceil(64)].into_boxed_slice(),
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// What the driver has set up, which was checked: for who serves the queue in our place, as the kernel does.
    #[must_use]
    pub fn setup(&self) -> QueueSetup {
        self.setup
    }

    /// The next entry of the available ring to take.
    #[must_use]
    pub fn position(&self) -> u16 {
        self.next_available
    }

    /// Takes note of what was served in our place: all that was taken before `position` was given back.
    pub fn go_on_at(&mut self, position: u16) {
        (self.next_available, self.next_used, self.published) = (position, position, position);
    }

    /// Whether the guest has made chains available that were not taken yet.
    ///
    /// # Errors
    /// The guest's index jumped.
    pub fn has_available(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        Ok(self.available(memory)? > 0)
    }

    /// How many chains can be taken.
    fn available(&self, memory: &GuestMemoryMmap) -> Result<u16, QueueError> {
        // Acquire: the descriptors behind the index are read after it (§2.7.13.3.1).
        let index = u16::from_le(memory.load(GuestAddress(self.setup.available + 2), Ordering::Acquire)?);
        let count = index.wrapping_sub(self.next_available);
        if count > self.setup.size {
            return Err(QueueError::AvailableIndex { from: self.next_available, to: index });
        }
        Ok(count)
    }

    /// Takes the next available chain into `chain`; `false` where there is none.
    ///
    /// # Errors
    /// The guest offers what it may not.
    pub fn pop(&mut self, memory: &GuestMemoryMmap, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.available(memory)? == 0 {
            return Ok(false);
        }
        let slot = u64::from(self.next_available & (self.setup.size - 1));
        let entry = GuestAddress(self.setup.available + RING_HEADER + AVAIL_ELEMENT * slot);
        let head = u16::from_le(memory.read_obj(entry)?);
        self.read_chain(memory, head, chain)?;
        self.take(head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Puts the last taken chain back, to be taken again. Only before anything else is taken or given back.
    pub fn undo_pop(&mut self, chain: &Chain) {
        self.release(chain.head());
        self.next_available = self.next_available.wrapping_sub(1);
    }

    fn take(&mut self, head: u16) -> Result<(), QueueError> {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        if self.taken[word] & bit != 0 {
            return Err(QueueError::Twice(head));
        }
        self.taken[word] |= bit;
        Ok(())
    }

    fn release(&mut self, head: u16) {
        self.taken[usize::from(head / 64)] &= !(1 << (head % 64));
    }

    /// Walks the chain, an indirect table included, and checks each buffer.
    fn read_chain(&self, memory: &GuestMemoryMmap, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.clear(head);
        let (mut table, mut table_len) = (self.setup.descriptors, self.setup.size);
        let mut index = head;
        let mut in_indirect = false;
        // A chain is at most as long as its queue (§2.7.5.3.1); that also ends loops.
        for _ in 0..self.setup.size {
            if index >= table_len {
                return Err(QueueError::Index(index));
            }
            let mut descriptor = Descriptor::read(memory, table, index)?;
            if descriptor.has(DESC_F_INDIRECT) {
                if !self.indirect || in_indirect || descriptor.has(DESC_F_NEXT) {
                    return Err(QueueError::Indirect);
                }
                (table, table_len) = indirect_table(memory, descriptor)?;
                in_indirect = true;
                descriptor = Descriptor::read(memory, table, 0)?;
                if descriptor.has(DESC_F_INDIRECT) {
                    return Err(QueueError::Indirect);
                }
            }
            add_buffer(memory, descriptor, chain)?;
            if !descriptor.has(DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(QueueError::TooLong)
    }

    /// Gives a chain back. The guest sees it after [`Queue::publish`]. `written` counts the bytes that the device wrote
    /// from the start of the chain's writable part, and none of another's (§2.7.8).
    ///
    /// # Errors
    /// The used ring is not there any more, which checked memory never is.
    pub fn push_used(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), QueueError> {
        debug_assert!(head < self.setup.size);
        let slot = u64::from(self.next_used & (self.setup.size - 1));
        let entry = GuestAddress(self.setup.used + RING_HEADER + USED_ELEMENT * slot);
        let element = u64::from(head) | u64::from(written) << 32;
        memory.write_obj(element.to_le(), entry)?;
        self.next_used = self.next_used.wrapping_add(1);
        self.release(head);
        Ok(())
    }

    /// Shows the guest all chains that were given back, and says whether it wants to be interrupted.
    ///
    /// # Errors
    /// As for [`Queue::push_used`].
    pub fn publish(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if self.next_used == self.published {
            return Ok(false);
        }
        let (old, new) = (self.published, self.next_used);
        // Release: whoever sees the index sees the elements and the buffers behind it.
        memory.store(new.to_le(), GuestAddress(self.setup.used + 2), Ordering::Release)?;
        self.published = new;
        // The guest writes its wish, then looks at the index; we write the index, then look at the wish (§2.7.7.2).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = u16::from_le(memory.load(GuestAddress(self.setup.available), Ordering::Relaxed)?);
            return Ok(flags & AVAIL_F_NO_INTERRUPT == 0);
        }
        let place = self.setup.available + RING_HEADER + AVAIL_ELEMENT * u64::from(self.setup.size);
        let event = u16::from_le(memory.load(GuestAddress(place), Ordering::Relaxed)?);
        Ok(passed(event, old, new))
    }

    /// [`Queue::publish`], and the interrupt where the guest wants it.
    ///
    /// # Errors
    /// As for [`Queue::push_used`].
    pub fn publish_to(&mut self, memory: &GuestMemoryMmap, interrupt: &Interrupt) -> Result<(), QueueError> {
        if self.publish(memory)? {
            interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks the guest not to notify while the queue is being served (a wish: §2.7.10).
    ///
    /// # Errors
    /// As for [`Queue::push_used`].
    pub fn disable_notify(&self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        // With an event index, the old index lies behind: no notification comes before it is moved.
        if !self.event_idx {
            memory.store(USED_F_NO_NOTIFY.to_le(), GuestAddress(self.setup.used), Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Asks the guest to notify of the next chain. `true`: there is one already, so serve on instead of waiting.
    ///
    /// # Errors
    /// The guest's index jumped.
    pub fn enable_notify(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if self.event_idx {
            let place = self.setup.used + RING_HEADER + USED_ELEMENT * u64::from(self.setup.size);
            memory.store(self.next_available.to_le(), GuestAddress(place), Ordering::Relaxed)?;
        } else {
            memory.store(0u16, GuestAddress(self.setup.used), Ordering::Relaxed)?;
        }
        // We write our wish, then look; the guest writes its index, then looks at our wish (§2.7.13.4.1).
        fence(Ordering::SeqCst);
        self.has_available(memory)
    }
}

/// Whether the used index passed `event` on its way from `old` to `new` (§2.7.7.2, as `vring_need_event`).
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Address and length, in descriptors, of a checked indirect table.
fn indirect_table(memory: &GuestMemoryMmap, descriptor: Descriptor) -> Result<(u64, u16), QueueError> {
    let len = u64::from(descriptor.len);
    if len == 0 || len % DESCRIPTOR_LEN != 0 {
        return Err(QueueError::Indirect);
    }
    check_range(memory, descriptor.address, len)?;
    // A longer table is legal as memory; a chain in it never gets that far.
    Ok((descriptor.address, u16::try_from(len / DESCRIPTOR_LEN).unwrap_or(u16::MAX)))
}

/// Adds a descriptor's buffer to the chain. An empty one has no bytes to check, and nothing to add.
fn add_buffer(memory: &GuestMemoryMmap, descriptor: Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
    let writable = descriptor.has(DESC_F_WRITE);
    if !writable && !chain.writable().is_empty() {
        return Err(QueueError::Order);
    }
    if descriptor.len == 0 {
        return Ok(());
    }
    check_range(memory, descriptor.address, descriptor.len.into())?;
    let segment = Segment { address: GuestAddress(descriptor.address), len: descriptor.len };
    if chain.push(segment, writable) { Ok(()) } else { Err(QueueError::TooLong) }
}
