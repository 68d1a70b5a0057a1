//! A driver that breaks the rules of queues (virtio 1.3 §2.7), the same way to every kind of device: the device asks for
//! a reset and works after it, others go on, and it costs neither memory nor time. What a kind has of its own to break is
//! in its own tests.

use std::process::Command;
use std::time::{Duration, Instant};

use super::testing::{Driver, Rig};
use super::{balloon, block, console, net, rng, share, vsock};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Good memory, and some that is none: [`Driver`]'s guest has 64 MiB.
const BUFFER: (u64, u32) = (0x80_0000, 64);
const END: u64 = 64 << 20;
/// Longer than a device that works takes to do something.
const WHILE: Duration = Duration::from_millis(2);

type Attack = fn(&mut Driver, usize);

fn first_chain(driver: &mut Driver, queue: usize, buffer: (u64, u32), flags: u16, next: u16) {
    driver.descriptor(queue, 0, buffer, flags, next);
    driver.make_available(queue, 0);
}

/// A chain that is an indirect table of these descriptors: address, length, flags, next.
fn indirect(driver: &mut Driver, queue: usize, table: &[(u64, u32, u16, u16)]) {
    let bytes: Vec<u8> = table
        .iter()
        .flat_map(|(address, len, flags, next)| {
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                .concat()
        })
        .collect();
    let table = driver.filled(&bytes);
    first_chain(driver, queue, table, INDIRECT, 0);
}

/// What no device may take. Each is the first that its queue sees.
const ATTACKS: &[(&str, Attack)] = &[
    ("the index jumps by more than the queue", |d, q| d.jump(q, 1000)),
    ("the index goes back", |d, q| d.jump(q, u16::MAX)),
    ("a head behind the table", |d, q| d.make_available(q, 128)),
    ("the largest head", |d, q| d.make_available(q, u16::MAX)),
    ("a descriptor that is followed by itself", |d, q| first_chain(d, q, BUFFER, NEXT, 0)),
    ("the same for writing", |d, q| first_chain(d, q, BUFFER, NEXT | WRITE, 0)),
    ("a loop of empty descriptors", |d, q| first_chain(d, q, (BUFFER.0, 0), NEXT, 0)),
    ("a loop of two", |d, q| {
        d.descriptor(q, 1, BUFFER, NEXT, 0);
        first_chain(d, q, BUFFER, NEXT, 1);
    }),
    ("a next behind the table", |d, q| first_chain(d, q, BUFFER, NEXT, 128)),
    ("to read behind what is to write", |d, q| {
        d.descriptor(q, 1, BUFFER, 0, 0);
        first_chain(d, q, BUFFER, NEXT | WRITE, 1);
    }),
    ("behind the end of memory", |d, q| first_chain(d, q, (END, 64), 0, 0)),
    ("over the end of memory", |d, q| first_chain(d, q, (END - 32, 64), WRITE, 0)),
    ("the largest address", |d, q| first_chain(d, q, (u64::MAX, 1), WRITE, 0)),
    ("over the end of addresses", |d, q| first_chain(d, q, (u64::MAX - 7, 64), 0, 0)),
    ("as long as can be", |d, q| first_chain(d, q, (BUFFER.0, u32::MAX), WRITE, 0)),
    ("a table in a table", |d, q| indirect(d, q, &[(BUFFER.0, 16, INDIRECT, 0)])),
    ("a table behind a table's first", |d, q| {
        indirect(d, q, &[(BUFFER.0, 64, NEXT, 1), (BUFFER.0, 16, INDIRECT, 0)]);
    }),
    ("a table that is left", |d, q| indirect(d, q, &[(BUFFER.0, 64, NEXT, 1)])),
    ("a loop in a table", |d, q| indirect(d, q, &[(BUFFER.0, 64, NEXT, 0)])),
    ("half a table", |d, q| first_chain(d, q, (BUFFER.0, 8), INDIRECT, 0)),
    ("an empty table", |d, q| first_chain(d, q, (BUFFER.0, 0), INDIRECT, 0)),
    ("a table outside of memory", |d, q| first_chain(d, q, (END, 16), INDIRECT, 0)),
    ("a table and a next", |d, q| first_chain(d, q, (BUFFER.0, 16), INDIRECT | NEXT, 1)),
];

