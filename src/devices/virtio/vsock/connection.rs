//! One connection between a guest's port and a host program (virtio 1.3 §5.10.6.5, §5.10.6.6).
//!
//! The host's stream is watched edge-triggered: `readable` stays set until a read finds nothing, so a stream that is
//! ready while the guest has no buffers costs nothing until it has.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::credit::Credit;
use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::txbuf::TxBuf;

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A host program asked for it, and the guest has not answered.
    Requested,
    /// Data flows.
    Established,
    /// The guest is told that it is over, and then it is gone.
    Resetting,
}

/// What a packet or an event makes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Keep,
    /// The guest knows that it is over.
    Gone,
    /// The guest must be told that it is over.
    Reset,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Host's port and guest's port.
    pub ports: (u32, u32),
    /// How far it is.
    pub state: State,
    /// Whether it waits for its turn to send to the guest.
    pub is_queued: bool,
    /// Until which of the muxer's ticks a request must be answered, or what is left be delivered.
    pub deadline: Option<u64>,
    stream: UnixStream,
    credit: Credit,
    buffer: TxBuf,
    readable: bool,
    /// The host program sends no more.
    at_end: bool,
    /// The guest's shutdown flags.
    guest_shutdown: u32,
    /// Our shutdown flags that the guest was told, and those that it has yet to be.
    told_shutdown: u32,
    shutdown: u32,
    /// Single packets to the guest that wait for their turn.
    owes_opening: bool,
    owes_update: bool,
    owes_request: bool,
    /// A credit request is without an answer.
    asked: bool,
}

impl Connection {
    fn new(ports: (u32, u32), stream: UnixStream, state: State) -> Self {
        Self {
            ports,
            state,
            is_queued: false,
            deadline: None,
            stream,
            credit: Credit::default(),
            buffer: TxBuf::default(),
            readable: true,
            at_end: false,
            guest_shutdown: 0,
            told_shutdown: 0,
            shutdown: 0,
            owes_opening: true,
            owes_update: false,
            owes_request: false,
            asked: false,
        }
    }

    /// One that a host program asks for. The guest is to accept it until `deadline`.
    #[must_use]
    pub fn request(ports: (u32, u32), stream: UnixStream, deadline: u64) -> Self {
        Self { deadline: Some(deadline), ..Self::new(ports, stream, State::Requested) }
    }

    /// One that the guest asked for with `header`, and that a host program has accepted.
    #[must_use]
    pub fn accepted(ports: (u32, u32), stream: UnixStream, header: &Header) -> Self {
        let mut connection = Self::new(ports, stream, State::Established);
        connection.credit.hear(header.buf_alloc, header.fwd_cnt);
        connection
    }

