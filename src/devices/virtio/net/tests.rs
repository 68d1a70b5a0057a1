//! A card with a driver on one side and the test on the other.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::testing::{Driver, Rig};
use super::super::{F_VERSION_1, Segment};
use super::backend::{HEADER, MAX_FRAME, Room, Sent};
use super::*;
use crate::metrics::Counter;
use crate::sys::guest_iovec::GuestIovecs;

/// A tap of the test's: a datagram for each frame, with its header.
struct FakeTap {
    socket: UnixDatagram,
    pieces: GuestIovecs,
    accepted: Arc<Mutex<Vec<u64>>>,
    error: Arc<AtomicU64>,
    /// An event loop refuses it.
    file: std::fs::File,
    unwaitable: Arc<AtomicBool>,
    switched: Arc<Mutex<Vec<bool>>>,
}

impl AsFd for FakeTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        if self.unwaitable.load(Ordering::SeqCst) { self.file.as_fd() } else { self.socket.as_fd() }
    }
}

impl FakeTap {
    fn fail(&self) -> std::io::Result<()> {
        match self.error.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(std::io::Error::from_raw_os_error(errno as i32)),
        }
    }
}

impl Backend for FakeTap {
    fn features(&self) -> u64 {
        F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_MRG_RXBUF
    }
    fn mtu(&self) -> Option<u16> {
        None
    }
    fn set_features(&mut self, features: u64) -> std::io::Result<()> {
        self.fail()?;
        self.accepted.lock().unwrap().push(features);
        Ok(())
    }
    fn switch(&mut self, on: bool) -> std::io::Result<()> {
        self.switched.lock().unwrap().push(on);
        Ok(())
    }
    fn send(&mut self, memory: &GuestMemoryMmap, frame: &[Segment]) -> std::io::Result<Sent> {
        self.fail()?;
        let pieces = frame.iter().map(|s| (s.address, s.len));
        match self.pieces.write(self.socket.as_fd(), &[], memory, pieces) {
            Ok(_) => Ok(Sent::Done),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(Sent::Wait),
            Err(e) => Err(e),
        }
    }
    fn receive(&mut self, room: &mut Room<'_>) -> std::io::Result<usize> {
        self.fail()?;
        let pieces = room.segments.iter().take(room.count).map(|s| (s.address, s.len));
        self.pieces.read(self.socket.as_fd(), room.memory, pieces, room.spill)
    }
}

/// A card, its driver, and the network's side.
struct Setup {
    driver: Driver,
    network: UnixDatagram,
    counters: NetCounters,
    accepted: Arc<Mutex<Vec<u64>>>,
    error: Arc<AtomicU64>,
    unwaitable: Arc<AtomicBool>,
}

fn setup(features: u64) -> Setup {
    setup_with(features, None)
}

/// A tap, and the network's side of it.
fn fake_tap() -> (FakeTap, UnixDatagram) {
    let (ours, network) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    network.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let tap = FakeTap {
        socket: ours,
        pieces: GuestIovecs::default(),
        accepted: Arc::default(),
        error: Arc::default(),
        file: std::fs::File::open("/proc/self/exe").unwrap(),
        unwaitable: Arc::default(),
        switched: Arc::default(),
    };
    (tap, network)
}

fn setup_with(features: u64, iops: Option<u64>) -> Setup {
    let (tap, network) = fake_tap();
    let (accepted, error, unwaitable) = (tap.accepted.clone(), tap.error.clone(), tap.unwaitable.clone());
    let net = card(Box::new(tap), iops);
    let counters = net.counters.clone();
    let driver = Driver::start_with(Box::new(net), &[16, 16], features);
    Setup { driver, network, counters, accepted, error, unwaitable }
}

fn card(backend: Box<dyn Backend>, iops: Option<u64>) -> Net {
    card_of(vec![backend], iops)
}

/// The name of this test's cards and their threads: no other test has it, so that one test's work is not another's spin.
fn id() -> String {
    format!("net{}", rustix::thread::gettid().as_raw_nonzero())
}

fn card_of(backends: Vec<Box<dyn Backend>>, iops: Option<u64>) -> Net {
    let (id, mac) = (id(), Mac([2, 0, 0, 0, 0, 1]));
    let parts = NetParts { id, mac, backends, name: "test".into(), iops, bandwidth: None };
    Net::new(parts, &Registry::default()).unwrap()
}

