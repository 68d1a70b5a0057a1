//! The device with a driver that the test plays, and real Unix sockets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::super::testing::{Buffer, Driver, Rig};
use super::credit::BUF_ALLOC;
use super::muxer::FIRST_STREAM;
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;

const CID: u32 = 7;
const RX_BUFFERS: usize = 64;
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A guest: its driver, and what it knows of its connections.
struct Guest {
    driver: Driver,
    _file: SocketFile,
    dir: TempDir,
    counters: Arc<VsockCounters>,
    rx: HashMap<u16, Buffer>,
    tx: Buffer,
    /// Bytes received, by (host port, guest port).
    forwarded: HashMap<(u32, u32), u32>,
    buf_alloc: u32,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.give_buffers();
        guest
    }

    fn without_buffers() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (device, file) = Vsock::open(CID, &dir.path().join("v"), &Registry::default()).unwrap();
        let counters = device.counters();
        let mut driver = Driver::start(Box::new(device), &QUEUE_SIZES);
        let tx = driver.buffer(HEADER_LEN as u32 + BUF_ALLOC + 4096);
        let (rx, forwarded) = (HashMap::new(), HashMap::new());
        Self { driver, _file: file, dir, counters, rx, tx, forwarded, buf_alloc: 1 << 18 }
    }

    fn give_buffers(&mut self) {
        for _ in 0..RX_BUFFERS {
            let buffer = self.driver.buffer(4096);
            let head = self.driver.post(0, &[], &[buffer]);
            self.rx.insert(head, buffer);
        }
        self.driver.notify(0);
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// A host program that has sent its line.
    fn client(&self, port: u32) -> UnixStream {
        client(&self.path(), port)
    }

    fn header(&self, (host, guest): (u32, u32), op: Op) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.get(&(host, guest)).copied().unwrap_or(0),
            ..Header::default()
        }
    }

    fn send(&mut self, ports: (u32, u32), op: Op) {
        let header = self.header(ports, op);
        self.send_raw(&header, &[]);
    }

    fn send_data(&mut self, ports: (u32, u32), data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(ports, Op::Data) };
        self.send_raw(&header, data);
    }

    fn shut_down(&mut self, ports: (u32, u32), flags: u32) {
        let header = Header { flags, ..self.header(ports, Op::Shutdown) };
        self.send_raw(&header, &[]);
    }

    /// Sends any header and data in one buffer, and waits until the device gives it back.
    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let memory = self.driver.memory.guest();
        memory.write_slice(&[&header.to_bytes()[..], data].concat(), GuestAddress(self.tx.0)).unwrap();
        self.offer(&[(self.tx.0, (HEADER_LEN + data.len()) as u32)]);
    }

    fn offer(&mut self, buffers: &[Buffer]) {
        let head = self.driver.offer(1, buffers, &[]);
        assert_eq!(self.driver.wait_used(1), (head, 0));
    }

    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.try_receive_with(Driver::notify)
    }

    /// The next packet, whose buffer is offered again.
    fn try_receive_with(&mut self, notify: fn(&mut Driver, usize)) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.driver.try_used(0)?;
        let buffer = self.rx.remove(&head).unwrap();
        let bytes = self.driver.bytes((buffer.0, len));
        let head = self.driver.post(0, &[], &[buffer]);
        notify(&mut self.driver, 0);
        self.rx.insert(head, buffer);
        let header = Header::parse(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        *self.forwarded.entry((header.src_port, header.dst_port)).or_default() += header.len;
        Some((header, bytes[HEADER_LEN..].to_vec()))
    }

    #[track_caller]
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let begin = Instant::now();
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "no packet");
            thread::sleep(Duration::from_micros(50));
        }
    }

    #[track_caller]
    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(Op::new(header.op), Some(op), "{header:?}");
        header
    }

    /// Nothing comes, for as long as a device needs to do something wrong.
    #[track_caller]
    fn expect_silence(&mut self) {
        thread::sleep(Duration::from_millis(50));
        let packet = self.try_receive();
        assert!(packet.is_none(), "{packet:?}");
    }

    /// A connection that a host program asked for and the guest accepted.
    #[track_caller]
    fn accept(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = self.client(port);
        let request = self.expect(Op::Request);
        let ports = (request.src_port, request.dst_port);
        self.send(ports, Op::Response);
        assert_eq!(read_ok(&mut client), request.src_port);
        (client, ports)
    }

    /// A connection that the guest asked for.
    #[track_caller]
    fn connect(&mut self, listener: &UnixListener, ports: (u32, u32)) -> UnixStream {
        self.send(ports, Op::Request);
        self.expect(Op::Response);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// Sends so many packets of 64 bytes that differ, and sleeps whenever it has `window` of them to come back.
    #[track_caller]
    fn converse(&mut self, ports: (u32, u32), packets: usize, window: usize) {
        let bytes = |from: usize, to: usize| (from..to).map(|i| (i * 7 + i / 64) as u8).collect::<Vec<_>>();
        let (mut sent, mut got) = (0, 0);
        while got < 64 * packets {
            let before = (sent, got);
            while self.driver.try_used(1).is_some() {}
            while let Some((_, data)) = self.try_receive_with(Driver::notify_where_asked) {
                assert_eq!(data, bytes(got, got + data.len()));
                got += data.len();
            }
            while sent < packets && sent < got / 64 + window {
                let header = Header { len: 64, ..self.header(ports, Op::Data) };
                let packet = [&header.to_bytes()[..], &bytes(64 * sent, 64 * (sent + 1))].concat();
                // What has come back is not read any more.
                let at = self.tx.0 + 128 * (sent % window) as u64;
                self.driver.memory.guest().write_slice(&packet, GuestAddress(at)).unwrap();
                self.driver.post(1, &[(at, packet.len() as u32)], &[]);
                self.driver.notify_where_asked(1);
                sent += 1;
            }
            if (sent, got) == before {
                self.driver.wait_interrupt();
            }
        }
    }

    /// Serves echoes until `count` connections have ended.
    fn serve_echo(&mut self, count: usize) {
        let mut echoes: HashMap<(u32, u32), Echo> = HashMap::new();
        let mut ended = 0;
        while ended < count {
            let (header, data) = self.receive();
            let ports = (header.src_port, header.dst_port);
            let echo = echoes.entry(ports).or_default();
            echo.fwd_cnt = header.fwd_cnt;
            match Op::new(header.op).unwrap() {
                Op::Request => {
                    *echo = Echo::default();
                    self.forwarded.insert(ports, 0);
                    self.send(ports, Op::Response);
                }
                Op::Data => echo.waiting.extend(data),
                Op::Shutdown => echo.is_ending = true,
                Op::Reset => assert!(echo.is_over, "{header:?}"),
                Op::CreditUpdate => {}
                other => panic!("{other:?}"),
            }
            let data = echo.take();
            let is_over = echo.is_ending && echo.waiting.is_empty() && !echo.is_over;
            echo.is_over |= is_over;
            if !data.is_empty() {
                self.send_data(ports, &data);
            }
            if is_over {
                self.shut_down(ports, BOTH);
                ended += 1;
            }
        }
    }
}

