//! The device with a driver that the test plays, and real Unix sockets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Buffer, Driver};
use super::credit::BUF_ALLOC;
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;

const CID: u32 = 7;
const RX_BUFFERS: usize = 64;
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A guest: its driver, and what it knows of its connections.
struct Guest {
    driver: Driver,
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
        let device = Vsock::open(CID, &dir.path().join("v")).unwrap();
        let counters = device.counters();
        let mut driver = Driver::start(Box::new(device), &QUEUE_SIZES);
        let tx = driver.buffer(HEADER_LEN as u32 + BUF_ALLOC + 4096);
        let (rx, forwarded) = (HashMap::new(), HashMap::new());
        Self { driver, dir, counters, rx, tx, forwarded, buf_alloc: 1 << 18 }
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
        let (head, len) = self.driver.try_used(0)?;
        let buffer = self.rx.remove(&head).unwrap();
        let bytes = self.driver.bytes((buffer.0, len));
        let head = self.driver.offer(0, &[], &[buffer]);
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

    /// Serves echoes until `count` connections have ended.
    fn serve_echo(&mut self, count: usize) {
        let mut ended = 0;
        while ended < count {
            let (header, data) = self.receive();
            let ports = (header.src_port, header.dst_port);
            match Op::new(header.op).unwrap() {
                Op::Request => {
                    self.forwarded.insert(ports, 0);
                    self.send(ports, Op::Response);
                }
                Op::Data => self.send_data(ports, &data),
                Op::Shutdown => {
                    self.shut_down(ports, BOTH);
                    ended += 1;
                }
                Op::Reset | Op::CreditUpdate => {}
                other => panic!("{other:?}"),
            }
        }
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

#[test]
fn a_thousand_one_after_another() {
    let mut guest = Guest::new();
    let path = guest.path();
    let host = thread::spawn(move || (0..1000).for_each(|i| echo(&path, i, 100)));
    guest.serve_echo(1000);
    host.join().unwrap();
    assert_eq!(guest.counters.connections.load(Ordering::Relaxed), 1000);
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
