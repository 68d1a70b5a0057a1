//! The balloon with a driver that gives it any page numbers, statistics and chains. The device finds rest, and nothing
//! outside of the guest's memory is given up: that would end the fuzzer.
#![no_main]

mod harness;

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use harness::{BUFFERS, Guest, Piece};
use libfuzzer_sys::fuzz_target;
use microvm::config::{BalloonConfig, Size};
use microvm::devices::virtio::balloon::Balloon;
use microvm::devices::virtio::{Served, VirtioDevice};
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: Size = Size::mib(4);
static GUEST_MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(&"4M".parse().unwrap()).unwrap());

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Inflate or deflate by these pages.
    Pages(bool, Vec<u32>),
    /// Pages of the guest's memory above its rings.
    GoodPages(bool, Vec<u16>),
    Statistics(Vec<(u16, u64)>),
    /// A report of free pages: places in memory.
    Report(Vec<Piece>),
    Chain(u8, Vec<Piece>),
    Scribble(u32, &'a [u8]),
    Target(u32),
    Configuration(u64, &'a [u8]),
}

fuzz_target!(|input: (u8, Vec<Step>)| {
    let (choice, steps) = input;
    let bit = |bit: u8| choice >> bit & 1 == 1;
    let config = BalloonConfig {
        size: Size(0),
        deflate_on_oom: bit(0),
        free_page_reporting: bit(1),
        stats: bit(2).then_some(60),
    };
    let mut balloon = Balloon::new(&config, MEMORY);
    let queues = balloon.queue_sizes().len();
    let (mut guest, activation) = Guest::new(&GUEST_MEMORY, &[64; 4][..queues], balloon.features());
    let mut device = balloon.serving(activation).unwrap();
    guest.watch(&device);
    for step in steps.iter().take(100) {
        take(step, &mut balloon, &mut guest, queues);
        guest.serve(&mut device, |_| true);
        for queue in 0..queues {
            while guest.used(queue).is_some() {}
        }
    }
    let status = balloon.handle().status();
    assert!(status.target <= MEMORY, "{:?}", status.target);
    device.stop();
});

fn take(step: &Step, balloon: &mut Balloon, guest: &mut Guest, queues: usize) {
    match step {
        Step::Pages(deflate, pages) => {
            let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
            send(guest, usize::from(*deflate), &bytes);
        }
        Step::GoodPages(deflate, pages) => {
            let bytes: Vec<u8> =
                pages.iter().flat_map(|p| (256 + u32::from(p % 768)).to_le_bytes()).collect();
            send(guest, usize::from(*deflate), &bytes);
        }
        Step::Statistics(stats) => {
            let one = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
            let bytes: Vec<u8> = stats.iter().flat_map(one).collect();
            send(guest, 2.min(queues - 1), &bytes);
        }
        Step::Report(pieces) => guest.offer_pieces(queues - 1, pieces),
        Step::Chain(queue, pieces) => guest.offer_pieces(usize::from(*queue) % queues, pieces),
        Step::Scribble(at, bytes) => {
            guest.scribble(*at, bytes);
            (0..queues).for_each(|queue| guest.notify(queue));
        }
        Step::Target(target) => drop(balloon.handle().set_target(Size(u64::from(*target)))),
        Step::Configuration(at, bytes) => {
            balloon.write_config(*at, bytes);
            balloon.read_config(*at, &mut vec![0; bytes.len()]);
        }
    }
}

fn send(guest: &mut Guest, queue: usize, bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(1 << 16)];
    guest.memory.guest().write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
    guest.offer(queue, &[(BUFFERS, bytes.len() as u32, false)]);
}