/// For tests of all kinds of devices.
pub fn rig() -> Rig {
    let Guest { driver, _file, dir, .. } = Guest::without_buffers();
    let path = dir.path().join("v");
    let mut last = None;
    // To a port where nobody listens.
    let request = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 80,
        kind: TYPE_STREAM,
        op: Op::Request as u16,
        ..Header::default()
    };
    Rig {
        name: "vsock",
        driver,
        sizes: QUEUE_SIZES.to_vec(),
        // The device has no event to tell, and never looks at the third.
        queues: vec![0, 1],
        stir: Box::new(move || _ = last.replace(client(&path, 5))),
        offer: Box::new(move |driver| {
            let (room, packet) = (driver.buffer(4096), driver.filled(&request.to_bytes()));
            driver.post(0, &[], &[room]);
            driver.post(1, &[packet], &[]);
        }),
        works: Box::new(move |driver| {
            let _keep = (&_file, &dir);
            let packet = driver.filled(&request.to_bytes());
            driver.offer(1, &[packet], &[]);
            assert_eq!(driver.wait_used(1), (0, 0));
            // Programs that wait for the guest may come first.
            loop {
                let room = driver.buffer(4096);
                driver.offer(0, &[], &[room]);
                assert!(driver.wait_used(0).1 >= HEADER_LEN as u32);
                let header = Header::parse(driver.bytes(room)[..HEADER_LEN].try_into().unwrap());
                if (header.src_port, header.dst_port) == (80, 1) {
                    return assert_eq!(header.op, Op::Reset as u16);
                }
            }
        }),
    }
}

/// One connection of a guest that sends back what it gets, as far as it has credit.
#[derive(Default)]
struct Echo {
    waiting: Vec<u8>,
    sent: u32,
    fwd_cnt: u32,
    is_ending: bool,
    is_over: bool,
}

