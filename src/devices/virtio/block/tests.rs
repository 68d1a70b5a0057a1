//! Requests of a driver that keeps the rules, and of one that does not.

mod pieces;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::BusDevice;
use crate::metrics::Counter;

use super::super::testing::{self, Buffer, Driver};
use super::super::{Interrupt, Queue, QueueSetup};
use super::*;

const SECTORS: u64 = 64;
const NONE: u8 = 0xaa;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A disk and its driver.
struct Rig {
    file: NamedTempFile,
    driver: Driver,
    counters: BlockCounters,
}

fn image(len: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i / SECTOR) as u8).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn config(file: &NamedTempFile, options: &str) -> DiskConfig {
    let mut text = file.path().as_os_str().to_owned();
    text.push(options);
    DiskConfig::parse(&text).unwrap()
}

fn rig_with(options: &str, features: u64) -> Rig {
    let file = image(SECTORS * SECTOR);
    let block = Block::open(&config(&file, options), 0, 1, &Registry::default()).unwrap();
    let counters = block.counters();
    Rig { file, driver: Driver::start_with(Box::new(block), &[QUEUE_SIZE], features), counters }
}

fn rig(options: &str) -> Rig {
    rig_with(options, u64::MAX)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Rig {
    /// Does a request: its status, what the used ring says was written, and the buffer for data.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        let d = &mut self.driver;
        let (head, status) = (d.filled(&header(kind, sector)), d.buffer(1));
        let (data, room) = (d.filled(data), d.buffer(room));
        let readable: Vec<Buffer> = [head, data].into_iter().filter(|b| b.1 > 0).collect();
        let writable: Vec<Buffer> = [room, status].into_iter().filter(|b| b.1 > 0).collect();
        d.offer(0, &readable, &writable);
        let (_, written) = d.wait_used(0);
        (d.bytes(status)[0], written, d.bytes(room))
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> u8 {
        self.ask(kind, sector, data, room).0
    }

    fn on_host(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        File::open(self.file.path()).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn count(&self, counter: impl Fn(&BlockCounters) -> &Counter) -> u64 {
        counter(&self.counters).get()
    }
}

/// For tests of all kinds of devices: with two queues, and `None` where the host refuses the engine.
pub fn rig_of_any_kind(engine: &'static str) -> Option<testing::Rig> {
    let file = image(SECTORS * SECTOR);
    let block = Block::open(&config(&file, &format!(",engine={engine}")), 0, 2, &Registry::default()).ok()?;
    Some(testing::Rig {
        name: engine,
        driver: Driver::start(Box::new(block), &[16, 16]),
        sizes: vec![16, 16],
        queues: vec![0, 1],
        stir: Box::new(|| {}),
        offer: Box::new(|driver| {
            for queue in 0..2 {
                let (head, room) = (driver.filled(&header(0, 0)), driver.buffer(32 * 512 + 1));
                driver.post(queue, &[head], &[room]);
            }
        }),
        works: Box::new(move |driver| {
            assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
            for queue in 0..2 {
                let (head, room) = (driver.filled(&header(0, 3)), driver.buffer(513));
                driver.offer(queue, &[head], &[room]);
                assert_eq!(driver.wait_used(queue), (0, 513));
                assert_eq!(driver.bytes(room), [&[3; 512][..], &[OK]].concat());
            }
        }),
    })
}

const ENGINES: [&str; 3] = [",engine=uring", ",engine=threads", ",engine=threads,direct"];

/// The engines that this host has.
fn rigs() -> Vec<Rig> {
    let file = image(512);
    let works = |options: &&&str| Block::open(&config(&file, options), 0, 1, &Registry::default()).is_ok();
    ENGINES.iter().filter(works).map(|options| rig(options)).collect()
}

#[test]
fn what_is_written_is_read() {
    for mut rig in rigs() {
        assert_eq!(rig.ask(0, 3, &[], 1024), (OK, 1025, [[3; 512], [4; 512]].concat()));
        assert_eq!(rig.ask(1, 3, &[0x55; 1024], 0), (OK, 1, vec![]));
        assert_eq!(rig.on_host()[3 * 512..6 * 512], [[0x55; 512], [0x55; 512], [5; 512]].concat());
        assert_eq!(rig.ask(0, 4, &[], 1024).2, [[0x55; 512], [5; 512]].concat());
        assert_eq!((rig.count(|c| &c.reads), rig.count(|c| &c.read_bytes)), (2, 2048));
        assert_eq!((rig.count(|c| &c.writes), rig.count(|c| &c.written_bytes)), (1, 1024));
        assert_eq!(rig.count(|c| &c.errors), 0);
    }
}

#[test]
fn a_request_in_odd_pieces_is_one() {
    for mut rig in rigs() {
        let d = &mut rig.driver;
        let bytes = header(1, 7);
        let (a, b) = (d.filled(&bytes[..5]), d.filled(&[&bytes[5..], &[1; 100]].concat()));
        let (c, status) = (d.filled(&[2; 412]), d.buffer(1));
        d.offer(0, &[a, b, c], &[status]);
        d.wait_used(0);
        assert_eq!(d.bytes(status), [OK]);
        // The status is the last byte, with data in one buffer, too.
        let (head, room) = (d.filled(&header(0, 7)), d.buffer(513));
        d.offer(0, &[head], &[room]);
        assert_eq!(d.wait_used(0).1, 513);
        assert_eq!(d.bytes(room), [&[1; 100][..], &[2; 412], &[OK]].concat());
    }
}

#[test]
fn nothing_lies_behind_the_end() {
    for mut rig in rigs() {
        let before = rig.on_host();
        let sectors = [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55, 1 << 63];
        for sector in sectors {
            assert_eq!(rig.ask(0, sector, &[], 1024).0, IO_ERROR, "{sector}");
            assert_eq!(rig.ask(1, sector, &[7; 1024], 0), (IO_ERROR, 1, vec![]), "{sector}");
            for kind in [11, 13] {
                assert_ne!(rig.status(kind, 0, &range(sector, 2, 0), 0), OK, "{sector}");
            }
        }
        // The sum of its buffers counts, not each of them.
        let d = &mut rig.driver;
        let (head, status) = (d.filled(&header(1, SECTORS - 2)), d.buffer(1));
        let pieces: Vec<_> = std::iter::once(head).chain((0..3).map(|_| d.filled(&[9; 512]))).collect();
        d.offer(0, &pieces, &[status]);
        d.wait_used(0);
        assert_eq!(d.bytes(status), [IO_ERROR]);
        assert_eq!(rig.on_host(), before);
        assert_eq!(rig.status(1, SECTORS - 2, &[7; 1024], 0), OK);
        assert_eq!(rig.on_host().len(), before.len());
    }
}

/// The guest changes a header while it is read: what was checked is what is done, so the file keeps its length and all
/// but the sector that a good header names.
#[test]
fn a_header_that_changes_meanwhile_is_good_or_bad() {
    for mut rig in rigs() {
        let before = rig.on_host();
        let d = &mut rig.driver;
        let (head, data, status) = (d.filled(&header(1, 0)), d.filled(&[0x55; 1024]), d.buffer(1));
        let (memory, over) = (d.memory.clone(), std::sync::atomic::AtomicBool::new(false));
        let mut seen = [0; 2];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Good; over the end; behind the end, where the product with a sector's length would wrap to 0.
                for sector in [0u64, SECTORS - 1, 1 << 55].into_iter().cycle() {
                    memory.guest().write_obj(sector, GuestAddress(head.0 + 8)).unwrap();
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            for _ in 0..2000 {
                d.offer(0, &[head, data], &[status]);
                d.wait_used(0);
                seen[usize::from(d.bytes(status)[0])] += 1;
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(seen.iter().all(|count| *count > 0), "good and bad ones: {seen:?}");
        let after = rig.on_host();
        assert!(after.len() == before.len() && after[1024..] == before[1024..]);
    }
}

#[test]
fn parts_of_sectors_are_refused() {
    let mut rig = rig("");
    for len in [1, 511, 513] {
        assert_eq!(rig.status(0, 0, &[], len), IO_ERROR);
        assert_eq!(rig.status(1, 0, &vec![0; len as usize], 0), IO_ERROR);
    }
    assert_eq!(rig.status(0, 0, &[], 0), OK);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    // Whether the driver accepted the feature or not.
    for features in [u64::MAX, !F_RO] {
        let mut rig = rig_with(",readonly", features);
        let before = rig.on_host();
        assert_eq!(rig.status(1, 0, &[7; 512], 0), IO_ERROR);
        for kind in [11, 13] {
            assert_ne!(rig.status(kind, 0, &range(0, 2, 0), 0), OK);
        }
        assert_eq!(rig.status(4, 0, &[], 0), OK);
        assert_eq!(rig.status(0, 0, &[], 512), OK);
        assert_eq!(rig.on_host(), before);
    }
}

#[test]
fn a_flush_belongs_to_its_feature() {
    for mut rig in rigs() {
        assert_eq!(rig.ask(4, 0, &[], 0), (OK, 1, vec![]));
        assert_eq!(rig.count(|c| &c.flushes), 1);
    }
    let mut rig = rig_with("", !F_FLUSH);
    assert_eq!(rig.status(4, 0, &[], 0), UNSUPPORTED);
}

#[test]
fn write_through_is_the_drivers_choice() {
    let file = image(4096);
    let block = Block::open(&config(&file, ""), 0, 1, &Registry::default()).unwrap();
    let shared = block.shared.clone();
    let writeback = || shared.writeback.load(Ordering::Relaxed);
    let mut driver = Driver::start_with(Box::new(block), &[16], !(F_FLUSH | F_CONFIG_WCE));
    assert!(!writeback());
    driver.negotiate(u64::MAX);
    assert!(writeback());
    driver.mmio.write(0x100 + CONFIG_WRITEBACK, &[0]);
    assert!(!writeback());
    driver.write(0x70, 0);
    assert!(writeback());
}

#[test]
fn a_write_through_write_arrives() {
    for options in ENGINES {
        let mut rig = rig_with(options, !(F_FLUSH | F_CONFIG_WCE));
        assert_eq!(rig.status(1, 1, &[7; 512], 0), OK);
        assert_eq!(rig.status(13, 0, &range(2, 1, 0), 0), OK);
        assert_eq!(rig.on_host()[512..1536], [[7; 512], [0; 512]].concat());
    }
}

#[test]
fn the_name_has_20_bytes() {
    let mut rig = rig(",id=data");
    let (status, written, name) = rig.ask(8, 0, &[], 20);
    assert_eq!((status, written), (OK, 21));
    assert_eq!(name, *b"data\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.status(8, 0, &[], 19), IO_ERROR);
    let (_, _, name) = rig.ask(8, 0, &[], 30);
    assert_eq!(name[20..], [NONE; 10]);
}

#[test]
fn ranges_become_zeros() {
    for mut rig in rigs() {
        for (kind, flags) in [(13, 0), (13, 1), (11, 0)] {
            rig.status(1, 8, &[7; 8192], 0);
            let status = rig.status(kind, 0, &range(9, 14, flags), 0);
            assert_eq!(status, OK, "{kind} {flags}");
            let host = rig.on_host();
            assert!(host[9 * 512..23 * 512].iter().all(|b| *b == 0), "{kind} {flags}");
            assert_eq!((host[9 * 512 - 1], host[23 * 512], host.len()), (7, 7, 64 * 512));
        }
    }
}

#[test]
fn a_discard_frees_the_hosts_blocks() {
    let file = image(1 << 20);
    let block = Block::open(&config(&file, ""), 0, 1, &Registry::default()).unwrap();
    let counters = block.counters();
    let driver = Driver::start(Box::new(block), &[16]);
    let before = file.as_file().metadata().unwrap().blocks();
    let mut rig = Rig { file, driver, counters };
    if rig.status(11, 0, &range(0, 2048, 0), 0) == OK {
        assert!(rig.file.as_file().metadata().unwrap().blocks() < before);
    }
}

#[test]
fn bad_ranges_are_refused() {
    let mut rig = rig("");
    for kind in [11, 13] {
        assert_eq!(rig.status(kind, 0, &range(0, 0, 0), 0), IO_ERROR, "no sector");
        assert_eq!(rig.status(kind, 0, &range(0, 1, 2), 0), UNSUPPORTED, "an unknown flag");
        assert_eq!(rig.status(kind, 0, &range(0, u32::MAX, 0), 0), IO_ERROR, "too long");
        assert_eq!(rig.status(kind, 0, &[range(0, 1, 0), range(2, 1, 0)].concat(), 0), IO_ERROR, "two");
        assert_eq!(rig.status(kind, 0, &range(0, 1, 0)[..15], 0), IO_ERROR, "short");
        assert_eq!(rig.status(kind, 0, &[], 0), IO_ERROR, "none");
    }
    assert_eq!(rig.status(11, 0, &range(0, 1, 1), 0), UNSUPPORTED, "unmap on discard");
    let mut rig = rig_with("", !(F_DISCARD | F_WRITE_ZEROES));
    for kind in [11, 13] {
        assert_eq!(rig.status(kind, 0, &range(0, 1, 0), 0), UNSUPPORTED);
    }
}

#[test]
fn unknown_types_are_said_to_be_unknown() {
    let mut rig = rig("");
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.ask(kind, 0, &[], 512), (UNSUPPORTED, 1, vec![NONE; 512]), "{kind}");
    }
    assert_eq!(rig.count(|c| &c.errors), 12);
}

#[test]
fn a_chain_without_header_or_status_is_the_end() {
    for mut rig in [rig(""), rig("")] {
        let head = rig.driver.filled(&header(0, 0));
        rig.driver.offer(0, &[head], &[]);
        rig.driver.wait_needs_reset();
    }
    let mut rig = rig("");
    let (head, status) = (rig.driver.filled(&header(0, 0)[..15]), rig.driver.buffer(1));
    rig.driver.offer(0, &[head], &[status]);
    rig.driver.wait_needs_reset();
    // And a reset mends it.
    rig.driver.negotiate(u64::MAX);
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    for mut rig in rigs() {
        rig.file.as_file().set_len(512).unwrap();
        assert_eq!(rig.status(0, 8, &[], 512), IO_ERROR);
        assert_eq!(rig.ask(0, 0, &[], 512), (OK, 513, vec![0; 512]));
    }
}

#[test]
fn a_deep_queue_is_served() {
    for mut rig in rigs() {
        let mut reads = Vec::new();
        for sector in 0..60 {
            let d = &mut rig.driver;
            let (head, room) = (d.filled(&header(0, sector)), d.buffer(513));
            d.post(0, &[head], &[room]);
            reads.push(room);
        }
        rig.driver.notify(0);
        for _ in 0..60 {
            assert_eq!(rig.driver.wait_used(0).1, 513);
        }
        for (sector, room) in reads.into_iter().enumerate() {
            assert_eq!(rig.driver.bytes(room), [&[sector as u8; 512][..], &[OK]].concat());
        }
    }
}

#[test]
fn after_a_reset_nothing_completes() {
    for mut rig in (0..10).flat_map(|_| rigs()) {
        let d = &mut rig.driver;
        let (head, room) = (d.filled(&header(0, 0)), d.buffer(32 * 512 + 1));
        for _ in 0..100 {
            d.post(0, &[head], &[room]);
        }
        d.notify(0);
        // The reset comes while the device is at work.
        d.write(0x70, 0);
        let after = vec![0x77; room.1 as usize];
        d.memory.guest().write_slice(&after, GuestAddress(room.0)).unwrap();
        let used = (0..).take_while(|_| d.try_used(0).is_some()).count();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(d.bytes(room), after);
        assert_eq!(d.try_used(0), None, "{used} had ended");
    }
}

#[test]
fn a_reset_does_not_wait_for_a_queue_full_of_long_requests() {
    const LEN: u32 = 32 << 20;
    for options in [",engine=uring", ",engine=threads"] {
        let file = image(512);
        file.as_file().set_len(LEN.into()).unwrap();
        let Ok(block) = Block::open(&config(&file, options), 0, 1, &Registry::default()) else { continue };
        let mut driver = Driver::start(Box::new(block), &[QUEUE_SIZE]);
        // 254 headers and the same two buffers behind each: 8 GiB in all.
        let (head, status) = (driver.filled(&header(0, 0)), driver.buffer(1));
        for i in 0..254 {
            driver.descriptor(0, i, head, 1, 254);
            driver.make_available(0, i);
        }
        driver.descriptor(0, 254, (0x100_0000, LEN), 3, 255);
        driver.descriptor(0, 255, status, 2, 0);
        let begin = Instant::now();
        driver.notify(0);
        driver.wait_used(0);
        driver.write(0x70, 0);
        assert!(begin.elapsed() < Duration::from_millis(700), "{options}: {:?}", begin.elapsed());
        // Nor is one forgotten for which there was no room at first.
        driver.restart(&[QUEUE_SIZE]);
        for i in 0..4 {
            driver.descriptor(0, i, head, 1, 254);
            driver.make_available(0, i);
        }
        driver.descriptor(0, 254, (0x100_0000, LEN), 3, 255);
        driver.descriptor(0, 255, status, 2, 0);
        driver.notify(0);
        for _ in 0..4 {
            assert_eq!(driver.wait_used(0).1, LEN + 1);
        }
    }
}

#[test]
fn it_starts_again_after_a_reset() {
    for mut rig in rigs() {
        for _ in 0..3 {
            rig.driver.restart(&[QUEUE_SIZE]);
            assert_eq!(rig.ask(0, 3, &[], 512), (OK, 513, vec![3; 512]));
        }
    }
}

#[test]
fn limits_hold() {
    let mut rig = rig(",iops=20");
    let begin = Instant::now();
    for _ in 0..10 {
        assert_eq!(rig.status(0, 0, &[], 512), OK);
    }
    // Two at once, then one each 50 ms.
    assert!(begin.elapsed() >= Duration::from_millis(399), "{:?}", begin.elapsed());
    assert!(rig.count(|c| &c.throttled) > 0);
    let mut rig = rig_with(",bandwidth=100K", u64::MAX);
    let begin = Instant::now();
    for _ in 0..2 {
        assert_eq!(rig.status(0, 0, &[], 20480), OK);
    }
    assert!(begin.elapsed() >= Duration::from_millis(99));
}

/// What a queue had goes with a thread that panicked, and a confined process cannot make all of it anew.
#[test]
fn a_queue_whose_ring_is_lost_asks_for_a_reset() {
    for (engine, status) in [(",engine=uring", 15 | 64), (",engine=threads", 15)] {
        let file = image(512);
        let Ok(mut block) = Block::open(&config(&file, engine), 0, 1, &Registry::default()) else { continue };
        block.parts[0] = None;
        let mut driver = Driver::new(Box::new(block));
        driver.negotiate(u64::MAX);
        driver.set_up_queue(0, 16);
        driver.write(0x70, 15);
        assert_eq!(driver.read(0x70), status, "{engine}");
    }
}

/// Of two queues the second one's thread does not start, since an event loop waits for no file.
#[test]
fn a_thread_that_cannot_start_leaves_what_it_was_given() {
    for engine in ENGINES {
        let file = image(SECTORS * SECTOR);
        let Ok(mut block) = Block::open(&config(&file, engine), 0, 2, &Registry::default()) else { continue };
        let memory = Memory::new(&"1M".parse().unwrap()).unwrap();
        let queue = |(index, notify)| {
            let base = 0x10000 * (1 + u64::from(index));
            let (available, used) = (base + 0x8000, base + 0xc000);
            let setup = QueueSetup { size: 16, ready: true, descriptors: base, available, used };
            let queue = Queue::new(memory.guest(), setup, QUEUE_SIZE, 0).unwrap();
            ActiveQueue { index, queue, notify: Arc::new(notify) }
        };
        // SAFETY: the descriptor was just made, and is nobody else's.
        let unwaitable = unsafe { EventFd::from_raw_fd(file.reopen().unwrap().into_raw_fd()) };
        let queues = [(0, new_event().unwrap()), (1, unwaitable)].map(queue).into();
        let interrupt = Arc::new(Interrupt::new(new_event().unwrap()));
        let confined = Confined::not();
        assert!(
            block
                .activate(Activation { memory: memory.clone(), features: 0, interrupt, queues, confined })
                .is_err()
        );
        let is_whole = |p: &Option<QueueParts>| p.as_ref().is_some_and(|p| p.ring.is_some() == block.uring);
        assert!(block.parts.iter().all(is_whole), "{engine}");
        let mut driver = Driver::start(Box::new(block), &[16, 16]);
        for queue in 0..2 {
            let (head, room) = (driver.filled(&header(0, 3)), driver.buffer(513));
            driver.offer(queue, &[head], &[room]);
            assert_eq!(driver.wait_used(queue), (0, 513), "{engine}");
        }
    }
}

#[test]
fn limits_change_while_a_request_waits() {
    let file = image(SECTORS * SECTOR);
    // The second request would have its turn after a day.
    let registry = Registry::default();
    let block = Block::open(&config(&file, ",bandwidth=1,id=slow"), 0, 1, &registry).unwrap();
    let (counters, mut control) = (block.counters(), block.control());
    let mut rig = Rig { file, driver: Driver::start(Box::new(block), &[QUEUE_SIZE]), counters };
    let change = |control: &mut Box<dyn DeviceControl>, text: &str| {
        control.change(serde_json::from_str(text).unwrap()).map_err(|e| e.to_string())
    };
    assert_eq!(rig.status(0, 0, &[], 32 << 10), OK);
    let d = &mut rig.driver;
    let (head, room, status) = (d.filled(&header(0, 0)), d.buffer(512), d.buffer(1));
    d.offer(0, &[head], &[room, status]);
    rig.driver.wait("it was not throttled", |_| (rig.counters.throttled.get() > 0).then_some(()));
    assert_eq!(rig.driver.try_used(0), None);
    change(&mut control, r#"{"bandwidth": "1G", "iops": 5000}"#).unwrap();
    rig.driver.wait_used(0);
    let sizes = serde_json::json!({ "size": "32K", "readonly": false, "iops": 5000, "bandwidth": "1G" });
    assert_eq!((control.id(), control.describe()), ("slow", sizes));
    for wrong in
        [r#"{"iops": 0}"#, r#"{"bandwidth": 0}"#, r#"{"iops": -1}"#, r#"{"iops": "x"}"#, r#"{"path": ""}"#]
    {
        assert!(change(&mut control, wrong).is_err(), "{wrong}");
    }
    assert!(change(&mut control, r#"{"iops": 0}"#).unwrap_err().contains("iops=0"));
    change(&mut control, r#"{"bandwidth": null}"#).unwrap();
    assert_eq!((&control.describe()["iops"], &control.describe()["bandwidth"]), (&5000.into(), &().into()));
    let reads = registry.snapshot().value("microvm_disk_reads_total", &[("device", "slow")]);
    assert_eq!(reads, Some(2));
}

#[test]
fn zeros_are_bytes_to_a_limit() {
    // Where the file system has no better way they are written, and without this a guest would write as fast as it likes.
    for flags in [0, 1] {
        let mut rig = rig_with(",bandwidth=20K", u64::MAX);
        assert_eq!(rig.status(13, 0, &range(0, 16, flags), 0), OK);
        let begin = Instant::now();
        assert_eq!(rig.status(0, 0, &[], 512), OK);
        // 8 KiB were taken, of which 2 KiB were there.
        assert!(begin.elapsed() >= Duration::from_millis(250), "{:?}", begin.elapsed());
    }
}

#[test]
fn a_throttled_disk_is_reset_at_once() {
    let mut rig = rig(",iops=1");
    rig.status(0, 0, &[], 512);
    let (head, room) = (rig.driver.filled(&header(0, 0)), rig.driver.buffer(513));
    rig.driver.offer(0, &[head], &[room]);
    std::thread::sleep(Duration::from_millis(20));
    let begin = Instant::now();
    rig.driver.write(0x70, 0);
    assert!(begin.elapsed() < Duration::from_millis(500));
    assert_eq!(rig.driver.bytes(room), [NONE; 513]);
}

#[test]
fn the_configuration_space() {
    let file = image(10 * 512);
    let block = Block::open(&config(&file, ""), 0, 4, &Registry::default()).unwrap();
    assert_eq!(block.queue_sizes(), [QUEUE_SIZE; 4]);
    assert_ne!(block.features() & F_MQ, 0);
    let space = block.config_space();
    assert_eq!(space[..8], 10u64.to_le_bytes());
    assert_eq!((space[12], space[20..24].to_vec()), (254, vec![0, 2, 0, 0]));
    assert_eq!((space[32], space[34]), (1, 4));
    let mut past = [0; 8];
    block.read_config(56, &mut past);
    assert_eq!(past, [1, 0, 0, 0, 0, 0, 0, 0]);
    drop(block);
    let many = Block::open(&config(&file, ""), 0, 32, &Registry::default()).unwrap();
    assert_eq!(many.queue_sizes().len(), 8);
}

#[test]
fn every_queue_works() {
    for options in ENGINES {
        let file = image(4096);
        let block = Block::open(&config(&file, options), 0, 4, &Registry::default()).unwrap();
        let mut driver = Driver::start(Box::new(block), &[16; 4]);
        for queue in 0..4 {
            let (head, room) = (driver.filled(&header(0, queue)), driver.buffer(513));
            driver.offer(queue as usize, &[head], &[room]);
            driver.wait_used(queue as usize);
            assert_eq!(driver.bytes(room)[0], queue as u8);
        }
    }
}

#[test]
fn one_image_has_one_writer() {
    let file = image(4096);
    let open = |options: &str| Block::open(&config(&file, options), 0, 1, &Registry::default());
    let first = open("").unwrap();
    for options in ["", ",readonly"] {
        assert!(matches!(open(options), Err(BlockError::Image(ImageError::Locked(_)))));
    }
    drop(first);
    let readers = [open(",readonly").unwrap(), open(",readonly").unwrap()];
    assert!(open("").is_err());
    drop(readers);
    open("").unwrap();
}

#[test]
fn a_lock_that_goes_soon_is_waited_for() {
    let file = image(4096);
    let open = |options: &str| Block::open(&config(&file, options), 0, 1, &Registry::default());
    for options in ["", ",readonly"] {
        // As the last operations of a killed VM do.
        let holder = open("").unwrap();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(holder);
        });
        let block = open(options).unwrap();
        assert!(ends.is_finished() || ends.join().is_ok());
        assert!(open("").is_err(), "no lock was taken");
        drop(block);
    }
}

#[test]
fn an_odd_end_is_left_alone() {
    let file = image(1000);
    let block = Block::open(&config(&file, ""), 0, 1, &Registry::default()).unwrap();
    assert_eq!(block.shared.image.sectors, 1);
}

#[test]
fn unaligned_memory_is_read_directly() {
    let Ok(block) = Block::open(&config(&image(8192), ",direct"), 0, 1, &Registry::default()) else { return };
    let mut driver = Driver::start(Box::new(block), &[16]);
    let (head, room) = (driver.filled(&header(0, 1)), driver.buffer(2000));
    driver.offer(0, &[head], &[(room.0 + 3, 513)]);
    driver.wait_used(0);
    assert_eq!(driver.bytes((room.0 + 3, 513)), [&[1; 512][..], &[OK]].concat());
}

#[test]
fn a_full_host_disk_is_an_io_error() {
    // Writes to it fail with ENOSPC, and it is no file that a user could give.
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(full.write_at(&[1], 0).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    let file = image(4096);
    let mut block = Block::open(&config(&file, ""), 0, 1, &Registry::default()).unwrap();
    Arc::get_mut(&mut block.shared).unwrap().image.replace_file(full);
    let counters = block.counters();
    let mut rig = Rig { file, driver: Driver::start(Box::new(block), &[16]), counters };
    assert_eq!(rig.status(1, 0, &[1; 512], 0), IO_ERROR);
    assert_eq!(rig.status(8, 0, &[], 20), OK);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is asked, the file keeps its length, a chain is given back with a status, and only what a good write
    /// names is changed.
    #[test]
    fn random_requests_stay_on_the_disk(
        requests in prop::collection::vec(
            (prop::sample::select(vec![0u32, 1, 4, 8, 11, 13, 77]),
             prop_oneof![0u64..SECTORS + 4, any::<u64>()],
             prop_oneof![Just(512usize), Just(16), Just(1024), 0usize..3000], 0u32..3000, any::<u32>(), 0u32..3),
            1..20),
    ) {
        let mut rig = rig("");
        let mut model = rig.on_host();
        for (kind, sector, len, room, count, flags) in requests {
            let data = if kind > 10 { range(sector, count % 80, flags) } else { vec![0x5a; len] };
            let (status, written, _) = rig.ask(kind, sector, &data, room);
            prop_assert!(status <= UNSUPPORTED);
            prop_assert!(written <= room + 1);
            if status == OK && [1, 11, 13].contains(&kind) {
                let start = sector as usize * 512;
                let (end, value) =
                    if kind == 1 { (start + len, 0x5a) } else { (start + (count % 80) as usize * 512, 0) };
                prop_assert!(end <= model.len());
                model[start..end].fill(value);
            }
        }
        prop_assert_eq!(rig.on_host(), model);
    }
}
