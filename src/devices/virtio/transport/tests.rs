//! What a hostile driver may do to a device's registers (virtio 1.3 §2.1, §3.1, §4.2.2), item by item.

use std::io;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::BusDevice;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::testing::Driver;
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceKind, VirtioDevice, WorkerControl, read_config_space,
};

const STATUS: u64 = 0x70;
const QUEUE_READY: u64 = 0x44;
const QUEUE_REGISTERS: [u64; 8] = [0x38, QUEUE_READY, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4];
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;

/// A device with a configuration space of 10 bytes, of which the driver may write the last two.
#[derive(Default)]
struct Stub {
    fails: bool,
    tail: [u8; 2],
}

impl VirtioDevice for Stub {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn id(&self) -> &str {
        "stub"
    }
    fn features(&self) -> u64 {
        1 << 3 | 1 << 40
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [a, b] = self.tail;
        read_config_space(&[1, 2, 3, 4, 5, 6, 7, 8, a, b], offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            if let 8 | 9 = at {
                self.tail[at as usize - 8] = *byte;
            }
        }
    }
    fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
        if self.fails { Err(io::Error::from(io::ErrorKind::OutOfMemory).into()) } else { Ok(()) }
    }
    fn workers(&self) -> Vec<WorkerControl> {
        Vec::new()
    }
    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        Vec::new()
    }
}

fn stub() -> Driver {
    Driver::new(Box::new(Stub::default()))
}

fn interrupted(driver: &Driver) -> bool {
    driver.line.read().is_ok()
}

/// The status as the specification's words have it: reset, the next bit, or giving up.
fn next_status(now: u32, written: u32, features_good: bool) -> u32 {
    let rising: &[(u32, u32)] = &[(0, 1), (1, 3), (3, 11), (11, 15)];
    match written {
        0 => 0,
        w if now & 128 == 0 && w == now | 128 => w,
        w if rising.contains(&(now, w)) && (w != 11 || features_good) => w,
        _ => now,
    }
}

/// Brings a new device to a status that can be.
fn driver_at(status: u32) -> Driver {
    let mut driver = stub();
    match status & 15 {
        0 => {}
        1 => driver.write(STATUS, 1),
        3 => [1, 3].into_iter().for_each(|s| driver.write(STATUS, s)),
        _ => driver.negotiate(u64::MAX),
    }
    if status & 4 != 0 {
        driver.set_up_queue(0, 16);
        driver.write(STATUS, 15);
    }
    if status & 128 != 0 {
        driver.write(STATUS, status);
    }
    assert_eq!(driver.read(STATUS), status);
    driver
}

#[test]
fn every_status_in_every_state() {
    for now in [0, 1, 3, 11, 15, 128, 129, 131, 139, 143] {
        for written in 0..=0xff {
            let mut driver = driver_at(now);
            driver.write(STATUS, written);
            // A driver at 3 has not accepted any features.
            assert_eq!(driver.read(STATUS), next_status(now, written, false), "{now} {written}");
        }
    }
}

#[test]
fn a_status_has_eight_bits() {
    let mut driver = driver_at(1);
    for written in [0x100, 0x103, 0x8000_0003, u32::MAX] {
        driver.write(STATUS, written);
        assert_eq!(driver.read(STATUS), 1);
    }
}

#[test]
fn a_driver_may_give_up_on_a_device_in_need_of_a_reset() {
    let mut driver = Driver::new(Box::new(Stub { fails: true, ..Stub::default() }));
    driver.negotiate(u64::MAX);
    driver.write(STATUS, 15);
    assert_eq!(driver.read(STATUS), 15 | 64);
    // As Linux does: what it reads, and the bit.
    driver.write(STATUS, 15 | 64 | 128);
    assert_eq!(driver.read(STATUS), 15 | 64 | 128);
    driver.write(STATUS, 64);
    assert_eq!(driver.read(STATUS), 15 | 64 | 128, "64 is no reset");
    driver.write(STATUS, 0);
    assert_eq!(driver.read(STATUS), 0);
}

#[test]
fn features_are_offered_by_halves_and_no_further() {
    let mut driver = stub();
    for (select, offered) in [(0, 1 << 3 | 3 << 28), (1, 1 | 1 << 8), (2, 0), (3, 0), (32, 0), (u32::MAX, 0)]
    {
        driver.write(0x14, select);
        assert_eq!(driver.read(0x10), offered, "{select}");
    }
}

/// Accepts these two halves, and says whether the device goes on.
fn accepts(low: u32, high: u32) -> bool {
    let mut driver = driver_at(3);
    for (select, bits) in [(0, low), (1, high), (2, u32::MAX), (u32::MAX, u32::MAX)] {
        driver.write(0x24, select);
        driver.write(0x20, bits);
    }
    driver.write(STATUS, 11);
    driver.read(STATUS) == 11
}