impl Echo {
    /// What may be sent now.
    fn take(&mut self) -> Vec<u8> {
        let room = BUF_ALLOC - (self.sent - self.fwd_cnt);
        let data: Vec<u8> = self.waiting.drain(..self.waiting.len().min(room as usize)).collect();
        self.sent += data.len() as u32;
        data
    }
}

fn client(path: &std::path::Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    stream
}

#[track_caller]
fn read_ok(stream: &mut UnixStream) -> u32 {
    let mut line = Vec::new();
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    std::str::from_utf8(&line).unwrap().strip_prefix("OK ").unwrap().trim_end().parse().unwrap()
}

#[track_caller]
fn is_at_end(stream: &mut UnixStream) {
    let read = stream.read(&mut [0]);
    assert!(matches!(read, Ok(0)) || read.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
}

/// One echo of `len` bytes, with everything compared.
fn echo(path: &std::path::Path, seed: usize, len: usize) {
    let mut stream = client(path, 5);
    read_ok(&mut stream);
    let sent: Vec<u8> = (0..len).map(|i| (i * 7 + seed) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == sent, "{} of {len} bytes", got.len());
}

#[test]
fn the_configuration_is_the_cid() {
    let mut guest = Guest::new();
    assert_eq!((guest.driver.read(0x100), guest.driver.read(0x104), guest.driver.read(0x108)), (CID, 0, 0));
}

#[test]
fn a_host_program_echoes() {
    let mut guest = Guest::new();
    let path = guest.path();
    let host = thread::spawn(move || echo(&path, 1, 300_000));
    guest.serve_echo(1);
    host.join().unwrap();
}

#[test]
fn a_guest_program_echoes() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let mut stream = guest.connect(&listener, (80, 1000));
    guest.send_data((80, 1000), b"hello");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
    assert_eq!(guest.receive().1, b"hello");
    guest.shut_down((80, 1000), BOTH);
    guest.expect(Op::Reset);
    is_at_end(&mut stream);
}

/// A guest that notifies where it was asked to and sleeps until an interrupt, as Linux: a wake-up that gets lost on either
/// side ends the conversation. One packet at a time has every thread go to sleep each time.
#[test]
fn no_wake_up_is_lost_in_a_long_conversation() {
    const PORTS: (u32, u32) = (80, 1000);
    let mut guest = Guest::new();
    let listener = guest.listen(PORTS.0);
    let mut stream = guest.connect(&listener, PORTS);
    let host = thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = stream.read(&mut bytes) {
            stream.write_all(&bytes[..len]).unwrap();
        }
    });
    // What was received before the conversation.
    while guest.try_receive().is_some() {}
    for window in [1, 2, 8, 60] {
        guest.converse(PORTS, 10_000, window);
    }
    guest.send(PORTS, Op::Reset);
    host.join().unwrap();
}

/// A stream's news may come together with a pause.
#[test]
fn echoes_go_on_over_pauses() {
    const PROGRAMS: usize = 4;
    const EACH: usize = 100;
    let mut guest = Guest::new();
    let workers = guest.driver.mmio.workers();
    thread::scope(|scope| {
        for program in 0..PROGRAMS {
            let path = guest.path();
            scope.spawn(move || (0..EACH).for_each(|i| echo(&path, program + i, 3000)));
        }
        scope.spawn(|| {
            for _ in 0..5000 {
                workers.iter().for_each(WorkerControl::ask_to_pause);
                let deadline = Instant::now() + Duration::from_secs(10);
                assert!(workers.iter().all(|w| w.is_paused_by(deadline)));
                workers.iter().for_each(WorkerControl::resume);
                thread::yield_now();
            }
        });
        guest.serve_echo(PROGRAMS * EACH);
    });
}

#[test]
fn a_thousand_one_after_another() {
    let mut guest = Guest::new();
    let path = guest.path();
    let host = thread::spawn(move || (0..1000).for_each(|i| echo(&path, i, 100)));
    guest.serve_echo(1000);
    host.join().unwrap();
    assert_eq!(guest.counters.connections.get(), 1000);
}

#[test]
fn two_hundred_at_once() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..200).map(|_| guest.client(5)).collect();
    let mut ports = Vec::new();
    for _ in 0..200 {
        let request = guest.expect(Op::Request);
        ports.push((request.src_port, request.dst_port));
    }
    ports.iter().for_each(|p| guest.send(*p, Op::Response));
    // None is closed before the end.
    for stream in &mut streams {
        let port = read_ok(stream);
        stream.write_all(&port.to_le_bytes()).unwrap();
        let (header, data) = guest.receive();
        assert_eq!((header.src_port, data), (port, port.to_le_bytes().to_vec()));
    }
}