/// A frame of `len` bytes with its header.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend((0..len).map(|i| i as u8));
    frame
}

fn wait_for(counter: &Counter, value: u64) {
    let begin = std::time::Instant::now();
    while counter.get() != value {
        assert!(begin.elapsed() < Duration::from_secs(10), "{counter:?} is not {value}");
        std::thread::yield_now();
    }
}

/// The processor time of one of this process' threads, in clock ticks.
fn ticks(thread: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    let fields: Vec<_> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum()
}

/// No thread of this test's cards uses the processor: none of them spins.
fn assert_idle() {
    let id = id();
    let threads: Vec<String> = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|t| {
            let name = std::fs::read_to_string(format!("/proc/self/task/{t}/comm")).unwrap_or_default();
            // A pair's thread is called ID-qN.
            name.trim().split('-').next() == Some(&id)
        })
        .collect();
    assert!(!threads.is_empty(), "no thread is called {id}");
    let before: Vec<_> = threads.iter().map(|t| ticks(t)).collect();
    std::thread::sleep(Duration::from_millis(300));
    for (thread, before) in threads.iter().zip(before) {
        // 30 ticks would be all of the time.
        assert!(ticks(thread).saturating_sub(before) < 15, "a thread spins");
    }
}

#[test]
fn a_frame_goes_out_wherever_its_descriptors_divide_it() {
    let mut s = setup(u64::MAX);
    let bytes = frame(100);
    for cut in [1, 5, HEADER, HEADER + 3] {
        let (a, b) = (s.driver.filled(&bytes[..cut]), s.driver.filled(&bytes[cut..]));
        s.driver.offer(1, &[a, b], &[]);
        assert_eq!(s.driver.wait_used(1).1, 0);
        let mut got = [0; 256];
        let n = s.network.recv(&mut got).unwrap();
        assert_eq!(&got[..n], bytes);
    }
    assert_eq!(s.counters.tx_bytes.get(), 400);
}

#[test]
fn frames_that_are_too_short_or_too_long_are_given_back() {
    let mut s = setup(u64::MAX);
    for len in [1, HEADER, HEADER + 13, MAX_FRAME + 1, 1 << 20] {
        let buffer = s.driver.buffer(len as u32);
        s.driver.offer(1, &[buffer], &[]);
        assert_eq!(s.driver.wait_used(1).1, 0);
    }
    s.driver.offer(1, &[], &[(0x40_0000, 64)]);
    s.driver.wait_used(1);
    wait_for(&s.counters.tx_dropped, 6);
    s.network.send(&[0; HEADER + 3]).unwrap();
    wait_for(&s.counters.rx_packets, 0);
}

#[test]
fn a_received_frame_says_how_many_buffers_it_has() {
    let mut s = setup(u64::MAX);
    let buffers: Vec<_> = (0..8).map(|_| s.driver.buffer(64)).collect();
    for buffer in &buffers {
        s.driver.post(0, &[], &[*buffer]);
    }
    s.driver.notify(0);
    s.network.send(&frame(100)).unwrap();
    assert_eq!(s.driver.wait_used(0).1, 64);
    assert_eq!(s.driver.wait_used(0).1, 48);
    let first = s.driver.bytes(buffers[0]);
    assert_eq!(first[10..12], [2, 0]);
    assert_eq!([&first[HEADER..], &s.driver.bytes(buffers[1])[..48]].concat(), frame(100)[HEADER..]);
}

#[test]
fn the_header_may_be_split_over_descriptors() {
    let mut s = setup(F_MRG_RXBUF);
    let parts = [11, 1, 300].map(|len| s.driver.buffer(len));
    s.driver.offer(0, &[], &parts);
    s.network.send(&frame(60)).unwrap();
    assert_eq!(s.driver.wait_used(0).1, 72);
    assert_eq!((s.driver.bytes(parts[0])[10], s.driver.bytes(parts[1])[0]), (1, 0));
    assert_eq!(s.driver.bytes(parts[2])[..60], frame(60)[HEADER..]);
}

