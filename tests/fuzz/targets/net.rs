//! A network card with a driver that offers any frames, buffers, commands and chains, and a network that sends any frames
//! or, in user mode, any bytes. As long as neither does anything wrong, each frame arrives, whole and in order; whatever
//! they do, the device finds rest.
#![no_main]

mod harness;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use harness::{BUFFERS, Guest, Piece};
use libfuzzer_sys::fuzz_target;
use microvm::config::Mac;
use microvm::devices::virtio::net::{Backend, F_CTRL_VQ, F_MQ, F_MRG_RXBUF, Net, NetParts, Passt, Tap};
use microvm::devices::virtio::{Served, VirtioDevice};
use microvm::metrics::Registry;
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};

static MEMORY: LazyLock<Memory> = LazyLock::new(|| {
    // As Rust does for every program whose main function is its own.
    // SAFETY: nothing is called upon the signal.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    Memory::new(&"2M".parse().unwrap()).unwrap()
});

const HEADER: usize = 12;
/// Frames without the header.
const SHORTEST: usize = 14;
const LONGEST: usize = 65_550;
const RX: usize = 0;
const TX: usize = 1;
/// Where frames to send and commands lie; receive buffers lie behind.
const SENT: u64 = BUFFERS;
const RECEIVED: u64 = BUFFERS + 0x2_0000;
const ANSWER: u64 = BUFFERS + 0x1_f000;
/// Each of a ring's buffers has a place of this size.
const STEP: u64 = 4096;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    user: bool,
    /// Features that the driver leaves out.
    without: u64,
    pairs: bool,
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Send {
        len: u16,
        fill: u8,
        cuts: [u16; 2],
    },
    Buffers {
        count: u8,
        len: u16,
    },
    Receive {
        len: u16,
        huge: bool,
        fill: u8,
    },
    Command(&'a [u8]),
    Chain(u8, Vec<Piece>),
    Scribble(u32, &'a [u8]),
    /// The network sends bytes that may be no frame.
    Raw(&'a [u8]),
    /// It takes what was sent.
    Drain,
    Close,
}

/// The other end of the card.
enum Network {
    Tap(UnixDatagram),
    User(UnixStream),
    Closed,
}

impl Network {
    fn new(user: bool) -> (Self, Vec<Box<dyn Backend>>) {
        if user {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            return (Self::User(theirs), vec![Box::new(Passt::over(ours).unwrap())]);
        }
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Self::Tap(theirs), vec![Box::new(Tap::over(File::from(OwnedFd::from(ours))))])
    }

    /// Whether it was sent whole.
    fn send(&mut self, frame: &[u8]) -> bool {
        match self {
            Self::Tap(socket) => socket.send(&[&[0; HEADER], frame].concat()).is_ok(),
            Self::User(stream) => {
                let bytes = [&(frame.len() as u32).to_be_bytes(), frame].concat();
                stream.write(&bytes).is_ok_and(|sent| sent == bytes.len())
            }
            Self::Closed => false,
        }
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let _ = match self {
            Self::Tap(socket) => socket.send(bytes).is_ok(),
            Self::User(stream) => stream.write(bytes).is_ok(),
            Self::Closed => false,
        };
    }

    /// The next frame that the guest has sent.
    fn receive(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Tap(socket) => {
                let mut frame = vec![0; HEADER + LONGEST + 1];
                let len = socket.recv(&mut frame).ok()?;
                Some(frame[HEADER..len].to_vec())
            }
            Self::User(stream) => {
                let mut len = [0; 4];
                stream.read_exact(&mut len).ok()?;
                let mut frame = vec![0; u32::from_be_bytes(len) as usize];
                stream.read_exact(&mut frame).expect("half a frame");
                Some(frame)
            }
            Self::Closed => None,
        }
    }
}

/// Both sides, and what each waits for.
struct World {
    guest: Guest,
    network: Network,
    is_proper: bool,
    mergeable: bool,
    commands: Option<usize>,
    to_guest: VecDeque<Vec<u8>>,
    buffers: usize,
}

fuzz_target!(|input: Input| {
    let memory = &*MEMORY;
    let (network, mut backends) = Network::new(input.user);
    if input.pairs && !input.user {
        // The second pair's thread is not served here; what commands do with it, is.
        backends.extend(Network::new(false).1);
    }
    let pairs = backends.len();
    let (id, mac, name) = ("net0".into(), Mac([2, 0, 0, 0, 0, 1]), "fuzz".into());
    let parts = NetParts { id, mac, backends, name, iops: None, bandwidth: None };
    let mut net = Net::new(parts, &Registry::default()).unwrap();
    let features = net.features() & !input.without;
    let has = |feature| features & feature != 0;
    let used_pairs = if has(F_MQ) { pairs } else { 1 };
    let commands = has(F_CTRL_VQ).then_some(2 * used_pairs);
    let sizes = vec![64; 2 * used_pairs + usize::from(commands.is_some())];
    let (guest, activation) = Guest::new(memory, &sizes, features);
    let mut device = net.serving(activation).unwrap();
    guest.watch(&device);
    let mergeable = has(F_MRG_RXBUF);
    let to_guest = VecDeque::new();
    let mut world = World { guest, network, is_proper: true, mergeable, commands, to_guest, buffers: 0 };
    for step in input.steps.iter().take(64) {
        world.take(step, &mut device);
        world.guest.serve(&mut device, |_| true);
        world.check_received();
    }
    device.stop();
});