    /// It is over. The host program hears of it now, however long the guest takes; what waits for it still comes.
    pub fn begin_reset(&mut self) {
        self.state = State::Resetting;
        if self.buffer.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether the guest sent what the host program has not taken.
    #[must_use]
    pub fn has_undelivered(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Takes a packet of the guest's. `data` has as many bytes as the header says.
    pub fn receive(&mut self, header: &Header, data: &[u8]) -> Outcome {
        if self.credit.hear(header.buf_alloc, header.fwd_cnt) {
            self.asked = false;
        }
        match (self.state, Op::new(header.op)) {
            (_, Some(Op::Reset)) => Outcome::Gone,
            (State::Resetting, _) => Outcome::Keep,
            (State::Requested, Some(Op::Response)) => self.accept(),
            (State::Established, Some(Op::Data)) => self.receive_data(data),
            (State::Established, Some(Op::Shutdown)) => self.receive_shutdown(header.flags),
            (State::Established, Some(Op::CreditUpdate)) => Outcome::Keep,
            (State::Established, Some(Op::CreditRequest)) => {
                self.owes_update = true;
                Outcome::Keep
            }
            _ => Outcome::Reset,
        }
    }

    /// The guest accepted what the host program asked for.
    fn accept(&mut self) -> Outcome {
        let line = format!("OK {}\n", self.ports.0);
        // The stream is new and has room; a program that is gone already needs no connection.
        match send(&self.stream, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(len) if len == line.len() => {
                self.state = State::Established;
                self.deadline = None;
                Outcome::Keep
            }
            _ => Outcome::Reset,
        }
    }

    fn receive_data(&mut self, data: &[u8]) -> Outcome {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || !self.credit.receive(data.len() as u32) {
            return Outcome::Reset;
        }
        let mut rest = data;
        while self.buffer.is_empty() && !rest.is_empty() {
            match write(&self.stream, rest) {
                Ok(0) => break,
                Ok(len) => {
                    rest = &rest[len..];
                    self.forwarded(len as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Outcome::Reset,
            }
        }
        if self.buffer.push(rest) { Outcome::Keep } else { Outcome::Reset }
    }

    fn receive_shutdown(&mut self, flags: u32) -> Outcome {
        self.guest_shutdown |= flags & BOTH;
        if self.guest_shutdown == BOTH {
            // Answered at once, so that the guest can use its port again; what is left is delivered without it.
            return Outcome::Reset;
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
            self.at_end = true;
        }
        self.end_stream();
        Outcome::Keep
    }

    /// Passes the guest's end of data on, behind the data.
    fn end_stream(&self) {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.buffer.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn forwarded(&mut self, len: u32) {
        self.owes_update |= self.credit.forward(len);
    }

    /// The host's stream has news; `hung_up`: the program has closed it.
    pub fn stream_event(&mut self, hung_up: bool) -> Outcome {
        self.readable = true;
        if hung_up {
            self.shutdown |= SHUTDOWN_RECEIVE;
        }
        self.deliver()
    }

    /// Gives the host program what waits for it.
    pub fn deliver(&mut self) -> Outcome {
        if self.buffer.is_empty() {
            return Outcome::Keep;
        }
        let stream = &self.stream;
        match self.buffer.flush(|data| write(stream, data)) {
            Ok(taken) => self.forwarded(taken),
            Err(_) => return Outcome::Reset,
        }
        self.end_stream();
        Outcome::Keep
    }

    /// Whether there is something for the guest that could go now.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        match self.state {
            State::Resetting => true,
            State::Requested => self.owes_opening,
            State::Established => {
                self.owes_opening
                    || self.owes_update
                    || self.owes_request
                    || self.can_read()
                    || self.next_shutdown() != 0
            }
        }
    }

    fn wants_read(&self) -> bool {
        self.readable && !self.at_end && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// There may be something to read, and the guest has room, or is to be asked for it.
    fn can_read(&self) -> bool {
        self.wants_read() && (self.credit.can_send() > 0 || !self.asked)
    }

    /// The shutdown flags that are news to the guest. Nothing behind which data may still come.
    fn next_shutdown(&self) -> u32 {
        if self.at_end { (self.shutdown | SHUTDOWN_SEND) & !self.told_shutdown } else { 0 }
    }

    /// The next packet for the guest, its data in `data` as far as the header's `len` says. `None`: nothing after all.
    pub fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if self.state == State::Resetting {
            return Some(self.header(Op::Reset, 0));
        }
        if std::mem::take(&mut self.owes_opening) {
            let op = if self.state == State::Requested { Op::Request } else { Op::Response };
            return Some(self.header(op, 0));
        }
        if self.state == State::Requested {
            return None;
        }
        if let Some(header) = self.next_data(data) {
            return Some(header);
        }
        if self.state == State::Resetting {
            return Some(self.header(Op::Reset, 0));
        }
        if std::mem::take(&mut self.owes_request) {
            return Some(self.header(Op::CreditRequest, 0));
        }
        if std::mem::take(&mut self.owes_update) {
            return Some(self.header(Op::CreditUpdate, 0));
        }
        let flags = self.next_shutdown();
        self.told_shutdown |= flags;
        (flags != 0).then(|| Header { flags: self.told_shutdown, ..self.header(Op::Shutdown, 0) })
    }

    fn next_data(&mut self, data: &mut [u8]) -> Option<Header> {
        if !self.wants_read() {
            return None;
        }
        let room = data.len().min(self.credit.can_send() as usize);
        if room == 0 {
            self.owes_request |= !std::mem::replace(&mut self.asked, true);
            return None;
        }
        match recv(&self.stream, &mut data[..room], RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.at_end = true,
            Ok((len, _)) => {
                self.credit.send(len as u32);
                return Some(self.header(Op::Data, len as u32));
            }
            Err(rustix::io::Errno::AGAIN) => self.readable = false,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => self.state = State::Resetting,
        }
        None
    }

    /// A header with addresses left to the muxer, which knows the CIDs. Each tells the guest of our room.
    fn header(&mut self, op: Op, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        self.owes_update = false;
        Header {
            src_port: self.ports.0,
            dst_port: self.ports.1,
            op: op as u16,
            len,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }
}

fn write(stream: &UnixStream, data: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| send(stream, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT))?)
}