fn kinds() -> Vec<Rig> {
    let disks = ["uring", "threads"].into_iter().filter_map(block::tests::rig_of_any_kind);
    let others = [
        rng::tests::rig(),
        net::tests::rig(),
        vsock::tests::rig(),
        balloon::tests::rig(),
        console::tests::rig(),
        share::tests::rig_of_any_kind(),
    ];
    disks.chain(others).collect()
}

fn needs_reset(driver: &mut Driver) -> bool {
    driver.read(0x70) & 64 != 0
}

fn attack(rig: &mut Rig, queue: usize, (what, attack): &(&str, Attack)) {
    attack(&mut rig.driver, queue);
    rig.driver.notify(queue);
    (rig.stir)();
    let message = format!("{}, queue {queue}, {what}: it does not ask for a reset", rig.name);
    rig.driver.wait(&message, |d| needs_reset(d).then_some(()));
}

/// The device asks for its reset and says so, does nothing more, and works after it.
#[track_caller]
fn survives(mut rig: Rig) {
    (rig.works)(&mut rig.driver);
    for queue in rig.queues.clone() {
        for one in ATTACKS {
            rig.start_again();
            attack(&mut rig, queue, one);
            let context = format!("{}, queue {queue}, {}", rig.name, one.0);
            let message = format!("{context}: no interrupt");
            // The bit in the status comes first.
            rig.driver.wait(&message, |d| (d.read(0x60) & 2 != 0).then_some(()));
            rig.driver.wait(&message, |d| d.line.read().ok());
            (rig.offer)(&mut rig.driver);
            let before = rig.driver.shared_memory();
            (0..rig.sizes.len()).for_each(|q| rig.driver.notify(q));
            wait_a_while();
            assert!(rig.driver.shared_memory() == before, "{context}: it goes on before its reset");
        }
    }
    rig.start_again();
}

fn wait_a_while() {
    let begin = Instant::now();
    while begin.elapsed() < WHILE {
        std::thread::yield_now();
    }
}

#[test]
fn rng_survives() {
    survives(rng::tests::rig());
}

#[test]
fn block_survives() {
    ["uring", "threads"].into_iter().filter_map(block::tests::rig_of_any_kind).for_each(survives);
}

#[test]
fn net_survives() {
    survives(net::tests::rig());
}

#[test]
fn vsock_survives() {
    survives(vsock::tests::rig());
}

#[test]
fn balloon_survives() {
    survives(balloon::tests::rig());
}

#[test]
fn console_survives() {
    survives(console::tests::rig());
}

#[test]
fn share_survives() {
    survives(share::tests::rig_of_any_kind());
}

/// One head twice: refused where the first is still under way, and two requests where it is not. Either way the device
/// lives, and nothing is given back more often than it was offered.
#[test]
fn a_head_that_is_offered_twice_harms_no_device() {
    for mut rig in kinds() {
        for queue in rig.queues.clone() {
            rig.start_again();
            for flags in [0, WRITE] {
                (0..16).for_each(|_| first_chain(&mut rig.driver, queue, BUFFER, flags, 0));
                rig.driver.notify(queue);
                (rig.stir)();
                wait_a_while();
                let used = std::iter::from_fn(|| rig.driver.try_used(queue)).count();
                assert!(used <= 16, "{}, queue {queue}: {used} of 16", rig.name);
                rig.start_again();
            }
        }
    }
}

/// Nothing completes into the rings and buffers of before a reset.
#[test]
fn a_reset_in_the_middle_of_work_ends_it_on_every_device() {
    for mut rig in kinds() {
        for round in 0..30 {
            (0..5).for_each(|_| (rig.offer)(&mut rig.driver));
            (0..rig.sizes.len()).for_each(|q| rig.driver.notify(q));
            (rig.stir)();
            // At another moment each time.
            (0..round * 10).for_each(|_| std::hint::spin_loop());
            rig.driver.write(0x70, 0);
            assert_eq!((rig.driver.read(0x70), rig.driver.read(0x60)), (0, 0), "{}", rig.name);
            let before = rig.driver.shared_memory();
            (rig.stir)();
            wait_a_while();
            assert!(rig.driver.shared_memory() == before, "{}: it works after its reset", rig.name);
            rig.start_again();
        }
    }
}