#[test]
fn a_frame_waits_for_the_rest_of_its_buffers() {
    let mut s = setup(u64::MAX);
    let a = s.driver.buffer(64);
    s.driver.offer(0, &[], &[a]);
    s.network.send(&frame(100)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(s.driver.try_used(0), None);
    assert_idle();
    let b = s.driver.buffer(64);
    s.driver.offer(0, &[], &[b]);
    assert_eq!((s.driver.wait_used(0).1, s.driver.wait_used(0).1), (64, 48));
    assert_eq!(s.driver.bytes(b)[..48], frame(100)[64..]);
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let mut s = setup(0);
    let buffer = s.driver.buffer(128);
    s.driver.offer(0, &[], &[buffer]);
    s.network.send(&frame(200)).unwrap();
    wait_for(&s.counters.rx_dropped, 1);
    s.network.send(&frame(13)).unwrap();
    wait_for(&s.counters.rx_dropped, 2);
    s.network.send(&frame(60)).unwrap();
    assert_eq!(s.driver.wait_used(0).1, 72);
    assert_eq!(s.driver.bytes(buffer)[10..12], [1, 0]);
}

/// As many pieces as can be held at once are too small for a frame: it is dropped, and the next one is received though the
/// driver has nothing more to say.
#[test]
fn a_frame_that_never_fits_is_dropped_and_holds_nothing_up() {
    const PIECES: u16 = 256;
    let (tap, network) = fake_tap();
    let net = card(Box::new(tap), None);
    let counters = net.counters.clone();
    let mut driver = Driver::start(Box::new(net), &[PIECES, 16]);
    for head in 0..2 {
        let (room, table) = (driver.buffer(16 * u32::from(PIECES)), driver.buffer(16 * u32::from(PIECES)));
        for index in 0..PIECES {
            // Flags and the next one's index behind address and length.
            let flags = if index + 1 < PIECES { 3_u64 } else { 2 };
            let piece = [room.0 + 16 * u64::from(index), 16 | flags << 32 | u64::from(index + 1) << 48];
            let at = GuestAddress(table.0 + 16 * u64::from(index));
            driver.memory.guest().write_obj(piece, at).unwrap();
        }
        driver.descriptor(0, head, table, 4, 0);
        driver.make_available(0, head);
    }
    driver.notify(0);
    network.send(&frame(10_000)).unwrap();
    network.send(&frame(60)).unwrap();
    assert_eq!(driver.wait_used(0), (0, 72));
    assert_eq!((counters.rx_dropped.get(), counters.rx_packets.get()), (1, 1));
}

#[test]
fn a_full_ring_that_is_filled_again_resumes() {
    let mut s = setup(u64::MAX);
    for round in 0..50 {
        // More frames than buffers: those left wait on the host, and nobody spins.
        for _ in 0..3 {
            s.network.send(&frame(60)).unwrap();
        }
        if round == 0 {
            std::thread::sleep(Duration::from_millis(20));
            assert_idle();
        }
        for _ in 0..3 {
            let buffer = (0x40_0000, 128);
            s.driver.offer(0, &[], &[buffer]);
            assert_eq!(s.driver.wait_used(0).1, 72, "round {round}");
        }
    }
}

#[test]
fn a_backend_without_room_is_waited_for() {
    let mut s = setup(u64::MAX);
    let bytes = frame(1000);
    let buffer = s.driver.filled(&bytes);
    let mut sent = 0;
    // Until the socket is full, and 16 more.
    for _ in 0..2000 {
        s.driver.offer(1, &[buffer], &[]);
        sent += 1;
        let begin = std::time::Instant::now();
        let mut done = false;
        while !done && begin.elapsed() < Duration::from_millis(500) {
            done = s.driver.try_used(1).is_some();
        }
        if !done {
            break;
        }
    }
    assert!(sent < 2000, "the socket is never full");
    assert_idle();
    let mut got = [0; 2000];
    for _ in 0..sent {
        assert_eq!(s.network.recv(&mut got).unwrap(), bytes.len());
    }
    s.driver.wait_used(1);
}

#[test]
fn errors_of_one_frame_are_counted_and_no_end() {
    let mut s = setup(u64::MAX);
    let buffer = s.driver.filled(&frame(60));
    for (n, errno) in [libc::EIO, libc::ENOBUFS, libc::EINVAL, libc::ENOMEM].into_iter().enumerate() {
        s.error.store(errno as u64, Ordering::SeqCst);
        s.driver.offer(1, &[buffer], &[]);
        s.driver.wait_used(1);
        wait_for(&s.counters.tx_errors, n as u64 + 1);
    }
    s.error.store(0, Ordering::SeqCst);
    s.driver.offer(1, &[buffer], &[]);
    s.driver.wait_used(1);
    assert_eq!(s.counters.tx_packets.get(), 1);
}

/// An error that comes back at once is no reason to spin either.
#[test]
fn errors_of_receiving_are_tried_again_and_no_end() {
    for errno in [libc::EIO, libc::EINVAL, libc::ENOMEM, libc::EFAULT] {
        let mut s = setup(u64::MAX);
        s.error.store(errno as u64, Ordering::SeqCst);
        let room = s.driver.buffer(2000);
        s.driver.offer(0, &[], &[room]);
        s.network.send(&frame(60)).unwrap();
        s.driver.wait("it gives up", |_| (s.counters.rx_errors.get() >= 3).then_some(()));
        assert_idle();
        s.error.store(0, Ordering::SeqCst);
        assert_eq!(s.driver.wait_used(0).1, 72, "{errno}");
        assert_eq!(link(&mut s.driver), 1);
        assert_receives(&mut s);
    }
}

/// The link's state in the configuration space, at 0x100 + 6.
fn link(driver: &mut Driver) -> u32 {
    driver.read(0x104) >> 16
}

#[test]
fn a_tap_that_vanishes_takes_the_link_down() {
    for by_sending in [true, false] {
        let mut s = setup(u64::MAX);
        assert_eq!(link(&mut s.driver), 1);
        s.error.store(libc::EBADFD as u64, Ordering::SeqCst);
        let buffer = s.driver.filled(&frame(60));
        if by_sending {
            s.driver.offer(1, &[buffer], &[]);
            s.driver.wait_used(1);
        } else {
            s.driver.offer(0, &[], &[(0x80_0000, 2000)]);
            // Not where the card has found out by the offer.
            let _ = s.network.send(&frame(60));
        }
        s.driver.wait("the link stays up", |d| (link(d) == 0).then_some(()));
        // It is raised right behind the change.
        s.driver.wait("no configuration interrupt", |d| (d.read(0x60) & 2 == 2).then_some(()));
        // What is sent goes nowhere, and comes back.
        s.driver.offer(1, &[buffer], &[]);
        s.driver.wait_used(1);
        assert_idle();
        s.driver.write(0x70, 0);
        assert_eq!(s.driver.read(0x70), 0);
    }
}

#[test]
fn offloads_are_those_accepted_and_end_with_a_reset() {
    let mut s = setup(F_GUEST_CSUM | F_MRG_RXBUF);
    s.driver.write(0x70, 0);
    let accepted = s.accepted.lock().unwrap().clone();
    assert_eq!(accepted, [F_GUEST_CSUM | F_MRG_RXBUF | F_VERSION_1, 0]);
}

#[test]
fn a_reset_while_frames_come_and_a_new_driver() {
    let mut s = setup(u64::MAX);
    s.driver.post(0, &[], &[(0x80_0000, 2000)]);
    s.driver.post(0, &[], &[(0x80_1000, 2000)]);
    s.driver.notify(0);
    s.network.send(&frame(60)).unwrap();
    s.driver.wait_used(0);
    s.driver.write(0x70, 0);
    s.network.send(&frame(60)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(s.driver.try_used(0), None, "a frame came into the old ring");
}

/// Sets queues up again, and starts; says which status the device has then.
fn start_again(driver: &mut Driver) -> u32 {
    driver.negotiate(u64::MAX);
    driver.restart_queues(&[16, 16]);
    driver.write(0x70, 15);
    driver.read(0x70)
}

#[track_caller]
fn assert_receives(s: &mut Setup) {
    let buffer = s.driver.buffer(2000);
    s.driver.offer(0, &[], &[buffer]);
    s.network.send(&frame(60)).unwrap();
    assert_eq!(s.driver.wait_used(0).1, 72);
}

#[test]
fn a_card_whose_thread_cannot_start_keeps_its_tap() {
    let mut s = setup(u64::MAX);
    s.unwaitable.store(true, Ordering::SeqCst);
    s.driver.write(0x70, 0);
    assert_eq!(start_again(&mut s.driver) & 64, 64, "the device started");
    s.unwaitable.store(false, Ordering::SeqCst);
    assert_eq!(start_again(&mut s.driver), 15);
    assert_receives(&mut s);
}

#[test]
fn a_tap_that_refuses_offloads_is_kept_and_one_that_is_gone_is_no_link() {
    let mut s = setup(u64::MAX);
    s.driver.write(0x70, 0);
    s.error.store(libc::EINVAL as u64, Ordering::SeqCst);
    assert_eq!(start_again(&mut s.driver) & 64, 64, "the device started");
    s.error.store(0, Ordering::SeqCst);
    assert_eq!(start_again(&mut s.driver), 15);
    assert_receives(&mut s);
    s.driver.write(0x70, 0);
    s.error.store(libc::EBADFD as u64, Ordering::SeqCst);
    assert_eq!(start_again(&mut s.driver), 15);
    assert_eq!(link(&mut s.driver), 0);
}

#[test]
fn a_hostile_driver_stops_its_own_card_alone() {
    // Buffers without room for a header, and buffers to read in the receive queue.
    for (readable, writable) in
        [(vec![], vec![(0x40_0000, 11)]), (vec![(0x40_0000, 64)], vec![(0x41_0000, 64)])]
    {
        let mut s = setup(u64::MAX);
        s.driver.offer(0, &readable, &writable);
        s.driver.wait_needs_reset();
        s.network.send(&frame(60)).unwrap();
        assert_idle();
    }
    // A loop, and an address outside of memory.
    for (buffer, flags, next) in [((0x40_0000, 64), 1, 0), ((0xffff_ffff_ffff_f000, 0x2000), 0, 0)] {
        let mut s = setup(u64::MAX);
        s.driver.descriptor(1, 0, buffer, flags, next);
        s.driver.make_available(1, 0);
        s.driver.notify(1);
        s.driver.wait_needs_reset();
        s.driver.write(0x70, 0);
        assert_eq!(s.driver.read(0x70), 0);
    }
}

#[test]
fn the_configuration_space_ends() {
    let mut s = setup(u64::MAX);
    assert_eq!(s.driver.read(0x100), u32::from_le_bytes([2, 0, 0, 0]));
    assert_eq!(s.driver.read(0x104), u32::from_le_bytes([0, 1, 1, 0]));
    assert_eq!(s.driver.read(0x10c), 0);
    s.driver.write(0x100, 0xffff_ffff);
    assert_eq!(s.driver.read(0x100), 2);
}

fn user() -> (Driver, UnixStream) {
    let (ours, passt) = UnixStream::pair().unwrap();
    passt.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let backend = Passt::over(ours).unwrap();
    (Driver::start(Box::new(card(Box::new(backend), None)), &[16, 16]), passt)
}

#[test]
fn user_mode_frames_have_their_length_in_front() {
    let (mut driver, mut passt) = user();
    let buffer = driver.filled(&frame(60));
    driver.offer(1, &[buffer], &[]);
    let mut got = [0; 64];
    passt.read_exact(&mut got).unwrap();
    assert_eq!(got[..4], 60u32.to_be_bytes());
    assert_eq!(got[4..], frame(60)[HEADER..]);
    let room = driver.buffer(2000);
    driver.offer(0, &[], &[room]);
    driver.offer(0, &[], &[room]);
    // Byte by byte.
    for byte in got {
        passt.write_all(&[byte]).unwrap();
    }
    assert_eq!(driver.wait_used(0).1, 72);
    assert_eq!(driver.bytes(room)[HEADER..72], frame(60)[HEADER..]);
    assert_eq!(driver.bytes(room)[10..12], [1, 0]);
}

#[test]
fn user_mode_waits_for_a_slow_passt() {
    let (mut driver, mut passt) = user();
    let buffer = driver.filled(&frame(60000));
    for _ in 0..16 {
        driver.post(1, &[buffer], &[]);
    }
    driver.notify(1);
    std::thread::sleep(Duration::from_millis(50));
    assert_idle();
    for _ in 0..16 {
        let mut got = vec![0; 60004];
        passt.read_exact(&mut got).unwrap();
        assert_eq!(got[..4], 60000u32.to_be_bytes());
        assert!(got[4..] == frame(60000)[HEADER..]);
    }
    for _ in 0..16 {
        driver.wait_used(1);
    }
}

#[test]
fn a_passt_that_ends_takes_the_link_down() {
    for last_words in [&[][..], &[0xff; 8], &[0, 0, 0, 60, 1]] {
        let (mut driver, mut passt) = user();
        driver.offer(0, &[], &[(0x80_0000, 2000)]);
        passt.write_all(last_words).unwrap();
        drop(passt);
        driver.wait("the link stays up", |d| (link(d) == 0).then_some(()));
        assert_idle();
    }
}

#[test]
fn a_rate_limit_holds_in_both_directions_without_spinning() {
    let mut s = setup_with(u64::MAX, Some(20));
    let begin = std::time::Instant::now();
    let (out, room) = (s.driver.filled(&frame(60)), s.driver.buffer(2000));
    for _ in 0..12 {
        s.driver.post(1, &[out], &[]);
        s.driver.post(0, &[], &[room]);
    }
    s.driver.notify(1);
    s.driver.notify(0);
    for _ in 0..9 {
        s.network.send(&frame(60)).unwrap();
    }
    assert_idle();
    for _ in 0..12 {
        s.driver.wait_used(1);
    }
    for _ in 0..9 {
        assert_eq!(s.driver.wait_used(0).1, 72);
    }
    // A tenth of a second's worth, two, goes through at once.
    assert!(begin.elapsed() >= Duration::from_millis(490), "{:?}", begin.elapsed());
    assert!(s.counters.throttled.get() > 5);
}

#[test]
fn a_reset_does_not_end_a_rate_limit() {
    // One frame in two seconds: the bucket's first one passes at once.
    let mut s = setup_with(u64::MAX, Some(1));
    let buffer = s.driver.filled(&frame(60));
    s.driver.offer(1, &[buffer], &[]);
    s.driver.wait_used(1);
    for _ in 0..5 {
        s.driver.write(0x70, 0);
        assert_eq!(start_again(&mut s.driver), 15);
        s.driver.offer(1, &[buffer], &[]);
    }
    assert_eq!(s.counters.tx_packets.get(), 1);
    // And it ends by itself, though it began with another driver.
    s.driver.wait_used(1);
    assert_eq!(s.counters.tx_packets.get(), 2);
}

#[test]
fn the_control_socket_shows_address_and_link() {
    let net = card(Box::new(Passt::over(UnixStream::pair().unwrap().0).unwrap()), None);
    let control = net.control();
    assert_eq!((control.id(), control.kind()), (id().as_str(), "net"));
    let state = control.describe();
    assert_eq!((&state["mac"], &state["link"]), (&"02:00:00:00:00:01".into(), &"up".into()));
}

/// A card of two pairs of queues, its driver, the network's sides, and what the second tap was told.
struct Pairs {
    driver: Driver,
    networks: [UnixDatagram; 2],
    counters: NetCounters,
    switched: Arc<Mutex<Vec<bool>>>,
}

/// The queue for commands behind two pairs.
const COMMANDS: usize = 4;

fn pairs(queues: usize, features: u64, iops: Option<u64>) -> Pairs {
    let ((first, network), (second, other_network)) = (fake_tap(), fake_tap());
    let switched = second.switched.clone();
    let net = card_of(vec![Box::new(first), Box::new(second)], iops);
    let counters = net.counters.clone();
    let driver = Driver::start_with(Box::new(net), &vec![16; queues], features);
    Pairs { driver, networks: [network, other_network], counters, switched }
}

impl Pairs {
    /// Gives a command, and returns the answer.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        let (command, answer) = (self.driver.filled(bytes), self.driver.buffer(1));
        self.driver.offer(queue, &[command], &[answer]);
        assert_eq!(self.driver.wait_used(queue).1, 1);
        self.driver.bytes(answer)[0]
    }
}

/// For tests of all kinds of devices: two pairs, of which the second is off, and the queue for commands.
pub fn rig() -> Rig {
    let Pairs { driver, networks: [network, other], .. } = pairs(5, u64::MAX, None);
    network.set_nonblocking(true).unwrap();
    let stirring = network.try_clone().unwrap();
    Rig {
        name: "net",
        driver,
        sizes: vec![16; 5],
        queues: vec![0, 1, 3, COMMANDS],
        stir: Box::new(move || {
            // Where nobody reads, the socket is full one day.
            let _ = (stirring.send(&frame(60)), &other);
        }),
        offer: Box::new(|driver| {
            let (room, out) = (driver.buffer(2000), driver.filled(&frame(60)));
            let (command, answer) = (driver.filled(&[4, 0, 1, 0]), driver.buffer(1));
            driver.post(0, &[], &[room]);
            driver.post(1, &[out], &[]);
            driver.post(COMMANDS, &[command], &[answer]);
        }),
        works: Box::new(move |driver| {
            let (room, out) = (driver.buffer(2000), driver.filled(&frame(100)));
            // What was sent before.
            while network.recv(&mut [0; 256]).is_ok() {}
            driver.offer(1, &[out], &[]);
            assert_eq!(driver.wait_used(1), (0, 0));
            assert_eq!(network.recv(&mut [0; 256]).unwrap(), HEADER + 100);
            let _ = network.send(&frame(60));
            driver.offer(0, &[], &[room]);
            assert_eq!(driver.wait_used(0), (0, 72));
        }),
    }
}

#[test]
fn a_pair_is_off_until_the_driver_says_so() {
    let mut p = pairs(5, u64::MAX, None);
    assert_eq!(p.driver.read(0x108) & 0xffff, 2, "the number of pairs");
    for _ in 0..4 {
        p.driver.post(2, &[], &[(0x80_0000, 2000)]);
    }
    p.driver.notify(2);
    p.networks[1].send(&frame(60)).unwrap();
    let buffer = p.driver.filled(&frame(60));
    p.driver.offer(3, &[buffer], &[]);
    p.driver.wait_used(3);
    assert_eq!((p.driver.try_used(2), p.counters.tx_dropped.get()), (None, 1));
    assert_idle();

    assert_eq!(p.command(COMMANDS, &[4, 0, 2, 0]), 0);
    // On at once for what is sent, and soon for what is received.
    p.driver.offer(3, &[buffer], &[]);
    p.driver.wait_used(3);
    assert_eq!(p.networks[1].recv(&mut [0; 256]).unwrap(), HEADER + 60);
    assert_eq!(p.driver.wait_used(2).1, 72);

    assert_eq!(p.command(COMMANDS, &[4, 0, 1, 0]), 0);
    p.networks[1].send(&frame(60)).unwrap();
    assert_idle();
    assert_eq!(p.driver.try_used(2), None, "a frame came to a pair that is off");
    p.driver.offer(0, &[], &[(0x80_0000, 2000)]);
    p.networks[0].send(&frame(60)).unwrap();
    assert_eq!(p.driver.wait_used(0).1, 72);
    assert_eq!(*p.switched.lock().unwrap(), [true, false]);
}

#[test]
fn a_reset_turns_pairs_off() {
    let mut p = pairs(5, u64::MAX, None);
    for _ in 0..2 {
        assert_eq!(p.command(COMMANDS, &[4, 0, 2, 0]), 0);
        p.driver.offer(2, &[], &[(0x80_0000, 2000)]);
        p.networks[1].send(&frame(60)).unwrap();
        p.driver.wait_used(2);
        p.driver.restart(&[16; 5]);
    }
    assert_eq!(*p.switched.lock().unwrap(), [true, false, true, false]);
}

#[test]
fn commands_that_are_none_are_refused() {
    let mut p = pairs(5, u64::MAX, None);
    let commands: [&[u8]; 10] = [
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 0xff, 0xff],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &[4],
        &[4, 1, 2, 0],
        &[0, 0, 1, 0],
        &[1, 1, 2, 0, 0, 0, 0, 1],
        &[0xff; 300],
    ];
    for command in commands {
        assert_eq!(p.command(COMMANDS, command), 1, "{command:?}");
    }
    // No room for an answer, and nothing but room.
    let command = p.driver.filled(&[4, 0, 2, 0]);
    p.driver.offer(COMMANDS, &[command], &[]);
    assert_eq!(p.driver.wait_used(COMMANDS).1, 0);
    let answer = p.driver.buffer(100);
    p.driver.offer(COMMANDS, &[], &[answer]);
    assert_eq!((p.driver.wait_used(COMMANDS).1, p.driver.bytes(answer)[0]), (1, 1));
    assert!(p.switched.lock().unwrap().is_empty());
    // Wherever descriptors divide it.
    let (a, b) = (p.driver.filled(&[4]), p.driver.filled(&[0, 2, 0]));
    p.driver.offer(COMMANDS, &[a, b], &[answer]);
    assert_eq!((p.driver.wait_used(COMMANDS).1, p.driver.bytes(answer)[0]), (1, 0));
}

