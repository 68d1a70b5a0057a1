//! What a hostile driver may do to a split queue (virtio 1.3 §2.7), item by item.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::vm::Memory;

use super::{Chain, F_EVENT_IDX, F_INDIRECT_DESC, Queue, QueueError, QueueSetup};

const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const BUFFER: u64 = 0x4_0000;
const TABLE: u64 = 0x5_0000;
const MEMORY: u64 = 2 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// A queue and the guest's side of it.
struct Rings {
    memory: Memory,
    queue: Queue,
    chain: Chain,
    size: u16,
    available: u16,
}

impl Rings {
    fn new(size: u16, features: u64) -> Self {
        let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
        let queue = Queue::new(memory.guest(), setup(size), 256, features).unwrap();
        Self { memory, queue, chain: Chain::default(), size, available: 0 }
    }

    fn guest(&self) -> &GuestMemoryMmap {
        self.memory.guest()
    }

    fn put16(&self, at: u64, value: u16) {
        self.guest().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get16(&self, at: u64) -> u16 {
        self.guest().read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): Raw) {
        let at = table + 16 * u64::from(index);
        self.guest().write_obj(address, GuestAddress(at)).unwrap();
        self.guest().write_obj(len, GuestAddress(at + 8)).unwrap();
        self.put16(at + 12, flags);
        self.put16(at + 14, next);
    }