#[test]
fn features_that_are_not_offered_are_refused() {
    assert!(accepts(0, 1));
    assert!(accepts(1 << 3, 1 | 1 << 8));
    assert!(!accepts(0, 0), "version 1 is needed");
    assert!(!accepts(1 << 3, 1 << 8));
    for bit in (0..32).filter(|b| ![3, 28, 29].contains(b)) {
        assert!(!accepts(1 << bit, 1), "{bit}");
    }
    for bit in (1..32).filter(|b| *b != 8) {
        assert!(!accepts(0, 1 | 1 << bit), "{bit}");
    }
}

#[test]
fn features_count_only_before_they_are_said_to() {
    // Before DRIVER, nothing is taken: version 1 is missing later.
    for early in [0, 1] {
        let mut driver = driver_at(early);
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        [1, 3, 11].into_iter().for_each(|s| driver.write(STATUS, s));
        assert_eq!(driver.read(STATUS), 3);
    }
}

#[test]
fn queues_change_only_between_features_and_start() {
    for (status, open) in
        [(0, false), (1, false), (3, false), (11, true), (15, false), (139, false), (143, false)]
    {
        for register in QUEUE_REGISTERS {
            let mut driver = driver_at(status);
            driver.write(0x30, 1);
            let before = driver.mmio.transport.queues.clone();
            driver.write(register, 1);
            let changed = driver.mmio.transport.queues != before;
            assert_eq!(changed, open, "{status} {register:#x}");
        }
    }
}

#[test]
fn a_queue_that_is_not_there_is_nothing() {
    let mut driver = driver_at(11);
    let before = driver.mmio.transport.queues.clone();
    for select in [2, 3, 0x1_0000, 0x1_0001, u32::MAX] {
        driver.write(0x30, select);
        assert_eq!((driver.read(0x34), driver.read(QUEUE_READY)), (0, 0));
        QUEUE_REGISTERS.into_iter().for_each(|register| driver.write(register, 1));
        driver.notify(select as usize);
    }
    assert!(driver.mmio.transport.queues == before);
}

/// Starts a stub whose queue 0 is set up, but for what `spoil` does to it.
fn start_spoiled(spoil: impl FnOnce(&mut Driver)) -> Driver {
    let mut driver = stub();
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0, 16);
    spoil(&mut driver);
    driver.write(STATUS, 15);
    driver
}

#[test]
fn a_start_that_fails_asks_for_a_reset_and_interrupts() {
    let spoils: [(u64, u32); 9] = [
        (0x38, 0),
        (0x38, 3),
        (0x38, 32),
        (0x38, 0x1_0010),
        (0x80, 8),
        (0x90, 1),
        (0xa0, 2),
        (0x84, 1),
        (0xa4, u32::MAX),
    ];
    for (register, value) in spoils {
        let mut driver = start_spoiled(|d| d.write(register, value));
        assert_eq!(driver.read(STATUS), 15 | 64, "{register:#x} {value:#x}");
        assert_eq!(driver.read(INTERRUPT_STATUS), 2);
        assert!(interrupted(&driver));
        driver.write(STATUS, 0);
        assert_eq!((driver.read(STATUS), driver.read(INTERRUPT_STATUS)), (0, 0));
        driver.negotiate(u64::MAX);
        driver.set_up_queue(0, 16);
        driver.write(STATUS, 15);
        assert_eq!(driver.read(STATUS), 15, "it starts after a reset");
    }
}

#[test]
fn a_queue_that_is_missing_asks_for_a_reset() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    driver.negotiate(u64::MAX);
    driver.write(STATUS, 15);
    assert_eq!(driver.read(STATUS), 15 | 64);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut driver = start_spoiled(|d| d.write(0x38, 3));
    driver.write(INTERRUPT_ACK, 1);
    assert_eq!(driver.read(INTERRUPT_STATUS), 2);
    driver.write(INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
}

#[test]
fn the_generation_moves_with_each_change() {
    let mut driver = stub();
    let mut seen = driver.read(0xfc);
    for _ in 0..600 {
        driver.mmio.transport.interrupt.config_changed();
        let now = driver.read(0xfc);
        assert_eq!(now, seen.wrapping_add(1));
        seen = now;
    }
    driver.write(STATUS, 0);
    assert_eq!(driver.read(0xfc), seen, "a reset is no change");
}

