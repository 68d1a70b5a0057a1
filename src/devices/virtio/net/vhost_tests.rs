//! A card that the kernel serves, with a driver on one side and the host's own network on the other. Each test has a
//! network of its own, and needs root, taps and vhost-net: `scripts/test` runs them in the emulated host.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::Mac;

use super::super::super::testing::Driver;
use super::super::backend::HEADER;
use super::*;

const SIZES: [u16; 2] = [16, 16];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn run(words: &str) {
    let mut words = words.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success());
}

/// Runs `test` with a driver that has started.
fn with_driver(test: impl FnOnce(Driver) + Send) {
    let enter = || {
        // SAFETY: takes flags alone. The network is this thread's, and its threads' and programs'.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
        run("ip tuntap add mode tap tap0");
        run("ip addr add 172.30.9.1/24 dev tap0");
        run("ip link set tap0 up");
        let taps = Tap::open("tap0", 1).unwrap();
        let kernels = Kernels::open(taps.len()).unwrap();
        let parts = VhostParts { id: "net0".into(), mac: Mac(MAC), taps, kernels, name: "tap=tap0".into() };
        test(Driver::start(Box::new(VhostNet::new(parts).unwrap()), &SIZES));
    };
    thread::scope(|scope| scope.spawn(enter).join()).unwrap();
}

/// Who has the host's address?
fn question() -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &MAC, &[8, 6]].concat();
    let kind = [0, 1, 8, 0, 6, 4, 0, 1];
    [&[0; HEADER][..], &ethernet, &kind, &MAC, &[172, 30, 9, 2], &[0; 6], &[172, 30, 9, 1]].concat()
}

/// The host's network answers, and the driver is interrupted.
#[track_caller]
fn assert_works(driver: &mut Driver) {
    let _ = driver.line.read();
    let out = driver.filled(&question());
    driver.offer(1, &[out], &[]);
    assert_eq!(driver.wait_used(1).1, 0);
    wait_for_answer(driver);
    assert_ne!(driver.line.read().unwrap(), 0);
    assert_eq!(driver.read(0x60) & 1, 1);
    driver.write(0x64, 1);
}

/// Among what a host sends by itself.
#[track_caller]
fn wait_for_answer(driver: &mut Driver) {
    loop {
        let room = driver.buffer(2000);
        driver.offer(0, &[], &[room]);
        let len = driver.wait_used(0).1 as usize;
        let frame = &driver.bytes(room)[HEADER..len];
        if frame[..6] == MAC && frame[12..14] == [8, 6] {
            return assert_eq!(frame[20..22], [0, 2]);
        }
    }
}

#[test]
#[ignore = "needs vhost-net and taps"]
fn one_driver_after_the_other_is_served() {
    with_driver(|mut driver| {
        for _ in 0..3 {
            assert_works(&mut driver);
            driver.restart(&SIZES);
        }
        assert_works(&mut driver);
    });
}

#[test]
#[ignore = "needs vhost-net and taps"]
fn nothing_is_served_in_a_pause_and_nothing_lost() {
    with_driver(|mut driver| {
        assert_works(&mut driver);
        for _ in 0..20 {
            let [control] = &driver.mmio.workers()[..] else { panic!("one thread") };
            control.ask_to_pause();
            assert!(control.is_paused_by(Instant::now() + Duration::from_secs(10)));
            let out = driver.filled(&question());
            driver.offer(1, &[out], &[]);
            for _ in 0..1000 {
                thread::yield_now();
            }
            assert_eq!(driver.try_used(1), None, "served in a pause");
            control.resume();
            assert_eq!(driver.wait_used(1).1, 0);
            wait_for_answer(&mut driver);
            driver.free_buffers();
        }
    });
}

/// vhost itself says nothing of it. Other interfaces may come and go.
#[test]
#[ignore = "needs vhost-net and taps"]
fn a_tap_that_is_removed_takes_the_link_down() {
    let link = |driver: &mut Driver| driver.read(0x104) >> 16;
    with_driver(|mut driver| {
        run("ip tuntap add mode tap tap1");
        run("ip link del tap1");
        assert_works(&mut driver);
        assert_eq!(link(&mut driver), 1);
        let [control] = &driver.mmio.workers()[..] else { panic!("one thread") };
        control.ask_to_pause();
        assert!(control.is_paused_by(Instant::now() + Duration::from_secs(10)));
        run("ip link del tap0");
        for _ in 0..1000 {
            thread::yield_now();
        }
        assert_eq!(link(&mut driver), 1, "told in a pause");
        control.resume();
        driver.wait("the link stays up", |d| (link(d) == 0).then_some(()));
        driver.wait("no configuration interrupt", |d| (d.read(0x60) & 2 == 2).then_some(()));
        // The next driver finds no link either.
        driver.restart(&SIZES);
        assert_eq!(link(&mut driver), 0);
    });
}

/// What the kernel finds wrong with a ring is the device's word to its driver; a reset makes all well.
#[test]
#[ignore = "needs vhost-net and taps"]
fn a_driver_that_breaks_the_rules_finds_a_need_of_a_reset() {
    type Attack = fn(&mut Driver);
    let attacks: [Attack; 6] = [
        |driver| driver.jump(1, 17),
        |driver| driver.make_available(1, 16),
        |driver| {
            driver.descriptor(1, 0, (1 << 40, 64), 0, 0);
            driver.make_available(1, 0);
        },
        |driver| {
            driver.descriptor(1, 0, (u64::MAX - 8, 64), 0, 0);
            driver.make_available(1, 0);
        },
        |driver| {
            let room = driver.buffer(64);
            driver.descriptor(1, 0, room, 1, 0);
            driver.make_available(1, 0);
        },
        |driver| {
            let room = driver.buffer(64);
            driver.post(1, &[], &[room]);
        },
    ];
    with_driver(|mut driver| {
        for attack in attacks {
            attack(&mut driver);
            driver.notify(1);
            driver.wait_needs_reset();
            driver.restart(&SIZES);
            assert_works(&mut driver);
            driver.restart(&SIZES);
        }
    });
}