/// The queue for commands stands behind the pairs that the driver knows of.
#[test]
fn without_pairs_commands_come_third() {
    let mut p = pairs(3, F_CTRL_VQ, None);
    assert_eq!(p.command(2, &[4, 0, 2, 0]), 1);
    assert_eq!(p.command(2, &[4, 0, 1, 0]), 0);
    // And without such a queue, or with pairs that were not set up, the card works.
    drop(pairs(2, 0, None));
    drop(pairs(2, u64::MAX, None));
}

#[test]
fn pairs_share_the_limit_of_the_card() {
    let mut p = pairs(5, u64::MAX, Some(1));
    assert_eq!(p.command(COMMANDS, &[4, 0, 2, 0]), 0);
    let buffer = p.driver.filled(&frame(60));
    p.driver.offer(1, &[buffer], &[]);
    p.driver.wait_used(1);
    p.driver.offer(3, &[buffer], &[]);
    p.driver.wait("nobody waits for the limit", |_| (p.counters.throttled.get() > 0).then_some(()));
    assert_eq!(p.counters.tx_packets.get(), 1);
    p.driver.wait_used(3);
}

/// The threads of two pairs raise one interrupt, as their driver, which sleeps between, takes frames from both and sends by
/// both: none is lost, and no notification either.
#[test]
fn pairs_that_share_an_interrupt_lose_none() {
    const FRAMES: usize = 20_000;
    const WINDOW: usize = 8;
    let mut p = pairs(5, u64::MAX, None);
    assert_eq!(p.command(COMMANDS, &[4, 0, 2, 0]), 0);
    let (out, rooms) = (p.driver.filled(&frame(60)), [0, 1].map(|_| p.driver.buffer(2000)));
    let receive = |network: &UnixDatagram| (0..FRAMES).for_each(|_| _ = network.recv(&mut [0; 256]).unwrap());
    let send = |network: &UnixDatagram| (0..FRAMES).for_each(|_| _ = network.send(&frame(60)).unwrap());
    std::thread::scope(|scope| {
        for network in &p.networks {
            // Where a driver's test has ended, its network's does.
            network.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
            scope.spawn(move || receive(network));
            scope.spawn(move || send(network));
        }
        // By queue, received and sent in turn.
        let (mut left, mut under_way) = ([FRAMES; 4], [0; 4]);
        while left != [0; 4] {
            let mut is_idle = true;
            for queue in 0..4 {
                while p.driver.try_used(queue).is_some() {
                    (left[queue], under_way[queue], is_idle) = (left[queue] - 1, under_way[queue] - 1, false);
                }
                while under_way[queue] < WINDOW.min(left[queue]) {
                    let room = &[rooms[queue / 2]][..];
                    let (readable, writable) =
                        if queue % 2 == 0 { (&[][..], room) } else { (&[out][..], &[][..]) };
                    p.driver.post(queue, readable, writable);
                    p.driver.notify_where_asked(queue);
                    under_way[queue] += 1;
                }
            }
            if is_idle && left != [0; 4] {
                p.driver.wait_interrupt();
            }
        }
    });
    assert_eq!(p.counters.rx_packets.get(), 2 * FRAMES as u64);
    assert_eq!(p.counters.tx_packets.get(), 2 * FRAMES as u64);
}
