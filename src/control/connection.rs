//! One client: bytes in, one request at a time, bytes out. Nothing here waits.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::http::{MAX_BODY, MAX_HEAD, Parsed, Request, Response, parse};

/// A request must be there this long after its first byte, the first one after the client has come.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// A response must be taken in this time.
pub(super) const RESPONSE_LIMIT: Duration = Duration::from_secs(5);
/// How long a client may be silent between two requests.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// What a client still sends after its request was refused is dropped for this long, so that it reads the refusal
/// instead of failing on its write.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// What one client may take of memory for what it sends.
const MAX_INPUT: usize = MAX_HEAD + MAX_BODY;
/// Read at once.
const CHUNK: usize = 8 << 10;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Requests are read.
    Open,
    /// A response is being written; the connection ends after it.
    Closing,
    /// Input is dropped until the client has seen the end.
    Draining,
    /// Over.
    Closed,
}

/// A client.
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    phase: Phase,
    deadline: Instant,
    /// A request was served, and nothing of the next has come.
    idle: bool,
    /// The client has sent its last byte.
    ended: bool,
    /// `100 Continue` was sent for the request that is coming.
    continued: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, now: Instant) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            phase: Phase::Open,
            deadline: now + REQUEST_LIMIT,
            idle: false,
            ended: false,
            continued: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    pub(super) fn is_idle(&self) -> bool {
        self.idle
    }

    /// Not while a response is under way: a client that reads nothing is not read from either.
    pub(super) fn wants_input(&self) -> bool {
        let room = self.phase == Phase::Draining || self.input.len() < MAX_INPUT;
        !self.ended && !self.wants_output() && room
    }

    pub(super) fn wants_output(&self) -> bool {
        self.written < self.output.len()
    }

    /// Takes in what is there, without waiting.
    pub(super) fn read(&mut self, now: Instant) {
        let mut chunk = [0; CHUNK];
        // A file descriptor that comes along with the bytes is closed by the kernel: nobody asks for it here.
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(_) if self.phase == Phase::Draining => {}
            Ok(n) => {
                if std::mem::take(&mut self.idle) {
                    self.deadline = now + REQUEST_LIMIT;
                }
                self.input.extend_from_slice(&chunk[..n]);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.phase = Phase::Closed,
        }
        if self.ended && self.phase == Phase::Draining {
            self.phase = Phase::Closed;
        }
    }

    /// The next request, once it is there whole and the response to the last one is out.
    pub(super) fn next_request(&mut self, now: Instant) -> Option<Request> {
        if self.phase != Phase::Open || self.wants_output() {
            return None;
        }
        match parse(&self.input) {
            Ok(Parsed::Complete(request, len)) => {
                self.input.drain(..len);
                self.continued = false;
                return Some(request);
            }
            // The rest will not come. A client that has said nothing, or all, just goes.
            Ok(Parsed::Partial { .. }) if self.ended && self.input.is_empty() => self.phase = Phase::Closed,
            Ok(Parsed::Partial { .. }) if self.ended => {
                self.refuse(&Response::error(400, "the request ends in the middle"), now);
            }
            Ok(Parsed::Partial { expects_continue: true }) if !self.continued => {
                self.continued = true;
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec());
            }
            Ok(Parsed::Partial { .. }) => {}
            Err(reject) => self.refuse(&reject.into(), now),
        }
        None
    }

    /// Answers `request`.
    pub(super) fn respond(&mut self, request: &Request, response: &Response, now: Instant) {
        let keep = request.keep_alive && !(self.ended && self.input.is_empty());
        self.deadline = now + RESPONSE_LIMIT;
        if !keep {
            self.phase = Phase::Closing;
        }
        self.send(response.to_bytes(request.method == "HEAD", keep));
        if !self.wants_output() {
            self.after_response(now);
        }
    }

    /// Answers with an error, after which nothing more is read as a request.
    pub(super) fn refuse(&mut self, response: &Response, now: Instant) {
        self.phase = Phase::Closing;
        self.input = Vec::new();
        self.deadline = now + RESPONSE_LIMIT;
        self.send(response.to_bytes(false, false));
        if !self.wants_output() {
            self.after_response(now);
        }
    }

    /// Goes on writing what has not been taken.
    pub(super) fn write(&mut self, now: Instant) {
        self.flush();
        if !self.wants_output() {
            self.after_response(now);
        }
    }

    /// The time is up.
    pub(super) fn time_out(&mut self, now: Instant) {
        let half = self.phase == Phase::Open && !self.wants_output() && !self.input.is_empty();
        if half {
            let text = format!("the request was not there within {REQUEST_LIMIT:?}");
            self.refuse(&Response::error(408, &text), now);
        } else {
            self.phase = Phase::Closed;
        }
    }

    fn send(&mut self, bytes: Vec<u8>) {
        (self.output, self.written) = (bytes, 0);
        self.flush();
    }

    fn flush(&mut self) {
        while self.wants_output() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(n) if n > 0 => self.written += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // The client has gone away.
                _ => {
                    (self.output, self.written) = (Vec::new(), 0);
                    self.phase = Phase::Closed;
                }
            }
        }
    }

    fn after_response(&mut self, now: Instant) {
        (self.output, self.written) = (Vec::new(), 0);
        match self.phase {
            Phase::Open if self.input.is_empty() => {
                self.idle = true;
                self.deadline = now + IDLE_LIMIT;
            }
            Phase::Open => self.deadline = now + REQUEST_LIMIT,
            Phase::Closing if self.ended => self.phase = Phase::Closed,
            Phase::Closing => {
                // The client sees the end, and what it still sends is dropped instead of resetting the connection.
                let _ = self.stream.shutdown(std::net::Shutdown::Write);
                self.phase = Phase::Draining;
                self.deadline = now + DRAIN_LIMIT;
            }
            Phase::Draining | Phase::Closed => {}
        }
    }
}
