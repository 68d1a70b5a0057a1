//! A disk with a driver that sends any requests and chains. Where it does nothing wrong, each request is answered and
//! reads find what was written; whatever it does, the image keeps its length and the device finds rest.
#![no_main]

mod harness;

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use arbitrary::Arbitrary;
use harness::{BUFFERS, Guest, Piece};
use libfuzzer_sys::fuzz_target;
use microvm::config::{DiskConfig, DiskEngine};
use microvm::devices::virtio::block::Block;
use microvm::devices::virtio::{Served, VirtioDevice};
use microvm::metrics::Registry;
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};

const SECTORS: usize = 64;
const LEN: usize = SECTORS * 512;
/// Kinds of requests (virtio 1.3 §5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Read {
        sector: u8,
        sectors: u8,
    },
    Write {
        sector: u8,
        sectors: u8,
        fill: u8,
    },
    Flush,
    Ranges {
        discard: bool,
        sector: u8,
        sectors: u8,
        flags: u8,
    },
    /// A header of any kind before data of any length.
    Request {
        kind: u32,
        sector: u64,
        data: &'a [u8],
        room: u16,
        writable: bool,
    },
    Chain(Vec<Piece>),
    Scribble(u32, &'a [u8]),
    WriteBack(u64, u8),
}

/// The disks for all inputs. Threads read and write them; none is left when an input ends.
struct Host {
    /// One file, which is written.
    whole: Disk,
    /// The same length in several files, which end in the middle of most requests. They are only read.
    pieces: Disk,
    memory: Memory,
}

struct Disk {
    block: Block,
    files: Vec<File>,
    /// What is on it at first.
    content: Vec<u8>,
}

fn folder() -> PathBuf {
    let base = PathBuf::from("/dev/shm");
    let base = if base.is_dir() { base } else { std::env::temp_dir() };
    base.join(format!("microvm-fuzz-{}", std::process::id()))
}

impl Host {
    fn new() -> Self {
        std::fs::create_dir_all(folder()).unwrap();
        extern "C" fn remove() {
            let _ = std::fs::remove_dir_all(folder());
        }
        // SAFETY: the function takes and returns nothing, and touches no state of ours.
        unsafe { libc::atexit(remove) };
        // Sectors that differ.
        let numbered = (0..LEN).map(|at| (at / 512 + 1) as u8).collect();
        Self {
            whole: Disk::new("whole", vec![0; LEN], &[LEN]),
            pieces: Disk::new("piece", numbered, &[512, 2560, LEN / 2, LEN / 2 - 3072]),
            memory: Memory::new(&"2M".parse().unwrap()).unwrap(),
        }
    }
}

impl Disk {
    /// Of files of these lengths.
    fn new(name: &str, content: Vec<u8>, lens: &[usize]) -> Self {
        let (mut rest, mut paths) = (&content[..], Vec::new());
        for (number, len) in lens.iter().enumerate() {
            let (bytes, behind) = rest.split_at(*len);
            let path = folder().join(format!("{name}{number}"));
            std::fs::write(&path, bytes).unwrap();
            paths.push(path);
            rest = behind;
        }
        let mut config = DiskConfig::new(paths[0].clone());
        config.more = paths[1..].to_vec();
        config.readonly = paths.len() > 1;
        config.engine = Some(DiskEngine::Threads);
        let block = Block::open(&config, 0, 1, &Registry::default()).unwrap();
        let open = |path: &PathBuf| File::options().read(true).write(true).open(path).unwrap();
        Self { block, files: paths.iter().map(open).collect(), content }
    }