#[test]
fn a_device_that_waits_for_its_reset_holds_up_no_other() {
    let mut rigs = kinds();
    for broken in 0..rigs.len() {
        let queue = rigs[broken].queues[0];
        attack(&mut rigs[broken], queue, &ATTACKS[0]);
        for other in (0..rigs.len()).filter(|i| *i != broken) {
            rigs[other].start_again();
        }
        assert!(needs_reset(&mut rigs[broken].driver));
        rigs[broken].start_again();
    }
}

/// Set where the test below runs in a process of its own, whose memory and time are the devices'.
const ALONE: &str = "MICROVM_TEST_ALONE";

fn own_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// User and system time, in clock ticks (proc_pid_stat(5), fields 14 and 15).
fn own_ticks() -> u64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = text.rsplit(") ").next().unwrap().split(' ').collect();
    [11, 12].iter().map(|i| fields[*i].parse::<u64>().unwrap()).sum()
}

fn attack_in_every_way(rigs: &mut [Rig]) {
    for rig in rigs {
        for one in ATTACKS {
            for queue in rig.queues.clone() {
                attack(rig, queue, one);
                rig.start_again();
            }
        }
    }
}

fn cost_nothing() {
    let mut rigs = kinds();
    attack_in_every_way(&mut rigs);
    let before = own_memory();
    (0..5).for_each(|_| attack_in_every_way(&mut rigs));
    let after = own_memory();
    // The allocator's own moves are a third of that.
    assert!(after <= before + 384, "memory grows: {before} KiB, then {after}");
    for rig in &mut rigs {
        attack(rig, rig.queues[0], &ATTACKS[0]);
        // What comes now is nobody's to serve.
        (0..rig.sizes.len()).for_each(|q| rig.driver.notify(q));
        (rig.stir)();
    }
    let before = own_ticks();
    std::thread::sleep(Duration::from_millis(500));
    // One thread that spins would take 50.
    let ticks = own_ticks() - before;
    assert!(ticks < 8, "something spins: {ticks} ticks");
}

#[test]
fn hostile_drivers_cost_neither_memory_nor_time() {
    if std::env::var_os(ALONE).is_some() {
        return cost_nothing();
    }
    let name = concat!(module_path!(), "::hostile_drivers_cost_neither_memory_nor_time");
    let (_, name) = name.split_once("::").unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// The number of an item of docs/conformance.md, and the tests that it names, with their whole names.
fn row(line: &str) -> Option<(u32, Vec<String>)> {
    let cells: Vec<_> = line.strip_prefix("| ")?.split(" | ").collect();
    let [number, _, tests] = cells[..] else { return None };
    let names = tests.split('`').filter(|text| text.contains("::"));
    Some((number.parse().ok()?, names.map(str::to_string).collect()))
}

/// The page names every item once and no test that does not exist, and every test of this file stands on it.
#[test]
fn the_page_names_tests_that_exist() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/conformance.md")).unwrap();
    let output = Command::new(std::env::current_exe().unwrap()).arg("--list").output().unwrap();
    let list = String::from_utf8(output.stdout).unwrap();
    let existing: Vec<_> = list.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    let exists =
        |name: &str| existing.contains(&name) || existing.contains(&&*format!("devices::virtio::{name}"));
    let rows: Vec<_> = page.lines().filter_map(row).collect();
    let mut numbers: Vec<_> = rows.iter().map(|(number, _)| *number).collect();
    numbers.sort_unstable();
    assert!(numbers.iter().copied().eq((0..=49).chain([68])), "items: {numbers:?}");
    for (number, names) in &rows {
        let missing: Vec<_> = names.iter().filter(|name| !exists(name)).collect();
        assert!(missing.is_empty(), "docs/conformance.md, item {number}: no tests {missing:?}");
    }
    let own = existing.iter().filter_map(|name| name.strip_prefix("devices::virtio::hostile_tests::"));
    for name in own {
        assert!(page.contains(&format!("`hostile_tests::{name}`")), "{name} is not on docs/conformance.md");
    }
}
