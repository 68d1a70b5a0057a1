//! All connections, by (host port, guest port), and whose turn it is to send to the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{SocketFlags, accept_with};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Outcome};
use super::counters::VsockCounters;
use super::host::{HostSocket, Line, read_line};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};

/// The most host programs and guest sockets that are connected, connecting or being finished. One more is refused.
pub const MAX_CONNECTIONS: usize = 1024;
/// The most resets that wait for the guest's buffers. One more is left out.
pub const MAX_REPLIES: usize = 256;
/// How many seconds a host program has for its first line, and then the guest for its answer. The seconds of a pause do not
/// count: see [`Muxer::tick`].
pub const HANDSHAKE_TICKS: u64 = 10;
/// How many seconds a host program has to take what a guest's finished connection has left for it.
const DRAIN_TICKS: u64 = 30;
/// Tokens of streams start here; those below are the device's own descriptors'.
pub const FIRST_STREAM: u64 = 16;
/// Host ports of connections that host programs ask for start here, far from what a guest would choose.
const FIRST_PORT: u32 = 1 << 30;

/// A host program that has not named its port yet.
#[derive(Debug)]
struct Handshake {
    stream: UnixStream,
    deadline: u64,
}

/// The connections of an active device.
pub struct Muxer {
    guest_cid: u64,
    host: Arc<HostSocket>,
    counters: Arc<VsockCounters>,
    /// By token, as epoll knows their streams. Tokens are never used again, so an event for a stream that is closed
    /// meets nobody.
    connections: HashMap<u64, Connection>,
    handshakes: HashMap<u64, Handshake>,
    /// Connections that the guest knows of. One that is only being delivered is not among them.
    ports: HashMap<(u32, u32), u64>,
    /// Connections with something for the guest, each once.
    turns: VecDeque<u64>,
    replies: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
    /// Seconds that were waited for.
    ticks: u64,
    has_deadlines: bool,
}

impl Muxer {
    /// No connections.
    #[must_use]
    pub fn new(guest_cid: u32, host: Arc<HostSocket>, counters: Arc<VsockCounters>) -> Self {
        Self {
            guest_cid: guest_cid.into(),
            host,
            counters,
            connections: HashMap::new(),
            handshakes: HashMap::new(),
            ports: HashMap::new(),
            turns: VecDeque::new(),
            replies: VecDeque::new(),
            next_token: FIRST_STREAM,
            next_port: FIRST_PORT,
            ticks: 0,
            has_deadlines: false,
        }
    }

    /// The socket that host programs connect to.
    #[must_use]
    pub fn listener(&self) -> &OwnedFd {
        self.host.listener()
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> &VsockCounters {
        &self.counters
    }

    /// Closes everything.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.handshakes.clear();
        self.ports.clear();
        self.turns.clear();
        self.replies.clear();
        self.count_open();
    }

    /// Tells how many connections there are.
    pub fn count_open(&self) {
        self.counters.open.set((self.connections.len() + self.handshakes.len()) as u64);
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.handshakes.len() >= MAX_CONNECTIONS
    }

