//! The thread that serves the control socket.
//!
//! Requests are answered one after another, but no client is waited for: all sockets are in one `poll`, and each client
//! has its own buffers and time limits. So a slow client holds nobody up. What does is a request that the VM itself
//! takes time for: a pause that a vCPU resists, two seconds.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with};

use super::connection::Connection;
use super::http::{Request, Response};

/// More clients wait in the socket's backlog until one of these goes, which its time limits see to.
pub(super) const MAX_CONNECTIONS: usize = 128;
/// How long no client is accepted after one could not be, for want of a descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers requests. It may take some time, but not wait for the client.
pub(super) trait Handler {
    fn handle(&mut self, request: &Request) -> Response;
}

/// The sockets and their clients.
pub(super) struct Server<H> {
    listener: OwnedFd,
    stop: Arc<OwnedFd>,
    handler: H,
    connections: Vec<Connection>,
    accept_after: Option<Instant>,
}

/// What `poll` found.
struct Ready {
    stop: bool,
    listener: bool,
    connections: Vec<PollFlags>,
}

impl<H: Handler> Server<H> {
    /// Serves `listener`, which does not block, until `stop` is written to.
    pub(super) fn new(listener: OwnedFd, stop: Arc<OwnedFd>, handler: H) -> Self {
        Self { listener, stop, handler, connections: Vec::new(), accept_after: None }
    }

    /// The socket that clients come to.
    pub(super) fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// Serves until it is stopped. The sockets stay open until what this returns is dropped.
    #[must_use]
    pub(super) fn run(mut self) -> Self {
        // Whether a client has sent more requests than one, which no descriptor will tell again.
        let mut more = false;
        loop {
            let ready = match self.wait(more) {
                Ok(ready) if ready.stop => return self,
                Ok(ready) => ready,
                Err(e) => {
                    log::error!("the control socket is served no longer: {e}");
                    return self;
                }
            };
            let now = Instant::now();
            let listener = ready.listener;
            more = false;
            // Those that are accepted below are looked at the next time.
            for (connection, events) in self.connections.iter_mut().zip(ready.connections) {
                more |= serve(connection, events, &mut self.handler, now);
            }
            self.connections.retain(|c| !c.is_closed());
            if listener {
                self.accept(now);
            }
        }
    }

    /// Waits until there is something to do, or a time limit is over.
    fn wait(&self, at_once: bool) -> io::Result<Ready> {
        let listens = self.accept_after.is_none_or(|at| at <= Instant::now()) && self.has_room();
        let listener_flags = if listens { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::new(&*self.stop, PollFlags::IN), PollFd::new(&self.listener, listener_flags)];
        fds.extend(self.connections.iter().map(|c| PollFd::new(c.stream(), flags(c))));
        let limits = self.connections.iter().map(Connection::deadline).chain(self.accept_after);
        let now = Instant::now();
        let left =
            limits.min().map(|at| if at_once { Duration::ZERO } else { at.saturating_duration_since(now) });
        match poll(&mut fds, left.map(timespec).as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let events: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        Ok(Ready {
            stop: events[0].contains(PollFlags::IN),
            listener: events[1].contains(PollFlags::IN),
            connections: events[2..].to_vec(),
        })
    }

    /// Where all places are taken, a client that is between two requests can be sent away.
    fn has_room(&self) -> bool {
        self.connections.len() < MAX_CONNECTIONS || self.connections.iter().any(Connection::is_idle)
    }

    fn accept(&mut self, now: Instant) {
        self.accept_after = None;
        if self.connections.len() >= MAX_CONNECTIONS {
            let idle = self.connections.iter().enumerate().filter(|(_, c)| c.is_idle());
            let Some((longest, _)) = idle.min_by_key(|(_, c)| c.deadline()) else { return };
            self.connections.remove(longest);
        }
        match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => self.connections.push(Connection::new(UnixStream::from(stream), now)),
            // The client has gone away already.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(e) => {
                log::debug!("the control socket cannot accept a client: {e}");
                self.accept_after = Some(now + ACCEPT_PAUSE);
            }
        }
    }
}

/// Moves a client's bytes and answers at most one request, so that each client gets its turn. `true`: it may have sent
/// another one already.
fn serve(c: &mut Connection, events: PollFlags, handler: &mut impl Handler, now: Instant) -> bool {
    if events.contains(PollFlags::OUT) {
        c.write(now);
    }
    if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && c.wants_input() {
        c.read(now);
    }
    let request = c.next_request(now);
    if let Some(request) = &request {
        let response = handler.handle(request);
        // Answering may have taken some time.
        c.respond(request, &response, Instant::now());
    }
    if !c.is_closed() && c.deadline() <= now {
        c.time_out(now);
    }
    request.is_some() && !c.is_closed()
}

fn flags(c: &Connection) -> PollFlags {
    if c.wants_output() {
        PollFlags::OUT
    } else if c.wants_input() {
        PollFlags::IN
    } else {
        PollFlags::empty()
    }
}

fn timespec(d: Duration) -> Timespec {
    // Rounded up to a millisecond, so that nobody polls just before a limit.
    let d = d + Duration::from_millis(1);
    Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() }
}
