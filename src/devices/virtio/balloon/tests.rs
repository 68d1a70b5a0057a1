//! The balloon through the registers and rings that a guest has.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::bus::BusDevice;
use crate::config::Size;

use super::super::testing::{Driver, Rig};
use super::*;

/// Of [`Driver`]'s guest.
const MEMORY: Size = Size::mib(64);
/// Where no ring and no buffer of [`Driver`]'s lies.
const PAGES: u64 = 0x200_0000;
const ALL: &str = "0,deflate-on-oom,free-page-reporting,stats=1";

fn balloon(config: &str) -> Balloon {
    Balloon::new(&config.parse().unwrap(), MEMORY)
}

/// A driver that accepts `features` of a balloon, with as many queues as that makes, and the host's handle.
fn start(config: &str, features: u64) -> (Driver, BalloonHandle) {
    let balloon = balloon(config);
    let handle = balloon.handle();
    let queues = 2 + (balloon.features() & features & (F_STATS | F_REPORTING)).count_ones() as usize;
    (Driver::start_with(Box::new(balloon), &[16; 4][..queues], features), handle)
}

/// For tests of all kinds of devices.
pub fn rig() -> Rig {
    Rig {
        name: "balloon",
        driver: start(ALL, u64::MAX).0,
        sizes: vec![16; 4],
        queues: vec![0, 1, 2, 3],
        stir: Box::new(|| {}),
        offer: Box::new(|driver| {
            let pages = driver.filled(&numbers(&[(PAGES / PAGE) as u32]));
            let stats = driver.filled(&stat(4, 1000));
            driver.post(0, &[pages], &[]);
            driver.post(1, &[pages], &[]);
            driver.post(2, &[stats], &[]);
            driver.post(3, &[], &[(PAGES, 4096)]);
        }),
        works: Box::new(|driver| {
            fill(driver, PAGES, 4096);
            let pages = driver.filled(&numbers(&[(PAGES / PAGE) as u32]));
            driver.offer(0, &[pages], &[]);
            assert_eq!(driver.wait_used(0), (0, 0));
            assert!(!is_filled(driver, PAGES / PAGE), "it keeps the page");
        }),
    }
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn fill(driver: &Driver, at: u64, len: usize) {
    driver.memory.guest().write_slice(&vec![0x77; len], GuestAddress(at)).unwrap();
}

fn is_filled(driver: &Driver, page: u64) -> bool {
    driver.memory.guest().read_obj::<u8>(GuestAddress(page * PAGE)).unwrap() == 0x77
}

/// How many of `count` pages of guest memory from `at` are resident in this process, as the host's kernel says
/// (Documentation/admin-guide/mm/pagemap.rst).
fn resident(driver: &Driver, at: u64, count: usize) -> usize {
    let host = driver.memory.guest().get_host_address(GuestAddress(at)).unwrap() as u64;
    let mut entries = vec![0; 8 * count];
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    pagemap.read_exact_at(&mut entries, host / PAGE * 8).unwrap();
    entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count()
}

#[test]
fn an_inflated_balloon_gives_memory_back() {
    let (mut driver, _) = start("0", u64::MAX);
    let len = 16 << 20;
    fill(&driver, PAGES, len);
    assert_eq!(resident(&driver, PAGES, 4096), 4096);
    let first = (PAGES / PAGE) as u32;
    // Downwards, 256 at a time, as Linux does.
    for batch in (first..first + 4096).rev().collect::<Vec<_>>().chunks(256) {
        let buffer = driver.filled(&numbers(batch));
        driver.offer(0, &[buffer], &[]);
        assert_eq!(driver.wait_used(0).1, 0);
    }
    assert_eq!(resident(&driver, PAGES, 4096), 0);
    assert!(!is_filled(&driver, first.into()) && !is_filled(&driver, u64::from(first) + 4095));
    let buffer = driver.filled(&numbers(&[first]));
    driver.offer(1, &[buffer], &[]);
    assert_eq!(driver.wait_used(1).1, 0);
    fill(&driver, PAGES, 4096);
    assert!(is_filled(&driver, first.into()), "the guest has its page again");
}

#[test]
fn only_the_named_pages_go() {
    let (mut driver, _) = start("0", u64::MAX);
    fill(&driver, PAGES, 16 * 4096);
    let first = (PAGES / PAGE) as u32;
    // Twice the same, and pages that are none.
    let pages = [first + 9, first + 1, first + 1, first + 2, u32::MAX, 64 << 8, u32::MAX - 1];
    let buffer = driver.filled(&numbers(&pages));
    driver.offer(0, &[buffer], &[]);
    driver.wait_used(0);
    let gone: Vec<u64> = (0..16).filter(|i| !is_filled(&driver, u64::from(first) + i)).collect();
    assert_eq!(gone, [1, 2, 9]);
}

#[test]
fn requests_of_odd_shapes_are_given_back() {
    let (mut driver, _) = start("0", u64::MAX);
    for len in [1, 3, 5, 1025] {
        let buffer = driver.filled(&vec![0xff; len]);
        driver.offer(0, &[buffer], &[]);
        assert_eq!(driver.wait_used(0).1, 0);
    }
    let buffer = driver.buffer(64);
    driver.offer(0, &[], &[buffer]);
    assert_eq!(driver.wait_used(0).1, 0);
}

#[test]
fn an_endless_request_asks_for_a_reset() {
    let (mut driver, handle) = start("0", u64::MAX);
    let buffer = (PAGES, 4 * (1 << 16) + 4);
    driver.offer(0, &[buffer], &[]);
    driver.wait_needs_reset();
    driver.write(0x70, 0);
    assert!(!handle.status().active);
}

/// What is accepted, and the queue that reports come in: one that is left out shifts those behind it.
#[test]
fn a_reset_does_not_wait_for_a_queue_full_of_long_requests() {
    let balloon = balloon("0");
    let mut driver = Driver::start(Box::new(balloon), &[128; 2]);
    // No two are neighbours, so each is a system call of its own.
    let first = (PAGES / PAGE) as u32;
    let pages: Vec<_> = (0..1 << 16).map(|i| first + 2 * (i % 4096)).collect();
    let buffer = driver.filled(&numbers(&pages));
    for _ in 0..128 {
        driver.post(0, &[buffer], &[]);
    }
    driver.notify(0);
    driver.wait_used(0);
    let begin = Instant::now();
    driver.write(0x70, 0);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
}

#[test]
fn queues_are_numbered_by_the_accepted_features() {
    for (features, queue) in [(u64::MAX, 3), (!F_STATS, 2)] {
        let (mut driver, _) = start(ALL, features);
        fill(&driver, PAGES, 4 * 4096);
        driver.offer(queue, &[], &[(PAGES + 100, 3 * 4096)]);
        assert_eq!(driver.wait_used(queue), (0, 0));
        let kept = [0, 1, 2, 3].map(|i| is_filled(&driver, PAGES / PAGE + i));
        assert_eq!(kept, [true, false, false, true], "whole pages only");
    }
}

#[test]
fn a_queue_that_the_features_need_must_be_there() {
    let mut driver = Driver::new(Box::new(balloon(ALL)));
    driver.negotiate(u64::MAX);
    (0..3).for_each(|queue| driver.set_up_queue(queue, 16));
    driver.write(0x70, 15);
    assert_eq!(driver.read(0x70), 15 | 64);
}

#[test]
fn there_are_as_many_queues_as_features_need() {
    for (config, queues) in [("0", 2), ("0,stats=1", 3), ("0,free-page-reporting", 3), (ALL, 4)] {
        assert_eq!(balloon(config).queue_sizes().len(), queues);
    }
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_asked_for_and_read() {
    let (mut driver, handle) = start(ALL, u64::MAX);
    let first = driver.filled(&[stat(4, 1000), stat(5, 2000), stat(99, 7), vec![6]].concat());
    let begin = Instant::now();
    driver.offer(2, &[first], &[]);
    // It comes back when the next ones are wanted, which is the timer's doing.
    driver.wait_used(2);
    assert!(begin.elapsed() < Duration::from_secs(5));
    let stats = handle.status().stats;
    assert_eq!(stats.values[BalloonStats::FREE], Some(1000));
    assert_eq!(stats.values[BalloonStats::TOTAL], Some(2000));
    assert_eq!(stats.values.iter().flatten().count(), 2);
}

#[test]
fn statistics_without_end_are_cut() {
    let (mut driver, handle) = start(ALL, u64::MAX);
    let huge = driver.filled(&stat(4, 5).repeat(100_000));
    let second = driver.filled(&stat(4, 6));
    driver.offer(2, &[huge], &[]);
    driver.offer(2, &[second], &[]);
    assert_eq!(driver.wait_used(2), (0, 0), "the older of two comes back at once");
    driver.wait("the second is not read", |_| {
        (handle.status().stats.values[BalloonStats::FREE] == Some(6)).then_some(())
    });
}

#[test]
fn a_target_waits_for_a_driver() {
    let balloon = balloon("1M");
    let handle = balloon.handle();
    let mut driver = Driver::new(Box::new(balloon));
    assert_eq!(driver.read(0x100), 256);
    for mib in (0..64).cycle().take(1000) {
        handle.set_target(Size::mib(mib)).unwrap();
    }
    handle.set_target(Size(2 << 20 | 4095)).unwrap();
    assert_eq!(driver.read(0x100), 512, "whole pages");
    assert!(driver.line.read().is_err(), "nobody is there to be interrupted");
    assert!(!handle.status().active);
}

#[test]
fn a_target_reaches_a_running_driver() {
    let (mut driver, handle) = start("0", u64::MAX);
    let generation = driver.read(0xfc);
    handle.set_target(Size::mib(8)).unwrap();
    assert_eq!((driver.read(0x100), driver.read(0x60)), (2048, 2));
    assert!(driver.line.read().is_ok());
    assert_ne!(driver.read(0xfc), generation);
    assert!(handle.status().active);
    driver.write(0x70, 0);
    handle.set_target(Size::mib(4)).unwrap();
    assert_eq!(driver.read(0x60), 0, "no interrupt after a reset");
}

#[test]
fn a_target_is_at_most_the_memory() {
    let handle = balloon("0").handle();
    handle.set_target(MEMORY).unwrap();
    let asked = Size(MEMORY.0 + 1);
    assert_eq!(handle.set_target(asked), Err(TargetTooLarge { asked, memory: MEMORY }));
    assert_eq!(handle.status().target, MEMORY);
}

#[test]
fn the_driver_says_how_large_it_is() {
    let (mut driver, handle) = start("1M", u64::MAX);
    driver.write(0x104, 100);
    assert_eq!(handle.status().actual, Size(100 * PAGE));
    driver.mmio.write(0x105, &[1]);
    assert_eq!(handle.status().actual, Size(0x164 * PAGE));
    // More than there is, and fields that are the device's.
    driver.write(0x104, u32::MAX);
    assert_eq!(handle.status().actual, MEMORY);
    driver.write(0x100, 7);
    driver.mmio.write(0x108, &[7; 8]);
    assert_eq!((driver.read(0x100), driver.read(0x108)), (256, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes in the four queues, the device lives, and a reset makes it new.
    #[test]
    fn random_requests_do_no_harm(
        requests in prop::collection::vec((0usize..4, prop::collection::vec(any::<u8>(), 0..600), any::<bool>()), 1..30)
    ) {
        let (mut driver, handle) = start(ALL, u64::MAX);
        for (queue, bytes, writable) in requests {
            let buffer = driver.filled(&bytes);
            let (out, into) = if writable { (vec![], vec![buffer]) } else { (vec![buffer], vec![]) };
            driver.offer(queue, &out, &into);
        }
        driver.write(0x70, 0);
        prop_assert!(!handle.status().active);
        driver.negotiate(u64::MAX);
        driver.restart_queues(&[16; 4]);
        driver.write(0x70, 15);
        let buffer = driver.filled(&numbers(&[u32::MAX]));
        driver.offer(0, &[buffer], &[]);
        prop_assert_eq!(driver.wait_used(0), (0, 0));
    }
}
