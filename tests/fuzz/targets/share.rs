//! A shared folder with a driver that sends any requests and chains. Nothing beside the folder changes, nothing in it is a
//! set-user-ID program, a pipe or a device, every answer is whole, and the device finds rest.
#![no_main]

mod harness;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use arbitrary::Arbitrary;
use harness::{BUFFERS, Guest, Piece};
use libfuzzer_sys::fuzz_target;
use microvm::config::ShareConfig;
use microvm::devices::virtio::share::{Limits, Share};
use microvm::devices::virtio::{Served, VirtioDevice};
use microvm::metrics::Registry;
use microvm::sandbox::Confined;
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};

const ANSWER: u64 = BUFFERS + 0x8000;
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;
const INTERRUPT: u32 = 36;
/// Of the lengths that it may name most would fill the host's disk.
const FALLOCATE: u32 = 43;

/// Names that come up again and again, so that requests are about the same files.
const NAMES: [&str; 12] = ["a", "b", "c", "link", "out", "..", ".", "", "a/b", "/etc", "../beside", "a\0b"];

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A request with these words and names behind its header.
    Request { opcode: u8, node: u8, words: Vec<u32>, names: Vec<u8>, room: u16 },
    /// With any bytes.
    Bytes { opcode: u32, node: u64, args: &'a [u8], room: u16 },
    Chain(u8, Vec<Piece>),
    Scribble(u32, &'a [u8]),
}

fuzz_target!(|steps: Vec<Step>| run(&steps));

/// In memory, where there is such a place.
fn folder() -> PathBuf {
    let base = Path::new("/dev/shm").to_path_buf();
    let base = if base.is_dir() { base } else { std::env::temp_dir() };
    base.join(format!("microvm-fuzz-share-{}", std::process::id()))
}

fn run(steps: &[Step]) {
    let above = folder();
    let inside = above.join("share");
    let _ = fs::remove_dir_all(&above);
    fs::create_dir_all(inside.join("a")).unwrap();
    fs::write(above.join("beside"), "beside").unwrap();
    fs::write(inside.join("b"), "b").unwrap();
    std::os::unix::fs::symlink("../beside", inside.join("out")).unwrap();
    let config = ShareConfig::new(inside.clone(), "fuzz".into());
    let limits = Limits { inodes: 16, handles: 8 };
    let (mut share, server) = Share::open(&config, 0, limits, &Registry::default()).unwrap();
    let threads = server.start(Confined::not()).unwrap();
    let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
    let (guest, activation) = Guest::new(&memory, &[128, 128], 0);
    let mut device = share.serving(activation).unwrap();
    guest.watch(&device);
    let mut driver = Driver { guest, is_proper: true };
    driver.ask(&mut device, 26, 1, &[7_u32, 31, 0, u32::MAX].map(u32::to_le_bytes).concat(), 64);
    for step in steps.iter().take(64) {
        driver.take(step, &mut device);
    }
    device.drain();
    device.stop();
    drop(device);
    drop(share.quiesce());
    drop(threads);
    assert_eq!(fs::read(above.join("beside")).unwrap(), b"beside");
    assert_eq!(fs::metadata(above.join("beside")).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(&above).unwrap().count(), 2, "something was made beside the share");
    check(&inside);
    fs::remove_dir_all(&above).unwrap();
}

fn check(folder: &Path) {
    // A guest may have made it unreadable.
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let entry = entry.unwrap();
        let (kind, stat) = (entry.file_type().unwrap(), entry.metadata().unwrap());
        let is_special = kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device();
        assert!(!is_special, "{entry:?} is none of a share");
        assert!(kind.is_symlink() || stat.mode() & 0o6000 == 0, "{entry:?} has another's rights");
        if kind.is_dir() {
            check(&entry.path());
        }
    }
}

struct Driver {
    guest: Guest,
    is_proper: bool,
}

impl Driver {
    fn take(&mut self, step: &Step, device: &mut impl Served) {
        match step {
            Step::Request { opcode, node, words, names, room } => {
                let opcode = u32::from(opcode % 54);
                let words = words.iter().take(24).map(|w| if opcode == FALLOCATE { w % 65536 } else { *w });
                // The upper halves of what a request of this kind counts stay zero.
                let words = words.enumerate().map(|(i, w)| if opcode == FALLOCATE && i % 2 == 1 { 0 } else { w });
                let mut args: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
                for name in names.iter().take(3) {
                    args.extend(NAMES[usize::from(*name) % NAMES.len()].bytes().chain([0]));
                }
                self.ask(device, opcode, (*node % 12).into(), &args, (*room).into());
            }
            Step::Bytes { opcode, node, args, room } => {
                let opcode = if *opcode == FALLOCATE { 0 } else { *opcode };
                self.ask(device, opcode, *node, &args[..args.len().min(0x4000)], (*room).into());
            }
            Step::Chain(queue, pieces) => {
                self.is_proper = false;
                self.guest.offer_pieces(usize::from(queue % 2), pieces);
                self.guest.serve(device, |_| true);
            }
            Step::Scribble(at, bytes) => {
                self.is_proper = false;
                self.guest.scribble(*at, bytes);
                self.guest.notify(1);
                self.guest.serve(device, |_| true);
            }
        }
    }

    fn ask(&mut self, device: &mut impl Served, opcode: u32, node: u64, args: &[u8], room: u32) {
        let memory = self.guest.memory.guest();
        let len = 40 + args.len() as u32;
        let header = [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &77_u64.to_le_bytes()].concat();
        let header = [&header[..], &node.to_le_bytes(), &[0; 16], args].concat();
        memory.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
        memory.write_slice(&[0xaa; 16], GuestAddress(ANSWER)).unwrap();
        let room = 16 + room % 0x4000;
        self.guest.offer(1, &[(BUFFERS, len, false), (ANSWER, room, true)]);
        if !self.is_proper {
            return self.guest.serve(device, |_| true);
        }
        self.guest.serve(device, |guest| guest.is_idle(1));
        assert!(!self.guest.interrupt.is_reset_needed(), "a driver that did nothing wrong");
        let (_, written) = self.guest.used(1).unwrap();
        if [FORGET, BATCH_FORGET, INTERRUPT].contains(&opcode) {
            return assert_eq!(written, 0, "an answer that nobody waits for");
        }
        let mut answer = [0; 16];
        self.guest.memory.guest().read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8), word(12)), (written, 77, 0), "no answer");
        assert!(written >= 16 && written <= room && (-4095..=0).contains(&(word(4) as i32)), "{answer:x?}");
    }
}