/// Pitfall 40: the header and its data lie in descriptors as the guest likes.
#[test]
fn a_packet_in_many_pieces_is_one() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let mut stream = guest.connect(&listener, (80, 1));
    let header = Header { len: 7, ..guest.header((80, 1), Op::Data) };
    let bytes = [&header.to_bytes()[..], b"pieces!"].concat();
    let pieces: Vec<_> =
        [&bytes[..10], &bytes[10..43], &bytes[43..46], &bytes[46..]].map(|p| guest.driver.filled(p)).to_vec();
    guest.offer(&pieces);
    let mut got = [0; 7];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"pieces!");
}

/// Pitfall 40, towards the guest.
#[test]
fn a_receive_buffer_in_many_pieces_is_filled() {
    let mut guest = Guest::without_buffers();
    let pieces = [20, 30, 5, 100].map(|len| guest.driver.buffer(len));
    guest.driver.offer(0, &[], &pieces);
    let _client = guest.client(5);
    assert_eq!(guest.driver.wait_used(0).1, HEADER_LEN as u32);
    let bytes: Vec<u8> = pieces.iter().flat_map(|p| guest.driver.bytes(*p)).collect();
    let header = Header::parse(bytes[..HEADER_LEN].try_into().unwrap());
    assert_eq!((header.op, header.dst_port), (Op::Request as u16, 5));
    assert!(bytes[HEADER_LEN..].iter().all(|b| *b == 0xaa), "more was written than was said");
}

/// Pitfall 40: claims more than there is.
#[test]
fn a_header_that_claims_too_much_ends_its_connection() {
    for claimed in [9, 65_536, 65_537, u32::MAX] {
        let mut guest = Guest::new();
        let listener = guest.listen(80);
        let mut stream = guest.connect(&listener, (80, 1));
        let header = Header { len: claimed, ..guest.header((80, 1), Op::Data) };
        guest.send_raw(&header, &[1; 8]);
        guest.expect(Op::Reset);
        is_at_end(&mut stream);
        assert_eq!(guest.counters.dropped.get(), 1);
    }
}

/// Pitfall 12: the length that is checked is the length that is used, also where the guest changes it meanwhile.
#[test]
fn a_header_that_changes_meanwhile_is_good_or_bad() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let packet = guest.driver.buffer(HEADER_LEN as u32 + 8);
    let (memory, over) = (guest.driver.memory.clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            for len in [8u32, 4096, 1 << 30].into_iter().cycle() {
                memory.guest().write_obj(len, GuestAddress(packet.0 + 24)).unwrap();
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let (mut good, mut bad, begin) = (0, 0, Instant::now());
        // On a busy machine the other thread may not run for a while.
        for port in 0.. {
            if port >= 200 && good > 0 && bad > 0 || begin.elapsed() > Duration::from_secs(20) {
                break;
            }
            let mut stream = guest.connect(&listener, (80, port));
            // All but the length, which is the other thread's.
            let header = guest.header((80, port), Op::Data).to_bytes();
            memory.guest().write_slice(&header[..24], GuestAddress(packet.0)).unwrap();
            memory.guest().write_slice(&header[28..], GuestAddress(packet.0 + 28)).unwrap();
            memory.guest().write_slice(&[7; 8], GuestAddress(packet.0 + HEADER_LEN as u64)).unwrap();
            guest.offer(&[packet]);
            guest.send((80, port), Op::Reset);
            let mut got = Vec::new();
            let _ = stream.read_to_end(&mut got);
            assert!(got.is_empty() || got == [7; 8], "{} bytes of 8", got.len());
            if got.is_empty() {
                bad += 1;
            } else {
                good += 1;
            }
            while guest.try_receive().is_some() {}
        }
        over.store(true, Ordering::Relaxed);
        assert!(good > 0 && bad > 0, "{good} good ones, {bad} bad ones");
    });
}

#[test]
fn a_chain_that_is_no_packet_is_given_back() {
    let mut guest = Guest::new();
    for len in [1, 43] {
        let short = guest.driver.buffer(len);
        guest.offer(&[short]);
    }
    let buffer = guest.driver.buffer(100);
    let head = guest.driver.offer(1, &[], &[buffer]);
    assert_eq!(guest.driver.wait_used(1), (head, 0));
    assert_eq!(guest.counters.dropped.get(), 3);
    guest.accept(5);
}

