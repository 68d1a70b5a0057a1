//! A paused VM's memory is nobody's: each kind of device, with requests under way and new ones.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{DiskConfig, Size};
use crate::devices::legacy::ConsoleOutput;
use crate::metrics::Registry;

use super::balloon::Balloon;
use super::block::Block;
use super::console::{Console, ConsoleCounters};
use super::rng::Rng;
use super::testing::{Driver, Rig};
use super::{VirtioDevice, WorkerControl, net, share, vsock};

/// Long enough for a device that works to do something, far more than once.
const WHILE: Duration = Duration::from_millis(50);

/// All guest memory that the driver has given to anyone, rings and buffers.
fn memory(driver: &Driver) -> Vec<u8> {
    let mut bytes = vec![0; 16 << 20];
    driver.memory.guest().read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
    bytes
}

fn workers(driver: &Driver) -> Vec<WorkerControl> {
    driver.mmio.workers()
}

fn pause(driver: &Driver) {
    let workers = workers(driver);
    assert!(!workers.is_empty(), "who serves it?");
    workers.iter().for_each(WorkerControl::ask_to_pause);
    let deadline = Instant::now() + Duration::from_secs(10);
    assert!(workers.iter().all(|w| w.is_paused_by(deadline)));
}

/// `offer` makes something available, again and again: in the middle of what comes of it the device is paused, and does
/// nothing. Then it goes on, and everything is given back.
fn check(device: Box<dyn VirtioDevice>, sizes: &[u16], queue: usize, offer: &mut dyn FnMut(&mut Driver)) {
    let mut driver = Driver::start(device, sizes);
    let mut missing = 0;
    for _ in 0..20 {
        driver.free_buffers();
        for _ in 0..2 {
            offer(&mut driver);
            missing += 1;
        }
        driver.notify(queue);
        pause(&driver);
        // The guest is parked, but who is unkind has left notifications behind.
        offer(&mut driver);
        missing += 1;
        let before = memory(&driver);
        driver.notify(queue);
        let begin = Instant::now();
        while begin.elapsed() < WHILE {
            std::thread::yield_now();
        }
        assert!(memory(&driver) == before, "a paused device has written guest memory");
        workers(&driver).iter().for_each(WorkerControl::resume);
        while missing > 0 {
            driver.wait_used(queue);
            missing -= 1;
        }
    }
}

#[test]
fn rng() {
    check(Box::new(Rng::default()), &[16], 0, &mut |driver| {
        let buffer = driver.buffer(4096);
        driver.post(0, &[], &[buffer]);
    });
}

#[test]
fn block() {
    for engine in ["uring", "threads"] {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&vec![7; 4 << 20]).unwrap();
        let options = format!("{},engine={engine}", file.path().display());
        let config = DiskConfig::parse(options.as_ref()).unwrap();
        let Ok(block) = Block::open(&config, 0, 1, &Registry::default()) else { continue };
        check(Box::new(block), &[256], 0, &mut |driver| {
            let (header, data, status) = (driver.filled(&[0; 16]), driver.buffer(2 << 20), driver.buffer(1));
            driver.post(0, &[header], &[data, status]);
        });
    }
}

/// What a disk's threads, or the kernel, still do when its own thread has nothing more to do.
#[test]
fn reads_under_way_are_waited_for() {
    const LEN: usize = 4 << 20;
    // As much as a disk has under way.
    const REQUESTS: u64 = 16;
    for engine in ["uring", "threads"] {
        let mut file = NamedTempFile::new().unwrap();
        (0..8).for_each(|i| file.write_all(&vec![i; LEN]).unwrap());
        let options = format!("{},engine={engine}", file.path().display());
        let config = DiskConfig::parse(options.as_ref()).unwrap();
        let Ok(block) = Block::open(&config, 0, 1, &Registry::default()) else { continue };
        let mut driver = Driver::start(Box::new(block), &[256]);
        let (data, status) = (driver.buffer(LEN as u32), driver.buffer(1));
        // All into one buffer, each something else: it changes for as long as anybody reads.
        for i in 0..REQUESTS {
            let sector = (i % 8) * (LEN as u64 / 512);
            let header = driver.filled(&[&[0; 8][..], &sector.to_le_bytes()].concat());
            driver.post(0, &[header], &[data, status]);
        }
        driver.notify(0);
        driver.wait("it does not begin", |d| (d.bytes((data.0, 1))[0] != 0xaa).then_some(()));
        pause(&driver);
        // It takes all that is there at a time, so all was under way.
        let ended = (0..REQUESTS).take_while(|_| driver.try_used(0).is_some()).count() as u64;
        assert_eq!(ended, REQUESTS, "{engine}: some are still under way");
        let before = memory(&driver);
        let begin = Instant::now();
        while begin.elapsed() < WHILE {
            std::thread::yield_now();
        }
        assert!(memory(&driver) == before, "{engine}: a paused disk has written guest memory");
    }
}

#[test]
fn console() {
    for queue in [0, 1] {
        let output = Arc::new(ConsoleOutput::default());
        let drained = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let console = Console::new(output.clone(), drained, ConsoleCounters::default()).unwrap();
        let port = console.port();
        check(Box::new(console), &[16, 16], queue, &mut |driver| {
            let buffer = driver.buffer(64);
            if queue == 0 {
                driver.post(0, &[], &[buffer]);
                // A byte for each buffer, though not always one buffer for each byte.
                assert_eq!(port.send(&[b'k'; 64]), 64);
            } else {
                driver.post(1, &[buffer], &[]);
            }
        });
    }
}

#[test]
fn balloon() {
    let config = "0,free-page-reporting,stats=1".parse().unwrap();
    for queue in [0, 1, 3] {
        let balloon = Balloon::new(&config, Size::mib(64));
        check(Box::new(balloon), &[128; 4], queue, &mut |driver| {
            // Pages far behind the buffers, which are filled so that giving them back shows.
            let page = GuestAddress(0xc0_0000);
            driver.memory.guest().write_slice(&[7; 4096], page).unwrap();
            if queue == 3 {
                driver.post(3, &[], &[(page.0, 4096)]);
            } else {
                let pages = driver.filled(&0xc00u32.to_le_bytes());
                driver.post(queue, &[pages], &[]);
            }
        });
    }
}

/// As [`check`], for devices to which things come from outside, too.
fn check_rig(mut rig: Rig) {
    let notify = |driver: &mut Driver, queues: &[usize]| queues.iter().for_each(|q| driver.notify(*q));
    for _ in 0..20 {
        (0..3).for_each(|_| (rig.offer)(&mut rig.driver));
        notify(&mut rig.driver, &rig.queues);
        (rig.stir)();
        pause(&rig.driver);
        (rig.offer)(&mut rig.driver);
        let before = memory(&rig.driver);
        notify(&mut rig.driver, &rig.queues);
        (rig.stir)();
        let begin = Instant::now();
        while begin.elapsed() < WHILE {
            std::thread::yield_now();
        }
        assert!(memory(&rig.driver) == before, "a paused device has written guest memory");
        workers(&rig.driver).iter().for_each(WorkerControl::resume);
        rig.driver.wait("it does not go on", |d| (memory(d) != before).then_some(()));
        rig.start_again();
    }
}

#[test]
fn net() {
    check_rig(net::tests::rig());
}

#[test]
fn vsock() {
    check_rig(vsock::tests::rig());
}

#[test]
fn share() {
    check_rig(share::tests::rig_of_any_kind());
}