    fn offer(&mut self, head: u16) {
        self.put16(AVAILABLE + 4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        self.guest().store(self.available, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
    }

    fn pop(&mut self) -> Result<bool, QueueError> {
        self.queue.pop(self.memory.guest(), &mut self.chain)
    }

    fn give_back(&mut self, head: u16) {
        self.queue.push_used(self.memory.guest(), head, 0).unwrap();
    }

    fn publish(&mut self) -> bool {
        self.queue.publish(self.memory.guest()).unwrap()
    }
}

fn setup(size: u16) -> QueueSetup {
    QueueSetup { size, ready: true, descriptors: DESCRIPTORS, available: AVAILABLE, used: USED }
}

/// Offers a chain of `main` descriptors with an indirect `table`, in a queue of 4.
fn pop_of(features: u64, main: &[Raw], table: &[Raw]) -> Result<(u32, u32), QueueError> {
    let mut rings = Rings::new(4, features);
    main.iter().zip(0..).for_each(|(d, i)| rings.descriptor(DESCRIPTORS, i, *d));
    table.iter().zip(0..).for_each(|(d, i)| rings.descriptor(TABLE, i, *d));
    rings.offer(0);
    let popped = rings.pop()?;
    assert!(popped);
    Ok((rings.chain.readable_len(), rings.chain.writable_len()))
}

#[test]
fn sizes_are_powers_of_two_up_to_the_maximum() {
    let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
    for size in 0..=u16::MAX {
        let good = matches!(size, 1 | 2 | 4 | 8 | 16 | 32 | 64 | 128 | 256);
        let made = Queue::new(memory.guest(), setup(size), 256, 0);
        assert_eq!(made.is_ok(), good, "{size}");
        assert!(good || matches!(made, Err(QueueError::Size(_))));
    }
}

#[test]
fn rings_are_aligned_and_lie_in_one_piece_of_memory() {
    let memory = Memory::new(&"4G".parse().unwrap()).unwrap();
    let gap = 0xc000_0000;
    let edges = [gap - 16, gap, 0xd000_0000, 5 << 30, u64::MAX - 15, !0xff, 1 << 63];
    let misaligned = [DESCRIPTORS + 8, AVAILABLE + 1, USED + 2, u64::MAX];
    for ring in 0..3 {
        for address in edges.into_iter().chain(misaligned) {
            let mut setup = setup(256);
            let field = [&mut setup.descriptors, &mut setup.available, &mut setup.used];
            let alignment = [16, 2, 4][ring];
            *field.into_iter().nth(ring).unwrap() = address;
            match Queue::new(memory.guest(), setup, 256, 0) {
                Err(QueueError::Alignment(a)) => assert!(a == address && a % alignment != 0),
                Err(QueueError::Range { address: a, .. }) => assert_eq!(a, address),
                Ok(_) => assert!(misaligned.contains(&address) && address % alignment == 0, "{address:#x}"),
                Err(e) => panic!("{e}"),
            }
        }
    }
}

#[test]
fn a_ring_may_end_where_memory_ends() {
    let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
    for (ring, len) in [(0, 16 * 256), (1, 6 + 2 * 256), (2, 6 + 8 * 256)] {
        for (back, good) in [(0, true), (1, false)] {
            let mut setup = setup(256);
            let field = [&mut setup.descriptors, &mut setup.available, &mut setup.used];
            let alignment = [16, 2, 4][ring];
            // The last address that is aligned and has room, and the one behind.
            let last = (MEMORY - len) / alignment * alignment;
            *field.into_iter().nth(ring).unwrap() = last + back * alignment;
            assert_eq!(Queue::new(memory.guest(), setup, 256, 0).is_ok(), good, "{ring} {back}");
        }
    }
}

#[test]
fn an_index_that_jumps_is_an_error_and_takes_nothing() {
    for index in [5, 6, 255, 0x8000, u16::MAX] {
        let mut rings = Rings::new(4, 0);
        rings.put16(AVAILABLE + 2, index);
        for _ in 0..3 {
            assert!(matches!(rings.pop(), Err(QueueError::AvailableIndex { from: 0, .. })), "{index}");
        }
        assert!(rings.queue.enable_notify(rings.memory.guest()).is_err());
    }
}

#[test]
fn bad_chains_are_refused() {
    let ok = (BUFFER, 16, 0, 0);
    let index = pop_of(0, &[(BUFFER, 16, NEXT, 4)], &[]);
    assert!(matches!(index, Err(QueueError::Index(4))));
    let index = pop_of(0, &[(BUFFER, 16, NEXT, u16::MAX)], &[]);
    assert!(matches!(index, Err(QueueError::Index(u16::MAX))));
    for flags in [NEXT, NEXT | WRITE] {
        for len in [0, 16] {
            assert!(
                matches!(pop_of(0, &[(BUFFER, len, flags, 0)], &[]), Err(QueueError::TooLong)),
                "self-loop"
            );
        }
    }
    let two = [(BUFFER, 16, NEXT, 1), (BUFFER, 16, NEXT, 0)];
    assert!(matches!(pop_of(0, &two, &[]), Err(QueueError::TooLong)), "loop of two");
    let order = [(BUFFER, 16, NEXT | WRITE, 1), ok];
    assert!(matches!(pop_of(0, &order, &[]), Err(QueueError::Order)));
    for (address, len) in [
        (MEMORY, 1),
        (MEMORY - 1, 2),
        (MEMORY - 16, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 7, 16),
        (0xd000_0000, 4096),
    ] {
        let range = pop_of(0, &[(address, len, 0, 0)], &[]);
        assert!(matches!(range, Err(QueueError::Range { .. })), "{address:#x} {len}");
    }
}

#[test]
fn bad_heads_are_refused() {
    for head in [4, 5, 64, 255, u16::MAX] {
        let mut rings = Rings::new(4, 0);
        rings.offer(head);
        assert!(matches!(rings.pop(), Err(QueueError::Index(h)) if h == head));
    }
}

#[test]
fn bad_indirect_tables_are_refused() {
    let table = |len, flags, next| [(TABLE, len, INDIRECT | flags, next)];
    let one = [(BUFFER, 16, 0, 0)];
    let refused = |features, main: &[Raw], inner: &[Raw]| {
        assert!(matches!(pop_of(features, main, inner), Err(QueueError::Indirect)), "{main:?} {inner:?}");
    };
    refused(0, &table(16, 0, 0), &one);
    let on = F_INDIRECT_DESC;
    refused(on, &table(16, NEXT, 1), &one);
    for len in [0, 1, 15, 17, u32::MAX] {
        refused(on, &table(len, 0, 0), &one);
    }
    refused(on, &table(16, 0, 0), &[(TABLE, 16, INDIRECT, 0)]);
    refused(on, &table(32, 0, 0), &[(BUFFER, 16, NEXT, 1), (TABLE, 16, INDIRECT, 0)]);
    let range = pop_of(on, &[(MEMORY - 16, 32, INDIRECT, 0)], &[]);
    assert!(matches!(range, Err(QueueError::Range { .. })));
    let range = pop_of(on, &[(u64::MAX - 15, 32, INDIRECT, 0)], &[]);
    assert!(matches!(range, Err(QueueError::Range { .. })));
    let index = pop_of(on, &table(16, 0, 0), &[(BUFFER, 16, NEXT, 1)]);
    assert!(matches!(index, Err(QueueError::Index(1))));
    let long = pop_of(on, &table(16 * 5, 0, 0), &(1..=5).map(|i| (BUFFER, 1, NEXT, i)).collect::<Vec<_>>());
    assert!(matches!(long, Err(QueueError::TooLong)), "longer than the queue");
}

#[test]
fn good_chains_are_taken() {
    let full =
        [(BUFFER, 1, NEXT, 1), (BUFFER, 2, NEXT, 2), (BUFFER, 3, NEXT | WRITE, 3), (BUFFER, 4, WRITE, 0)];
    assert_eq!(pop_of(0, &full, &[]).unwrap(), (3, 7));
    // §2.7.5.3.2: the table's own WRITE flag means nothing.
    for flags in [INDIRECT, INDIRECT | WRITE] {
        assert_eq!(pop_of(F_INDIRECT_DESC, &[(TABLE, 64, flags, 0)], &full).unwrap(), (3, 7));
    }
    let behind = [(BUFFER, 5, NEXT, 1), (TABLE, 16, INDIRECT, 0)];
    assert_eq!(pop_of(F_INDIRECT_DESC, &behind, &[(BUFFER, 6, WRITE, 0)]).unwrap(), (5, 6));
    // Nothing is there to be checked, and nothing to be added.
    assert_eq!(pop_of(0, &[(u64::MAX, 0, 0, 0)], &[]).unwrap(), (0, 0));
    assert_eq!(pop_of(0, &[(BUFFER, 0, NEXT | WRITE, 1), (BUFFER, 1, WRITE, 0)], &[]).unwrap(), (0, 1));
    assert_eq!(pop_of(0, &[(MEMORY - 8, 8, 0, 0)], &[]).unwrap(), (8, 0));
}

#[test]
fn a_chain_has_less_than_4_gib() {
    let mut chain = Chain::default();
    let segment = |len| super::Segment { address: GuestAddress(0), len };
    assert!(chain.push(segment(u32::MAX), false));
    assert!(!chain.push(segment(1), false));
    assert!(chain.push(segment(1), true));
}

#[test]
fn a_chain_is_offered_once_at_a_time() {
    let mut rings = Rings::new(4, 0);
    rings.descriptor(DESCRIPTORS, 2, (BUFFER, 16, 0, 0));
    rings.offer(2);
    rings.offer(2);
    assert!(rings.pop().unwrap());
    assert!(matches!(rings.pop(), Err(QueueError::Twice(2))));
    rings.give_back(2);
    assert!(rings.pop().unwrap());
    assert!(!rings.pop().unwrap());
}

#[test]
fn a_chain_that_was_put_back_is_taken_again() {
    let mut rings = Rings::new(4, 0);
    rings.descriptor(DESCRIPTORS, 1, (BUFFER, 16, 0, 0));
    rings.offer(1);
    for _ in 0..3 {
        assert!(rings.pop().unwrap());
        rings.queue.undo_pop(&rings.chain);
    }
    assert!(rings.pop().unwrap());
    assert_eq!(rings.chain.head(), 1);
}

/// Each index goes from 65535 to 0.
#[test]
fn every_index_wraps() {
    for features in [0, F_EVENT_IDX] {
        let mut rings = Rings::new(4, features);
        (0..4).for_each(|i| rings.descriptor(DESCRIPTORS, i, (BUFFER, 16, 0, 0)));
        for i in 0..70_000u32 {
            let index = i as u16;
            // The guest wants to hear of this one, or of none before the next round.
            let wants = i % 3 == 0;
            rings.put16(AVAILABLE + 4 + 2 * 4, if wants { index } else { index.wrapping_sub(1) });
            rings.offer(index % 4);
            assert!(rings.pop().unwrap());
            rings.give_back(index % 4);
            assert_eq!(rings.publish(), wants || features == 0, "{i}");
            assert_eq!(rings.get16(USED + 2), index.wrapping_add(1));
            assert!(!rings.queue.enable_notify(rings.memory.guest()).unwrap());
            if features != 0 {
                assert_eq!(rings.get16(USED + 4 + 8 * 4), index.wrapping_add(1), "avail_event");
            }
        }
    }
}

#[test]
fn the_interrupt_flag_is_a_wish_that_is_kept() {
    let mut rings = Rings::new(4, 0);
    for (flags, wanted) in [(0, true), (1, false), (0xfffe, true), (u16::MAX, false)] {
        rings.put16(AVAILABLE, flags);
        rings.give_back(0);
        assert_eq!(rings.publish(), wanted, "{flags}");
        assert!(!rings.publish(), "nothing new");
    }
}

#[test]
fn the_notify_flag_follows_the_device() {
    let rings = Rings::new(4, 0);
    rings.queue.disable_notify(rings.guest()).unwrap();
    assert_eq!(rings.get16(USED), 1);
    assert!(!rings.queue.enable_notify(rings.guest()).unwrap());
    assert_eq!(rings.get16(USED), 0);
}

#[test]
fn what_was_offered_while_notifications_were_off_is_seen() {
    for features in [0, F_EVENT_IDX] {
        let mut rings = Rings::new(4, features);
        rings.queue.disable_notify(rings.guest()).unwrap();
        rings.offer(0);
        assert!(rings.queue.enable_notify(rings.guest()).unwrap());
    }
}

#[test]
fn a_used_element_holds_head_and_length() {
    let mut rings = Rings::new(4, 0);
    rings.queue.push_used(rings.memory.guest(), 3, 0x0102_0304).unwrap();
    assert_eq!(rings.get16(USED + 2), 0, "not shown before it is published");
    rings.publish();
    let element: [u32; 2] = [0, 4].map(|i| rings.guest().read_obj(GuestAddress(USED + 4 + i)).unwrap());
    assert_eq!(element, [3, 0x0102_0304]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The guest is interrupted exactly when the entry that it named is among those given back (§2.7.7.2). The model
    /// counts without wrapping.
    #[test]
    fn the_event_index_is_exact(rounds in prop::collection::vec((0u16..=8, any::<u16>(), -9i32..9), 1..200)) {
        let mut rings = Rings::new(8, F_EVENT_IDX);
        // Starts near the wrap: as many rounds as it takes to get there.
        let mut used = 0u64;
        while used < 65_400 {
            (0..8).for_each(|head| rings.give_back(head));
            rings.publish();
            used += 8;
        }
        for (count, anywhere, near) in rounds {
            let event = if near == 8 { anywhere } else { (used as i32 + near) as u16 };
            rings.put16(AVAILABLE + 4 + 2 * 8, event);
            (0..count).for_each(|head| rings.give_back(head));
            let wanted = (used..used + u64::from(count)).any(|i| i as u16 == event);
            used += u64::from(count);
            prop_assert_eq!(rings.publish(), wanted);
        }
    }

    /// Whatever the rings hold, taking ends, and a taken chain lies in memory.
    #[test]
    fn random_rings_do_no_harm(
        descriptors in prop::collection::vec((0u64..0x60, any::<u64>(), 0u32..0x2000, 0u16..8, 0u16..10, 0u8..8), 8),
        table in prop::collection::vec((any::<u32>(), 0u16..8, 0u16..10), 8),
        heads in prop::collection::vec(0u16..10, 8),
        index in 0u16..10,
        features in prop::sample::select(vec![0, F_INDIRECT_DESC, F_INDIRECT_DESC | F_EVENT_IDX]),
    ) {
        let mut rings = Rings::new(8, features);
        for ((page, wild, len, flags, next, kind), i) in descriptors.into_iter().zip(0..) {
            let (address, len) = match kind {
                0 => (wild, len),
                1 | 2 => (TABLE, len / 16 * 16),
                _ => (page << 16, len),
            };
            rings.descriptor(DESCRIPTORS, i, (address, len, flags, next));
        }
        for ((address, flags, next), i) in table.into_iter().zip(0..) {
            rings.descriptor(TABLE, i, (u64::from(address) >> 11, 16, flags, next));
        }
        for (head, i) in heads.into_iter().zip(0u64..) {
            rings.put16(AVAILABLE + 4 + 2 * i, head);
        }
        rings.put16(AVAILABLE + 2, index);
        let mut taken = 0;
        while let Ok(true) = rings.pop() {
            taken += 1;
            let segments = rings.chain.readable().iter().chain(rings.chain.writable());
            for segment in segments {
                prop_assert!(segment.len > 0 && segment.address.0 + u64::from(segment.len) <= MEMORY);
            }
            prop_assert!(rings.chain.readable().len() + rings.chain.writable().len() <= 8);
        }
        prop_assert!(taken <= 8);
    }
}