#[test]
fn receive_buffers_without_room_go_back_empty() {
    let mut guest = Guest::without_buffers();
    for len in [1, 44] {
        let buffer = guest.driver.buffer(len);
        guest.driver.offer(0, &[], &[buffer]);
    }
    let _client = guest.client(5);
    assert_eq!(guest.driver.wait_used(0).1, 0);
    assert_eq!(guest.driver.wait_used(0).1, 0);
    guest.give_buffers();
    guest.expect(Op::Request);
}

#[test]
fn unknown_operations_types_and_addresses_are_reset() {
    let mut guest = Guest::new();
    let good = guest.header((80, 1), Op::Data);
    for bad in [
        Header { op: 0, ..good },
        Header { op: 99, ..good },
        Header { kind: 2, ..good },
        Header { kind: 0, op: Op::Request as u16, ..good },
        good,
        guest.header((80, 1), Op::CreditRequest),
        guest.header((80, 1), Op::Shutdown),
        // Nobody listens.
        guest.header((80, 1), Op::Request),
    ] {
        guest.send_raw(&bad, &[]);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port, reset.kind), (80, 1, bad.kind));
    }
}

#[test]
fn a_foreign_cid_gets_no_answer_and_a_wrong_destination_a_reset() {
    let mut guest = Guest::new();
    let good = guest.header((80, 1), Op::Request);
    guest.send_raw(&Header { src_cid: 9, ..good }, &[]);
    guest.expect_silence();
    guest.send_raw(&Header { dst_cid: 9, ..good }, &[]);
    let (head, _) = guest.driver.wait_used(0);
    let reset = Header::parse(guest.driver.bytes(guest.rx[&head])[..HEADER_LEN].try_into().unwrap());
    assert_eq!((reset.op, reset.src_cid), (Op::Reset as u16, 9));
}

/// Pitfall 41: resets are not answered, and the rest is answered once.
#[test]
fn resets_are_not_amplified() {
    let mut guest = Guest::without_buffers();
    for _ in 0..1000 {
        guest.send((80, 1), Op::Reset);
    }
    guest.give_buffers();
    guest.send((80, 1), Op::Data);
    guest.expect(Op::Reset);
    guest.expect_silence();
}

/// Pitfall 41: Linux takes nothing while its own replies wait for the device, so a device that waited for it to take
/// resets would wait for ever.
#[test]
fn a_guest_that_takes_no_resets_is_heard_all_the_same() {
    const MORE: usize = 100;
    let mut guest = Guest::without_buffers();
    let listener = guest.listen(80);
    guest.send((80, 1), Op::Request);
    let (mut stream, _) = listener.accept().unwrap();
    for port in 0..(muxer::MAX_REPLIES + MORE) as u32 {
        guest.send((81, port), Op::Data);
    }
    assert_eq!(guest.counters.dropped.get(), MORE as u64);
    guest.send_data((80, 1), b"hello");
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    guest.give_buffers();
    for port in 0..muxer::MAX_REPLIES as u32 {
        assert_eq!(guest.expect(Op::Reset).dst_port, port);
    }
    guest.expect(Op::Response);
    // What was left out is said when the guest asks again.
    guest.send((81, muxer::MAX_REPLIES as u32), Op::Data);
    guest.expect(Op::Reset);
    guest.expect_silence();
}

/// Pitfall 41: no more data than there is credit for, and one question for more.
#[test]
fn a_guest_without_room_gets_nothing_until_it_has_some() {
    let mut guest = Guest::new();
    guest.buf_alloc = 0;
    let (mut client, ports) = guest.accept(5);
    client.write_all(&[1; 1000]).unwrap();
    guest.expect(Op::CreditRequest);
    guest.expect_silence();
    guest.send(ports, Op::CreditUpdate);
    guest.expect_silence();
    guest.buf_alloc = 600;
    guest.send(ports, Op::CreditUpdate);
    let (header, data) = guest.receive();
    assert_eq!((header.op, data.len()), (Op::Data as u16, 600));
    guest.expect(Op::CreditRequest);
    guest.send(ports, Op::CreditUpdate);
    assert_eq!(guest.receive().1.len(), 400);
}