    /// As at first.
    fn restore(&self) {
        if let [file] = &self.files[..] {
            file.write_all_at(&self.content, 0).unwrap();
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for file in &self.files {
            let start = bytes.len();
            bytes.resize(start + file.metadata().unwrap().len() as usize, 0);
            file.read_exact_at(&mut bytes[start..], 0).unwrap();
        }
        bytes
    }
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    in_pieces: bool,
    steps: Vec<Step<'a>>,
}

fuzz_target!(|input: Input| {
    HOST.with_borrow_mut(|host| {
        let Host { whole, pieces, memory } = host.get_or_insert_with(Host::new);
        run(if input.in_pieces { pieces } else { whole }, memory, &input.steps);
    });
});

/// The driver, and what it believes to be on the disk.
struct Driver {
    guest: Guest,
    disk: Vec<u8>,
    is_proper: bool,
}

fn run(disk: &mut Disk, memory: &Memory, steps: &[Step]) {
    disk.restore();
    let features = disk.block.features();
    let (guest, activation) = Guest::new(memory, &[128], features);
    let mut device = disk.block.serving(activation).unwrap();
    guest.watch(&device);
    let mut driver = Driver { guest, disk: disk.content.clone(), is_proper: true };
    for step in steps.iter().take(64) {
        if let Step::WriteBack(at, value) = step {
            disk.block.write_config(*at, &[*value]);
        } else {
            driver.take(step, &mut device);
        }
    }
    device.stop();
    drop(device);
    // Ends the threads.
    drop(disk.block.quiesce());
    let found = disk.bytes();
    assert_eq!(found.len(), LEN, "the image has another length");
    assert!(!driver.is_proper || found == driver.disk, "the image has other contents");
}

impl Driver {
    fn take(&mut self, step: &Step, device: &mut impl Served) {
        match step {
            Step::Read { sector, sectors } => {
                let (sector, len) = (u64::from(*sector % 80), usize::from(*sectors % 80) * 512);
                let status = self.request(device, IN, sector, (DATA, len as u32, true));
                if let Some(range) = self.range(sector, len, status) {
                    let mut found = vec![0; len];
                    self.guest.memory.guest().read_slice(&mut found, GuestAddress(DATA)).unwrap();
                    assert!(found == self.disk[range], "a read finds other data");
                }
            }
            Step::Write { sector, sectors, fill } => {
                let (sector, len) = (u64::from(*sector % 80), usize::from(*sectors % 80) * 512);
                self.guest.memory.guest().write_slice(&vec![*fill; len], GuestAddress(DATA)).unwrap();
                let status = self.request(device, OUT, sector, (DATA, len as u32, false));
                if let Some(range) = self.range(sector, len, status) {
                    self.disk[range].fill(*fill);
                }
            }
            Step::Flush => drop(self.request(device, FLUSH, 0, (DATA, 0, false))),
            Step::Ranges { discard, sector, sectors, flags } => {
                let (sector, count) = (u64::from(*sector % 80), u32::from(*sectors % 80));
                let words =
                    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &u32::from(*flags).to_le_bytes()];
                self.guest.memory.guest().write_slice(&words.concat(), GuestAddress(DATA)).unwrap();
                let kind = if *discard { DISCARD } else { WRITE_ZEROES };
                let status = self.request(device, kind, 0, (DATA, 16, false));
                if let Some(range) = self.range(sector, count as usize * 512, status) {
                    self.disk[range].fill(0);
                }
            }
            Step::Request { kind, sector, data, room, writable } => {
                // What else a driver may want is either harmless or refused.
                let kind = if [OUT, DISCARD, WRITE_ZEROES].contains(kind) { GET_ID } else { *kind };
                let data = &data[..data.len().min(4096)];
                self.guest.memory.guest().write_slice(data, GuestAddress(DATA)).unwrap();
                self.request(device, kind, *sector, (DATA, (*room).into(), *writable));
            }
            Step::Chain(pieces) => {
                self.is_proper = false;
                self.guest.offer_pieces(0, pieces);
                self.guest.serve(device, |_| true);
            }
            Step::Scribble(at, bytes) => {
                self.is_proper = false;
                self.guest.scribble(*at, bytes);
                self.guest.notify(0);
                self.guest.serve(device, |_| true);
            }
            Step::WriteBack(..) => {}
        }
    }

    /// One request, and its status.
    fn request(
        &mut self,
        device: &mut impl Served,
        kind: u32,
        sector: u64,
        data: (u64, u32, bool),
    ) -> Option<u8> {
        let memory = self.guest.memory.guest();
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        let all = [(HEADER, 16, false), data, (STATUS, 1, true)];
        let chain: Vec<_> = all.into_iter().filter(|(_, len, _)| *len > 0).collect();
        self.guest.offer(0, &chain);
        if !self.is_proper {
            self.guest.serve(device, |_| true);
            return None;
        }
        self.guest.serve(device, |guest| guest.is_idle(0));
        assert!(!self.guest.interrupt.is_reset_needed(), "a driver that did nothing wrong");
        let status = self.guest.memory.guest().read_obj(GuestAddress(STATUS)).unwrap();
        assert!(status <= 2, "no status");
        Some(status)
    }

    /// The part of the disk that a request which succeeded was about.
    fn range(&self, sector: u64, len: usize, status: Option<u8>) -> Option<std::ops::Range<usize>> {
        let start = sector as usize * 512;
        let is_inside = start + len <= LEN;
        let is_ok = status? == 0;
        assert!(!is_ok || is_inside || len == 0, "success past the end");
        (is_ok && is_inside).then_some(start..start + len)
    }
}