    /// Whether something waits for the guest.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        !self.replies.is_empty() || !self.turns.is_empty()
    }

    /// How many turns are queued, those of connections that are gone among them.
    #[cfg(test)]
    pub fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Takes in one host program. One too many is closed.
    ///
    /// # Errors
    /// None waits, or the host has no descriptor left.
    pub fn accept(&mut self, epoll: &Epoll) -> io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let stream = UnixStream::from(accept_with(self.host.listener(), flags)?);
        if self.is_full() {
            return Ok(());
        }
        let deadline = self.ticks + HANDSHAKE_TICKS;
        if let Some(token) = self.watch(&stream, epoll) {
            self.handshakes.insert(token, Handshake { stream, deadline });
            self.has_deadlines = true;
        }
        Ok(())
    }

    fn watch(&mut self, stream: &UnixStream, epoll: &Epoll) -> Option<u64> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let token = self.next_token;
        epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(set, token)).ok()?;
        self.next_token += 1;
        Some(token)
    }

    /// The stream with `token` has news.
    pub fn stream_event(&mut self, token: u64, ready: EventSet) {
        if let Some(handshake) = self.handshakes.get(&token) {
            match read_line(&handshake.stream) {
                // What is not whole at the end never will be.
                Line::Partial if !ready.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP) => {}
                Line::Port(port) => self.request(token, port),
                Line::Partial | Line::Bad => drop(self.handshakes.remove(&token)),
            }
        } else if let Some(connection) = self.connections.get_mut(&token) {
            let outcome = connection.stream_event(ready.contains(EventSet::HANG_UP));
            self.settle(token, outcome);
        }
    }

    /// A host program has named the guest's port.
    fn request(&mut self, token: u64, guest_port: u32) {
        let Some(handshake) = self.handshakes.remove(&token) else { return };
        let ports = (self.free_port(guest_port), guest_port);
        let deadline = self.ticks + HANDSHAKE_TICKS;
        self.add(token, Connection::request(ports, handshake.stream, deadline));
    }

    /// There are far fewer connections than ports, so this ends.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            if !self.ports.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    fn add(&mut self, token: u64, connection: Connection) {
        self.ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.counters.connections.increment();
        self.take_turn(token);
    }

    /// Queues the connection if it has something for the guest and is not queued.
    fn take_turn(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        // One that only delivers has no guest to send to.
        let is_known = self.ports.get(&connection.ports) == Some(&token);
        if is_known && !connection.is_queued && connection.has_packet() {
            connection.is_queued = true;
            self.turns.push_back(token);
            // A guest without buffers could open and reset without end, and leave a turn behind each time.
            if self.turns.len() > 2 * MAX_CONNECTIONS {
                self.turns.retain(|token| self.connections.contains_key(token));
            }
        }
    }

    fn settle(&mut self, token: u64, outcome: Outcome) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let is_known = self.ports.get(&connection.ports) == Some(&token);
        match outcome {
            Outcome::Reset if is_known => connection.begin_reset(),
            Outcome::Gone | Outcome::Reset => return self.remove(token, outcome == Outcome::Gone),
            Outcome::Keep if !is_known && !connection.has_undelivered() => return self.remove(token, false),
            Outcome::Keep => {}
        }
        self.take_turn(token);
    }

    /// Ends a connection as far as the guest is concerned. With `deliver`, what it sent before still reaches the program.
    fn remove(&mut self, token: u64, deliver: bool) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if self.ports.get(&connection.ports) == Some(&token) {
            self.ports.remove(&connection.ports);
        }
        if deliver && connection.has_undelivered() && connection.deliver() == Outcome::Keep {
            connection.deadline = Some(self.ticks + DRAIN_TICKS);
            self.has_deadlines = true;
            if connection.has_undelivered() {
                return;
            }
        }
        self.connections.remove(&token);
    }

    /// Takes a packet of the guest's, with as many bytes of data as its header says.
    pub fn receive(&mut self, header: &Header, data: &[u8], epoll: &Epoll) {
        // Whoever else it claims to be from would get the answer.
        if header.src_cid != self.guest_cid {
            self.drop_packet();
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let token = self.ports.get(&(header.dst_port, header.src_port)).copied();
        match token.and_then(|t| Some((t, self.connections.get_mut(&t)?))) {
            Some((token, connection)) => {
                let outcome = connection.receive(header, data);
                self.settle(token, outcome);
            }
            None if header.op == Op::Request as u16 => self.connect(header, epoll),
            None => self.refuse(header),
        }
    }

    /// Counts a packet that is none, or has no answer.
    pub fn drop_packet(&self) {
        self.counters.dropped.increment();
    }

    /// A packet whose data is not there: its connection cannot be whole again (§5.10.6.4).
    pub fn receive_broken(&mut self, header: &Header) {
        self.drop_packet();
        let token = self.ports.get(&(header.dst_port, header.src_port)).copied();
        match token {
            _ if header.src_cid != self.guest_cid => {}
            Some(token) if header.dst_cid == HOST_CID => self.settle(token, Outcome::Reset),
            _ => self.refuse(header),
        }
    }

    /// One reset for one packet, and none for a reset: two sides that refuse each other fall silent. To a guest that takes
    /// none it is left out. Its packets may not wait instead: Linux takes nothing from us while its own replies wait for
    /// us to take them, and both would wait for ever.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 {
            return;
        }
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back(header.reset_reply());
        } else {
            self.drop_packet();
        }
    }

    /// The guest asks for a host port.
    fn connect(&mut self, header: &Header, epoll: &Epoll) {
        let stream = if self.is_full() { None } else { self.host.connect(header.dst_port).ok() };
        let watched = stream.and_then(|stream| Some((self.watch(&stream, epoll)?, stream)));
        match watched {
            Some((token, stream)) => {
                let ports = (header.dst_port, header.src_port);
                self.add(token, Connection::accepted(ports, stream, header));
            }
            None => self.refuse(header),
        }
    }

    /// The next packet for the guest, with data for at most all of `data`. Each connection sends one in its turn.
    pub fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            self.counters.resets.increment();
            return Some(reply);
        }
        // Each turn either gives a packet or ends.
        for _ in 0..=self.turns.len() {
            let token = self.turns.pop_front()?;
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.is_queued = false;
            if self.ports.get(&connection.ports) != Some(&token) {
                continue;
            }
            match connection.next_packet(data) {
                Some(header) => return Some(self.address(token, header)),
                None => self.take_turn(token),
            }
        }
        None
    }

    fn address(&mut self, token: u64, header: Header) -> Header {
        if header.op == Op::Reset as u16 {
            self.counters.resets.increment();
            self.remove(token, true);
        } else {
            self.take_turn(token);
        }
        Header { src_cid: HOST_CID, dst_cid: self.guest_cid, kind: TYPE_STREAM, ..header }
    }

    /// Whether anything may have a deadline, as of the last [`Muxer::tick`].
    #[must_use]
    pub fn has_deadlines(&self) -> bool {
        self.has_deadlines
    }

    /// A second has passed, and ends what took too long. Seconds are counted rather than looked up, so that those pass alone
    /// in which somebody could answer: a device that is paused counts one at most.
    pub fn tick(&mut self) {
        self.ticks += 1;
        let now = self.ticks;
        self.handshakes.retain(|_, handshake| handshake.deadline > now);
        let late = self.connections.iter().filter(|(_, c)| c.deadline.is_some_and(|d| d <= now));
        let late: Vec<u64> = late.map(|(token, _)| *token).collect();
        for token in late {
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.deadline = None;
            }
            self.settle(token, Outcome::Reset);
        }
        self.has_deadlines =
            !self.handshakes.is_empty() || self.connections.values().any(|c| c.deadline.is_some());
    }
}