/// Pitfall 41: a guest that sends more than it may loses its connection, and memory stays bounded.
#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let _stream = guest.connect(&listener, (80, 1));
    let data = vec![0; BUF_ALLOC as usize];
    let mut reset = false;
    // The host's program reads nothing: the kernel's buffer fills, then ours.
    for _ in 0..100 {
        guest.send_data((80, 1), &data);
        reset |= std::iter::from_fn(|| guest.try_receive()).any(|(h, _)| h.op == Op::Reset as u16);
    }
    assert!(reset);
}

#[test]
fn credit_comes_back_as_the_program_reads() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let mut stream = guest.connect(&listener, (80, 1));
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.len()
    });
    let (mut sent, mut forwarded) = (0u32, 0u32);
    while sent < 4 << 20 {
        if sent - forwarded + 4096 <= BUF_ALLOC {
            guest.send_data((80, 1), &[3; 4096]);
            sent += 4096;
        }
        while let Some((header, _)) = guest.try_receive() {
            assert_eq!((header.op, header.buf_alloc), (Op::CreditUpdate as u16, BUF_ALLOC));
            forwarded = header.fwd_cnt;
        }
    }
    guest.shut_down((80, 1), SHUTDOWN_SEND);
    assert_eq!(reader.join().unwrap(), 4 << 20);
}

#[test]
fn half_closes_pass_both_ways() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.accept(5);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.send_data(ports, b"late");
    guest.shut_down(ports, SHUTDOWN_SEND);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "late");
    // Both directions are over, so the host's kernel says that the stream is.
    assert_eq!(guest.expect(Op::Shutdown).flags, BOTH);
    guest.shut_down(ports, BOTH);
    guest.expect(Op::Reset);
}

#[test]
fn data_behind_the_end_of_data_is_reset() {
    let mut guest = Guest::new();
    let (_client, ports) = guest.accept(5);
    guest.shut_down(ports, SHUTDOWN_SEND);
    guest.send_data(ports, b"more");
    guest.expect(Op::Reset);
}

/// Pitfall 42: what the guest sent before its end reaches a slow program, and the port is free at once.
#[test]
fn what_a_finished_guest_sent_is_delivered() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let mut stream = guest.connect(&listener, (80, 1));
    let mut sent = 0;
    while std::iter::from_fn(|| guest.try_receive()).count() > 0 || sent < 60 {
        guest.send_data((80, 1), &[5; 4096]);
        sent += 1;
    }
    guest.shut_down((80, 1), BOTH);
    while guest.receive().0.op != Op::Reset as u16 {}
    let _second = guest.connect(&listener, (80, 1));
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent * 4096);
}

/// Pitfall 42: the device's thread sleeps while a stream is ready and the guest has no buffers.
#[test]
fn no_buffers_means_no_busy_loop() {
    let mut guest = Guest::without_buffers();
    let one = guest.driver.buffer(4096);
    guest.driver.offer(0, &[], &[one]);
    let mut client = guest.client(5);
    guest.driver.wait_used(0);
    let header = guest.driver.bytes((one.0, HEADER_LEN as u32));
    let request = Header::parse(header[..].try_into().unwrap());
    guest.send((request.src_port, 5), Op::Response);
    read_ok(&mut client);
    client.write_all(b"data").unwrap();
    thread::sleep(Duration::from_millis(20));
    let before = guest.counters.to_guest_packets.get();
    let wakeups = guest.counters.wakeups.get();
    thread::sleep(Duration::from_millis(200));
    // The timer may tick once.
    assert!(guest.counters.wakeups.get() <= wakeups + 1, "the device's thread does not sleep");
    assert_eq!(guest.counters.to_guest_packets.get(), before);
    guest.give_buffers();
    assert_eq!(guest.receive().1, b"data");
}

/// Pitfall 43.
#[test]
fn lines_that_are_none_close_their_stream() {
    let guest = Guest::new();
    for text in ["CONNECT\n", "CONNECT 99999999999\n", "GET / HTTP/1.1\r\n\r\n", &"x".repeat(5000)] {
        let mut stream = UnixStream::connect(guest.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = stream.write_all(text.as_bytes());
        is_at_end(&mut stream);
    }
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNE").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    is_at_end(&mut stream);
}

#[test]
fn a_line_may_come_in_pieces_and_with_data() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    for piece in ["CONN", "ECT ", "5", "\nearly"] {
        stream.write_all(piece.as_bytes()).unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    let request = guest.expect(Op::Request);
    guest.send((request.src_port, 5), Op::Response);
    assert_eq!(guest.receive().1, b"early");
}

#[test]
fn a_program_that_goes_away_ends_its_connection() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.accept(5);
    client.write_all(b"last words").unwrap();
    drop(client);
    assert_eq!(guest.receive().1, b"last words");
    // In two steps where the end of the data is seen before the end of the program.
    let first = guest.expect(Op::Shutdown).flags;
    if first != BOTH {
        assert_eq!((first, guest.expect(Op::Shutdown).flags), (SHUTDOWN_SEND, BOTH));
    }
    guest.send_data(ports, b"to nobody");
    guest.expect(Op::Reset);
}