impl World {
    fn take(&mut self, step: &Step, device: &mut impl Served) {
        match step {
            Step::Send { len, fill, cuts } => self.send(usize::from(*len), *fill, *cuts, device),
            Step::Buffers { count, len } => {
                for _ in 0..count % 16 {
                    if self.guest.has_room(RX) {
                        let len = u32::from(*len).clamp(HEADER as u32, STEP as u32);
                        let at = RECEIVED + STEP * (self.buffers % 64) as u64;
                        self.guest.offer(RX, &[(at, len, true)]);
                        self.buffers += 1;
                    }
                }
            }
            Step::Receive { len, huge, fill } => {
                let len = usize::from(*len) % if *huge { LONGEST } else { 4096 };
                let frame = vec![*fill; len];
                if self.network.send(&frame) && (SHORTEST..=LONGEST).contains(&len) {
                    self.to_guest.push_back(frame);
                } else if let Network::User(_) = self.network {
                    // Half of it may be on its way.
                    self.is_proper = false;
                }
            }
            Step::Command(bytes) => {
                let Some(queue) = self.commands.filter(|q| self.guest.has_room(*q)) else { return };
                let bytes = &bytes[..bytes.len().min(64)];
                self.guest.memory.guest().write_slice(bytes, GuestAddress(SENT)).unwrap();
                self.guest.memory.guest().write_obj(0xff_u8, GuestAddress(ANSWER)).unwrap();
                let all = [(SENT, bytes.len() as u32, false), (ANSWER, 1, true)];
                let chain: Vec<_> = all.into_iter().filter(|(_, len, _)| *len > 0).collect();
                self.guest.offer(queue, &chain);
                self.guest.serve(device, |_| true);
                if self.is_proper {
                    let answer: u8 = self.guest.memory.guest().read_obj(GuestAddress(ANSWER)).unwrap();
                    assert!(answer <= 1, "no answer");
                }
            }
            Step::Chain(queue, pieces) => {
                self.is_proper = false;
                let queues = self.commands.map_or(2, |commands| commands + 1);
                self.guest.offer_pieces(usize::from(*queue) % queues, pieces);
            }
            Step::Scribble(at, bytes) => {
                self.is_proper = false;
                self.guest.scribble(*at, bytes);
                self.guest.notify(RX);
                self.guest.notify(TX);
            }
            Step::Raw(bytes) => {
                self.is_proper = false;
                self.network.send_raw(bytes);
            }
            Step::Drain if self.is_proper => while self.network.receive().is_some() {},
            Step::Drain => {}
            Step::Close => {
                self.is_proper = false;
                self.network = Network::Closed;
            }
        }
    }

    /// The guest sends a frame in up to three pieces.
    fn send(&mut self, len: usize, fill: u8, cuts: [u16; 2], device: &mut impl Served) {
        if !self.guest.has_room(TX) {
            return;
        }
        if self.is_proper {
            while self.network.receive().is_some() {}
        }
        let len = HEADER + len;
        let memory = self.guest.memory.guest();
        memory.write_slice(&[0; HEADER], GuestAddress(SENT)).unwrap();
        memory.write_slice(&vec![fill; len - HEADER], GuestAddress(SENT + HEADER as u64)).unwrap();
        let mut cuts = cuts.map(|cut| usize::from(cut).min(len));
        cuts.sort_unstable();
        let edges = [0, cuts[0], cuts[1], len];
        let pieces = edges.windows(2).map(|e| (SENT + e[0] as u64, (e[1] - e[0]) as u32, false));
        let chain: Vec<_> = pieces.filter(|(_, len, _)| *len > 0).collect();
        self.guest.offer(TX, &chain);
        self.guest.serve(device, |_| true);
        if self.is_proper {
            assert!(self.guest.is_idle(TX), "a frame is not given back");
            let expected = (SHORTEST..=LONGEST).contains(&(len - HEADER)).then(|| vec![fill; len - HEADER]);
            assert!(self.network.receive() == expected, "the network finds another frame");
        }
    }

    /// Each frame that came to the guest is the next that was sent to it.
    fn check_received(&mut self) {
        if !self.is_proper || !self.mergeable {
            return;
        }
        assert!(!self.guest.interrupt.is_reset_needed(), "a driver that did nothing wrong");
        while let Some((head, len)) = self.guest.used(RX) {
            let (at, _) = self.guest.descriptor(RX, head);
            let count: u16 = self.guest.memory.guest().read_obj(GuestAddress(at + 10)).unwrap();
            let mut frame = self.bytes(at, len);
            for _ in 1..count {
                let (head, len) = self.guest.used(RX).expect("fewer buffers than the header says");
                let (at, _) = self.guest.descriptor(RX, head);
                frame.extend(self.bytes(at, len));
            }
            let expected = self.to_guest.pop_front().expect("a frame that nobody sent");
            assert!(frame[HEADER..] == expected, "the guest finds another frame");
        }
    }

    fn bytes(&self, at: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.guest.memory.guest().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}