#[test]
fn the_configuration_is_read_at_any_offset() {
    let driver = &mut driver_at(3);
    let space = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0];
    for width in [1, 2, 4, 8] {
        for offset in (0..32).chain([0xefc, 0xf00 - 8, u64::MAX - 0x108]) {
            let mut data = vec![0xff; width];
            driver.mmio.read(0x100 + offset, &mut data);
            let expected = (0..width as u64).map(|i| *space.get((offset + i) as usize).unwrap_or(&0));
            assert_eq!(data, expected.collect::<Vec<u8>>(), "{offset} {width}");
        }
    }
}

#[test]
fn the_configuration_is_written_where_it_may_be() {
    for (status, open) in [(0, false), (1, false), (3, true), (11, true), (15, true), (131, false)] {
        let mut driver = driver_at(status);
        // Read-only fields, a straddling write, one past the end.
        for (offset, len) in [(0, 8), (7, 2), (8, 4), (12, 4), (0xefc, 4)] {
            driver.mmio.write(0x100 + offset, &vec![0xee; len]);
        }
        let mut data = [0; 8];
        driver.mmio.read(0x104, &mut data);
        let tail = if open { 0xee } else { 0 };
        assert_eq!(data, [5, 6, 7, 8, tail, tail, 0, 0], "{status}");
    }
}

#[test]
fn registers_are_whole_words() {
    let mut driver = stub();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (3, 1), (0xfe, 4), (0xfc, 8)] {
        let mut data = vec![0xff; len];
        driver.mmio.read(offset, &mut data);
        assert!(data.iter().all(|b| *b == 0xff), "{offset} {len}");
        driver.mmio.write(STATUS + offset, &vec![1; len]);
    }
    assert_eq!(driver.read(STATUS), 0);
}

#[test]
fn a_device_is_reset_while_it_serves() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    for _ in 0..50 {
        driver.negotiate(u64::MAX);
        driver.restart_queues(&[16]);
        driver.write(STATUS, 15);
        let buffers: Vec<_> = (0..16).map(|_| driver.buffer(4096)).collect();
        buffers.iter().for_each(|b| _ = driver.offer(0, &[], &[*b]));
        driver.write(STATUS, 0);
        // Nothing that was offered is touched any more.
        buffers
            .iter()
            .for_each(|(at, _)| driver.memory.guest().write_slice(&[0x55; 4096], GuestAddress(*at)).unwrap());
        std::thread::yield_now();
        for buffer in buffers {
            assert!(driver.bytes(buffer).iter().all(|b| *b == 0x55));
        }
        driver.free_buffers();
        assert_eq!(driver.read(INTERRUPT_STATUS), 0);
    }
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = driver_at(15);
    driver.write(0x14, 1);
    driver.write(0x30, 1);
    driver.write(STATUS, 0);
    assert_eq!(driver.read(0x34), 16, "queue 0 is selected");
    assert_eq!(driver.read(QUEUE_READY), 0);
    assert_eq!(driver.read(0x10), 1 << 3 | 3 << 28, "the low features are selected");
    [1, 3, 11].into_iter().for_each(|s| driver.write(STATUS, s));
    assert_eq!(driver.read(STATUS), 3, "the accepted features are forgotten");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_status_follows_the_model(
        written in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(vec![0, 1, 3, 11, 15, 128])], 1..60)
    ) {
        let (mut driver, mut model) = (stub(), 0);
        for status in written {
            driver.write(STATUS, status.into());
            model = next_status(model, status.into(), false);
            prop_assert_eq!(driver.read(STATUS), model);
        }
    }

    /// Nothing that a guest writes to registers and rings ends the process, or keeps the device from a new start.
    #[test]
    fn random_registers_and_rings_do_no_harm(
        writes in prop::collection::vec((0u64..0x40, prop_oneof![0u32..20, any::<u32>()]), 0..60),
        bytes in prop::collection::vec(any::<u8>(), 0x400),
        started in any::<bool>(),
    ) {
        let mut driver = match started {
            true => Driver::start(Box::new(Rng::default()), &[16]),
            false => Driver::new(Box::new(Rng::default())),
        };
        for at in [0x10_0000, 0x10_8000, 0x10_c000] {
            driver.memory.guest().write_slice(&bytes, GuestAddress(at)).unwrap();
        }
        for (register, value) in writes {
            driver.write(4 * register, value);
            driver.read(4 * register);
            driver.notify(0);
        }
        driver.write(STATUS, 0);
        driver.free_buffers();
        driver.negotiate(u64::MAX);
        driver.restart_queues(&[16]);
        driver.write(STATUS, 15);
        let buffer = driver.buffer(64);
        driver.offer(0, &[], &[buffer]);
        prop_assert_eq!(driver.wait_used(0).1, 64);
    }
}