#[test]
fn a_guest_that_refuses_closes_the_stream() {
    let mut guest = Guest::new();
    let mut client = guest.client(5);
    let request = guest.expect(Op::Request);
    guest.send((request.src_port, 5), Op::Reset);
    is_at_end(&mut client);
    guest.expect_silence();
}

/// Pitfall 41: a flood from the guest stops at the bound, and what is closed makes room.
#[test]
fn a_connect_flood_is_bounded() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let accepting =
        thread::spawn(move || (0..MAX_CONNECTIONS).map(|_| listener.accept().unwrap().0).collect::<Vec<_>>());
    let mut port = 0;
    let mut accepted = 0;
    while accepted < MAX_CONNECTIONS {
        // A full accept queue of the host is a reset, too; this guest tries again.
        guest.send((80, port), Op::Request);
        if guest.receive().0.op == Op::Response as u16 {
            (port, accepted) = (port + 1, accepted + 1);
        }
    }
    let programs = accepting.join().unwrap();
    for port in port..port + 500 {
        guest.send((80, port), Op::Request);
        guest.expect(Op::Reset);
    }
    is_at_end(&mut UnixStream::connect(guest.path()).unwrap());
    assert_eq!(guest.counters.connections.get(), MAX_CONNECTIONS as u64);
    guest.send((80, 0), Op::Reset);
    drop(programs);
}

#[test]
fn a_reset_closes_all_and_the_next_driver_is_served() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.accept(5);
    guest.driver.write(0x70, 0);
    is_at_end(&mut client);
    // It waits for the next driver.
    let _waiting = guest.client(6);
    guest.driver.restart(&QUEUE_SIZES);
    guest.rx.clear();
    guest.give_buffers();
    assert_eq!(guest.expect(Op::Request).dst_port, 6);
    guest.accept(7);
}

/// Pitfall 42: what waits for a program goes with it, and the guest hears of it.
#[test]
fn what_waits_for_a_killed_program_is_dropped() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let stream = guest.connect(&listener, (80, 1));
    // More than the kernel's buffer holds, so that some of it waits here, and less than credit for it all.
    let mut unread = 0;
    while unread < BUF_ALLOC / 2 {
        guest.send_data((80, 1), &[5; 4096]);
        let updates = std::iter::from_fn(|| guest.try_receive()).count();
        unread = if updates == 0 { unread + 4096 } else { 0 };
    }
    drop(stream);
    while guest.receive().0.op != Op::Reset as u16 {}
    guest.driver.wait("the connection stays", |_| (guest.counters.open.get() == 0).then_some(()));
}

/// Pitfall 44 as far as there is a reset without a snapshot: what was under way ends with it, and the old ring is left
/// alone even where a program has more to say.
#[test]
fn nothing_is_written_to_the_rings_of_before_a_reset() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.accept(5);
    guest.send_data(ports, b"to the program");
    client.write_all(&[1; 20_000]).unwrap();
    guest.driver.write(0x70, 0);
    while guest.try_receive().is_some() {}
    let _ = client.write_all(&[2; 20_000]);
    let _waiting = guest.client(6);
    thread::sleep(Duration::from_millis(50));
    assert!(guest.driver.try_used(0).is_none() && guest.driver.try_used(1).is_none());
    guest.driver.restart(&QUEUE_SIZES);
    guest.rx.clear();
    guest.give_buffers();
    assert_eq!(guest.expect(Op::Request).dst_port, 6);
    guest.expect_silence();
}

/// A queue that cannot be is the driver's fault and this device's alone: it waits for a reset, and works after one.
#[test]
fn a_broken_queue_asks_for_a_reset() {
    for queue in [0, 1] {
        let mut guest = Guest::without_buffers();
        let _client = guest.client(5);
        // A descriptor that is followed by itself, without end.
        let (address, len) = guest.driver.buffer(100);
        guest.driver.descriptor(queue, 0, (address, len), if queue == 0 { 3 } else { 1 }, 0);
        guest.driver.make_available(queue, 0);
        guest.driver.notify(queue);
        guest.driver.wait_needs_reset();
        guest.driver.restart(&QUEUE_SIZES);
        guest.rx.clear();
        guest.give_buffers();
        let (_client, ports) = guest.accept(6);
        guest.send(ports, Op::CreditRequest);
        guest.expect(Op::CreditUpdate);
    }
}

