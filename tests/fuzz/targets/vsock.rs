//! The socket device with a driver that sends any packets and chains, and host programs that come and go. Every packet
//! to the guest is whole and from the host, the device finds rest, and a queue that is not broken gets its answers.
#![no_main]

mod harness;

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use arbitrary::Arbitrary;
use harness::{BUFFERS, Guest, Piece};
use libfuzzer_sys::fuzz_target;
use microvm::devices::virtio::Served;
use microvm::devices::virtio::vsock::{SocketFile, Vsock};
use microvm::metrics::Registry;
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 7;
const HEADER_LEN: usize = 44;
/// Somebody listens there.
const PORT: u32 = 80;
/// Where the device begins to count the ports of host programs.
const FIRST_PORT: u32 = 1 << 30;
const RX_LEN: u32 = 2048;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A packet that is right but for what the input chooses.
    Packet(Packet<'a>),
    /// Receive buffers.
    Buffers(u8),
    /// Anything at all in any queue.
    Chain(u8, Vec<Piece>),
    Scribble(u32, &'a [u8]),
    /// A host program connects and sends this.
    Connect(&'a [u8]),
    /// It names a port.
    Line(u8),
    Program(u8, Doing<'a>),
}

#[derive(Arbitrary, Debug)]
enum Doing<'a> {
    Write(&'a [u8]),
    Flood,
    Read,
    EndWriting,
    Close,
}

#[derive(Arbitrary, Debug)]
struct Packet<'a> {
    op: u8,
    wrong: u8,
    guest_port: u8,
    host_port: u8,
    flags: u8,
    buf_alloc: u32,
    fwd_cnt: u32,
    lie: Option<u32>,
    split: u8,
    data: &'a [u8],
}

impl Packet<'_> {
    fn bytes(&self) -> Vec<u8> {
        let host_port = match self.host_port % 4 {
            0 => PORT,
            1 => PORT + 1,
            _ => FIRST_PORT + u32::from(self.host_port >> 2),
        };
        let is = |bit: u8| self.wrong & 0xc0 == 0xc0 && self.wrong >> bit & 1 == 1;
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.data.len());
        bytes.extend((if is(0) { 9 } else { CID }).to_le_bytes());
        bytes.extend((if is(1) { 9_u64 } else { 2 }).to_le_bytes());
        bytes.extend(u32::from(self.guest_port % 8).to_le_bytes());
        bytes.extend(host_port.to_le_bytes());
        bytes.extend(self.lie.unwrap_or(self.data.len() as u32).to_le_bytes());
        bytes.extend((if is(2) { 2_u16 } else { 1 }).to_le_bytes());
        bytes.extend(u16::from(self.op % 9).to_le_bytes());
        bytes.extend(u32::from(self.flags).to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(self.data);
        bytes
    }

    /// In one descriptor, or two.
    fn send(&self, guest: &mut Guest) {
        let bytes = self.bytes();
        guest.memory.guest().write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        let (all, first) = (bytes.len() as u32, u32::from(self.split));
        if (1..all).contains(&first) {
            let rest = (BUFFERS + u64::from(first), all - first, false);
            guest.offer(1, &[(BUFFERS, first, false), rest]);
        } else {
            guest.offer(1, &[(BUFFERS, all, false)]);
        }
    }
}

/// One device and one folder for all inputs; each has its own connections.
struct Host {
    vsock: Vsock,
    _file: SocketFile,
    listener: UnixListener,
    path: PathBuf,
    memory: Memory,
}

impl Host {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("microvm-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        extern "C" fn remove() {
            let name = format!("microvm-fuzz-{}", std::process::id());
            let _ = std::fs::remove_dir_all(std::env::temp_dir().join(name));
        }
        // SAFETY: the function takes and returns nothing, and touches no state of ours.
        unsafe { libc::atexit(remove) };
        let path = folder.join("v");
        let (vsock, _file) = Vsock::open(CID as u32, &path, &Registry::default()).unwrap();
        let listener = UnixListener::bind(folder.join(format!("v_{PORT}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { vsock, _file, listener, path, memory: Memory::new(&"2M".parse().unwrap()).unwrap() }
    }
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

fuzz_target!(|steps: Vec<Step>| {
    HOST.with_borrow_mut(|host| run(host.get_or_insert_with(Host::new), &steps));
});

fn run(host: &mut Host, steps: &[Step]) {
    let (mut guest, activation) = Guest::new(&host.memory, &[64, 64, 8], 0);
    let mut device = host.vsock.serving(activation).unwrap();
    guest.watch(&device);
    let mut programs = Vec::new();
    let mut is_proper = true;
    for step in steps.iter().take(200) {
        match step {
            Step::Packet(packet) if guest.has_room(1) => packet.send(&mut guest),
            Step::Packet(_) => {}
            Step::Buffers(count) => {
                for _ in 0..count % 32 {
                    if !guest.has_room(0) {
                        break;
                    }
                    guest.offer(0, &[(BUFFERS + 0x4_0000, RX_LEN, true)]);
                }
            }
            Step::Chain(queue, pieces) => {
                is_proper = false;
                guest.offer_pieces(usize::from(queue % 3), pieces);
            }
            Step::Scribble(at, bytes) => {
                is_proper = false;
                guest.scribble(*at, bytes);
                (0..3).for_each(|queue| guest.notify(queue));
            }
            Step::Connect(bytes) => connect(host, &mut programs, bytes),
            Step::Line(port) => connect(host, &mut programs, format!("CONNECT {}\n", port % 8).as_bytes()),
            Step::Program(which, doing) => act(&mut programs, *which, doing),
        }
        guest.serve(&mut device, |_| true);
        while let Ok((program, _)) = host.listener.accept() {
            program.set_nonblocking(true).unwrap();
            programs.push(program);
        }
        while let Some((head, len)) = guest.used(0) {
            if is_proper {
                check(&guest, head, len);
            }
        }
        assert!(!is_proper || !guest.interrupt.is_reset_needed(), "a driver that did nothing wrong");
    }
    device.stop();
}

fn connect(host: &Host, programs: &mut Vec<UnixStream>, bytes: &[u8]) {
    if programs.len() < 32 {
        let mut program = UnixStream::connect(&host.path).unwrap();
        program.set_nonblocking(true).unwrap();
        let _ = program.write(bytes);
        programs.push(program);
    }
}

fn act(programs: &mut Vec<UnixStream>, which: u8, doing: &Doing) {
    if programs.is_empty() {
        return;
    }
    let which = usize::from(which) % programs.len();
    let program = &mut programs[which];
    match doing {
        Doing::Write(bytes) => drop(program.write(bytes)),
        Doing::Flood => drop(program.write(&[7; 1 << 16])),
        Doing::Read => drop(program.read(&mut [0; 1 << 16])),
        Doing::EndWriting => drop(program.shutdown(Shutdown::Write)),
        Doing::Close => drop(programs.remove(which)),
    }
}

/// A packet to the guest is as long as it says, and is addressed to it.
fn check(guest: &Guest, head: u32, len: u32) {
    let (address, room) = guest.descriptor(0, head);
    assert!(len <= room && len as usize >= HEADER_LEN, "{len} bytes in a buffer of {room}");
    // All buffers are the same one, so the header there is the last packet's: only its own can be told.
    let destination: u64 = guest.memory.guest().read_obj(GuestAddress(address + 8)).unwrap();
    assert!(destination == CID, "a packet for {destination}");
}