/// A muxer without a thread, and one program that has connected.
fn muxer_with_program() -> (Muxer, Epoll, UnixStream, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let (host, file) = HostSocket::bind(&path).unwrap();
    let counters = Arc::new(VsockCounters::new(&Registry::default(), NAME));
    let mut muxer = Muxer::new(CID, Arc::new(host), counters);
    let epoll = Epoll::new().unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    muxer.accept(&epoll).unwrap();
    drop(file);
    (muxer, epoll, stream, dir)
}

/// Pitfall 41: a guest that takes nothing, and opens and resets on and on, costs no more memory for it.
#[test]
fn connections_that_are_gone_leave_nothing() {
    let (mut muxer, epoll, _stream, dir) = muxer_with_program();
    let listener = UnixListener::bind(dir.path().join("v_80")).unwrap();
    for port in 0..5000 {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: port,
            dst_port: 80,
            kind: TYPE_STREAM,
            op: Op::Request as u16,
            ..Header::default()
        };
        muxer.receive(&header, &[], &epoll);
        drop(listener.accept().unwrap());
        muxer.receive(&Header { op: Op::Reset as u16, ..header }, &[], &epoll);
        assert!(muxer.turns() <= 2 * MAX_CONNECTIONS);
    }
    assert!(muxer.next_packet(&mut [0; 100]).is_none());
}

/// Pitfall 43: a program that is slow with its line does not stay for ever.
#[test]
fn a_line_has_a_time_limit() {
    let (mut muxer, _epoll, mut stream, _dir) = muxer_with_program();
    stream.write_all(b"CONNE").unwrap();
    muxer.stream_event(FIRST_STREAM, EventSet::IN);
    (1..muxer::HANDSHAKE_TICKS).for_each(|_| muxer.tick());
    assert!(muxer.has_deadlines());
    muxer.tick();
    is_at_end(&mut stream);
    assert!(!muxer.has_deadlines());
}

#[test]
fn a_guest_has_a_time_limit_to_answer() {
    let (mut muxer, _epoll, mut stream, _dir) = muxer_with_program();
    stream.write_all(b"CONNECT 5\n").unwrap();
    muxer.stream_event(FIRST_STREAM, EventSet::IN);
    let mut next = || muxer.next_packet(&mut [0; 100]).map(|h| Op::new(h.op).unwrap());
    assert_eq!((next(), next()), (Some(Op::Request), None));
    (0..muxer::HANDSHAKE_TICKS).for_each(|_| muxer.tick());
    is_at_end(&mut stream);
    let mut next = || muxer.next_packet(&mut [0; 100]).map(|h| Op::new(h.op).unwrap());
    assert_eq!((next(), next()), (Some(Op::Reset), None));
    assert!(!muxer.has_deadlines());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whatever headers a guest sends, nothing panics, and it gets no more packets than it sent, but for the data and
    /// the end of the one program.
    #[test]
    fn any_packets_are_survived(packets: Vec<(u16, bool, bool, u8, u32, u32, u32)>) {
        let (mut muxer, epoll, mut stream, _dir) = muxer_with_program();
        stream.write_all(b"CONNECT 5\n1234").unwrap();
        muxer.stream_event(FIRST_STREAM, EventSet::IN);
        let request = muxer.next_packet(&mut [0; 100]).unwrap();
        let sent = packets.len();
        for (op, good_kind, good_port, len, flags, buf_alloc, fwd_cnt) in packets {
            let header = Header {
                src_cid: CID.into(),
                dst_cid: HOST_CID,
                src_port: if good_port { 5 } else { 6 },
                dst_port: request.src_port,
                len: len.into(),
                kind: u16::from(good_kind),
                op: op % 10,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            muxer.receive(&header, &vec![0; len.into()], &epoll);
            muxer.stream_event(FIRST_STREAM, EventSet::IN | EventSet::OUT);
        }
        let mut answers = 0;
        while muxer.next_packet(&mut [0; 100]).is_some() {
            answers += 1;
        }
        prop_assert!(answers <= sent + 6, "{answers} for {sent}");
    }
}
