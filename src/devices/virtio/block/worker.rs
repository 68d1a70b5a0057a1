//! The thread of one queue of a disk: takes requests, has them done, gives them back.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::rate_limiter::RateLimiter;
use crate::devices::timer::Timer;
use crate::sys::file_io::{Action, Buffers};
use crate::vm::Memory;

use super::super::{ActiveQueue, Chain, EACH_SIGNAL, Interrupt, QueueError, Served, slice};
use super::counters::BlockCounters;
use super::engine::{Engine, Operation};
use super::image::Image;
use super::request::{HEADER_LEN, ID_LEN, Limits, Request, Status, status_address};

const NOTIFIED: u64 = 0;
const ENDED: u64 = 1;
const TIME: u64 = 2;

/// Bytes that one queue has under way, or one request's. A reset and a pause wait for all of it: a queue full of the
/// longest requests, of which each has 4 GiB, would take minutes. No driver is faster with more.
const MAX_MOVING: u64 = 64 << 20;

/// What all queues of a disk share.
pub struct Shared {
    /// Its name.
    pub id: String,
    /// Its file.
    pub image: Image,
    /// How much it may do.
    limiter: Mutex<RateLimiter>,
    /// Wakes the queues that may be waiting for the limiter.
    queues: Mutex<Vec<Arc<EventFd>>>,
    /// What it has done.
    pub counters: BlockCounters,
    /// Writes may stay in the host's cache until a flush.
    pub writeback: AtomicBool,
    /// An error of the host's was in the log: the guest can bring about as many as it likes.
    pub complained: AtomicBool,
}

/// Operations and bytes a second; `None`: any number.
pub type Rates = (Option<u64>, Option<u64>);

impl Shared {
    /// A disk that no driver has found yet.
    pub fn new(id: String, image: Image, counters: BlockCounters, limits: Rates) -> Self {
        Self {
            id,
            image,
            limiter: Mutex::new(RateLimiter::new(limits.0, limits.1)),
            queues: Mutex::default(),
            counters,
            writeback: AtomicBool::new(true),
            complained: AtomicBool::new(false),
        }
    }

    /// How much it may do.
    pub fn limits(&self) -> Rates {
        lock(&self.limiter).rates()
    }

    /// Changes how much it may do, from now on: a queue that waits asks again.
    pub fn set_limits(&self, limits: Rates) {
        *lock(&self.limiter) = RateLimiter::new(limits.0, limits.1);
        for queue in lock(&self.queues).iter() {
            let _ = queue.write(1);
        }
    }

    /// From now on `queue` is signalled when the limits change.
    pub fn limits_change_for(&self, queue: Arc<EventFd>) {
        lock(&self.queues).push(queue);
    }

    /// No queue waits any more.
    pub fn forget_queues(&self) {
        lock(&self.queues).clear();
    }
}

/// What is behind it stays whole when a thread panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request that the engine has.
struct Pending {
    request: Request,
    status: GuestAddress,
    /// Where on the disk it goes on: where in a file that is, the image says.
    at: u64,
    /// Bytes from there to the end of the file with them.
    room: u64,
    /// Zeros that are still to be written, where the file has no better way.
    zeros: u64,
    /// It has to be on the disk before it is given back, and what was done did not see to that.
    sync_after: bool,
}

/// The state of one queue.
pub struct BlockWorker {
    /// The queue.
    pub queue: ActiveQueue,
    /// The guest's memory.
    pub memory: Memory,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// What it shares with other queues.
    pub shared: Arc<Shared>,
    /// What requests are checked against.
    pub limits: Limits,
    /// What does the work.
    pub engine: Engine,
    /// Signalled by the engine.
    pub done: Arc<EventFd>,
    /// Runs while the limiter says no.
    pub timer: Timer,
    chain: Chain,
    /// By the index of their chain.
    pending: Vec<Option<Pending>>,
    in_flight: usize,
    /// Bytes of those that are in flight.
    moving: u64,
    /// A request was put back until there is less of them.
    crowded: bool,
}

/// What a worker is made from.
pub struct WorkerParts {
    /// The queue.
    pub queue: ActiveQueue,
    /// The guest's memory.
    pub memory: Memory,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// What it shares with other queues.
    pub shared: Arc<Shared>,
    /// The features that both sides have.
    pub features: u64,
    /// What does the work.
    pub engine: Engine,
    /// Signalled by the engine.
    pub done: Arc<EventFd>,
    /// Not running.
    pub timer: Timer,
}

impl BlockWorker {
    /// A worker that has not begun.
    pub fn new(parts: WorkerParts) -> Self {
        let WorkerParts { queue, memory, interrupt, shared, features, engine, done, timer } = parts;
        let image = &shared.image;
        let limits = Limits { sectors: image.sectors, readonly: image.readonly, features };
        let pending = (0..queue.queue.size()).map(|_| None).collect();
        Self {
            queue,
            memory,
            interrupt,
            shared,
            limits,
            engine,
            done,
            timer,
            chain: Chain::default(),
            pending,
            in_flight: 0,
            moving: 0,
            crowded: false,
        }
    }

    /// Takes what is there, and gives back what has ended.
    fn serve(&mut self) {
        let result = self.take_all().and_then(|()| self.give_back());
        if let Err(e) = result {
            self.interrupt.needs_reset(&self.shared.id, &e);
        }
    }

    /// At most one queue full at a time: a guest that offers on and on must not keep us from hearing of the end.
    fn take_all(&mut self) -> Result<(), QueueError> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        let memory = self.memory.clone();
        let memory = memory.guest();
        self.queue.queue.disable_notify(memory)?;
        for _ in 0..self.queue.queue.size() {
            if self.queue.queue.pop(memory, &mut self.chain)? {
                if !self.begin()? {
                    return Ok(());
                }
            } else if !self.queue.queue.enable_notify(memory)? {
                return Ok(());
            }
        }
        self.queue.serve_again();
        Ok(())
    }

    /// Begins the request in `chain`. `false`: it was put back, as its time has not come.
    fn begin(&mut self) -> Result<bool, QueueError> {
        let status = status_address(&self.chain)?;
        let request = match self.limits.parse(self.memory.guest(), &self.chain)? {
            Ok(request) => request,
            Err(error) => {
                self.shared.counters.errors.increment();
                self.finish(self.chain.head(), status, error, 0)?;
                return Ok(true);
            }
        };
        self.crowded = self.in_flight > 0 && self.moving.saturating_add(request.bytes()) > MAX_MOVING;
        if self.crowded || !self.may_begin(&request) {
            self.queue.queue.undo_pop(&self.chain);
            return Ok(false);
        }
        match self.operation(&request)? {
            Some(operation) => self.start(operation, request, status)?,
            None => self.finish_now(&request, status)?,
        }
        Ok(true)
    }

    /// Asks the limiter, and sets the timer where it says no.
    fn may_begin(&self, request: &Request) -> bool {
        let mut limiter = lock(&self.shared.limiter);
        let Err(wait) = limiter.take(1, request.bytes()) else { return true };
        self.shared.counters.throttled.increment();
        // Fails for times that no rate asks for.
        let _ = self.timer.set(wait);
        false
    }

    /// What is to be done to the file for it; `None` where nothing is.
    fn operation(&self, request: &Request) -> Result<Option<Operation>, QueueError> {
        let durable = self.is_durable();
        let (action, offset, buffers) = match *request {
            Request::Read { len: 0, .. } | Request::Write { len: 0, .. } | Request::GetId => return Ok(None),
            Request::Flush if self.limits.readonly => return Ok(None),
            Request::Read { offset, len } => (Action::Read, offset, self.buffers(true, 0, len)?),
            Request::Write { offset, len } => {
                (Action::Write { durable }, offset, self.buffers(false, HEADER_LEN, len)?)
            }
            Request::Flush => (Action::Sync, 0, Buffers::empty()),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, unmap: true } => {
                (Action::PunchHole(len), offset, Buffers::empty())
            }
            Request::WriteZeroes { offset, len, unmap: false } => {
                (Action::ZeroRange(len), offset, Buffers::empty())
            }
        };
        let file = self.shared.image.buffered(offset).clone();
        Ok(Some(Operation { tag: self.chain.head(), file, action, offset, buffers }))
    }

    /// The guest's memory itself: nothing is copied on the way.
    fn buffers(&self, writable: bool, offset: u32, len: u32) -> Result<Buffers<Memory>, QueueError> {
        let segments = if writable { self.chain.writable() } else { self.chain.readable() };
        let pieces = slice(segments, offset, len).map(|s| (s.address.0, s.len));
        // Checked when the chain was read.
        Buffers::new(self.memory.clone(), pieces).ok_or(QueueError::Shape)
    }

    /// A driver that does not flush, or said so, takes a write for done when it is on the disk (§5.2.6.2).
    fn is_durable(&self) -> bool {
        !self.shared.writeback.load(Ordering::Relaxed)
    }

    fn start(
        &mut self,
        operation: Operation,
        request: Request,
        status: GuestAddress,
    ) -> Result<(), QueueError> {
        let is_range = matches!(operation.action, Action::PunchHole(_) | Action::ZeroRange(_));
        let sync_after = is_range && self.is_durable();
        self.in_flight += 1;
        self.moving += request.bytes();
        let at = operation.offset;
        let pending = Pending { request, status, at, room: 0, zeros: 0, sync_after };
        self.pending[usize::from(operation.tag)] = Some(pending);
        self.push(operation)
    }

    /// Has a pending request's operation done, by the file that has its next byte.
    fn push(&mut self, mut operation: Operation) -> Result<(), QueueError> {
        if let Some(pending) = &mut self.pending[usize::from(operation.tag)] {
            pending.room = self.shared.image.choose(&mut operation, pending.at);
        }
        match self.engine.push(operation) {
            Ok(()) => Ok(()),
            // There is room for each chain of the queue, so this is for an engine that has gone.
            Err(operation) => self.end(operation.tag, Status::IoError),
        }
    }

    fn finish_now(&mut self, request: &Request, status: GuestAddress) -> Result<(), QueueError> {
        let mut written = 0;
        if *request == Request::GetId {
            let mut id = [0; ID_LEN as usize];
            for (byte, value) in id.iter_mut().zip(self.shared.id.bytes()) {
                *byte = value;
            }
            self.chain.write(self.memory.guest(), 0, &id)?;
            written = ID_LEN;
        }
        self.count(request);
        self.finish(self.chain.head(), status, Status::Ok, written)
    }

    /// Gives a chain back. `written`: bytes in front of the status.
    fn finish(
        &mut self,
        head: u16,
        status: GuestAddress,
        value: Status,
        written: u32,
    ) -> Result<(), QueueError> {
        let memory = self.memory.guest();
        memory.write_obj(value as u8, status)?;
        self.queue.queue.push_used(memory, head, written + 1)
    }

    /// Has the engine begin, and gives back what has ended already.
    fn give_back(&mut self) -> Result<(), QueueError> {
        // Twice: what ended may have gone on. More comes with the next event.
        for _ in 0..2 {
            if self.engine.submit().is_err() {
                // Tried again after the other events.
                let _ = self.done.write(1);
            }
            if !self.reap()? {
                break;
            }
        }
        self.queue.queue.publish_to(self.memory.guest(), &self.interrupt)?;
        Ok(())
    }

    /// Whether something was begun again.
    fn reap(&mut self) -> Result<bool, QueueError> {
        let mut again = false;
        for _ in 0..self.queue.queue.size() {
            let Some((operation, result)) = self.engine.complete() else { break };
            again |= self.ended(operation, result)?;
        }
        Ok(again)
    }

    /// An operation has ended: so has its request, or it goes on (`true`).
    fn ended(&mut self, mut operation: Operation, result: io::Result<usize>) -> Result<bool, QueueError> {
        let tag = operation.tag;
        let Some(pending) = self.pending.get_mut(usize::from(tag)).and_then(Option::as_mut) else {
            return Ok(false);
        };
        let next = match result {
            Ok(count) => pending.advance(&mut operation, count),
            Err(e) => pending.recover(&mut operation, &e, &self.shared),
        };
        match next {
            Next::Again => self.push(operation).map(|()| true),
            Next::End(status) => self.end(tag, status).map(|()| false),
        }
    }

    fn end(&mut self, tag: u16, status: Status) -> Result<(), QueueError> {
        let Some(pending) = self.pending[usize::from(tag)].take() else { return Ok(()) };
        self.in_flight -= 1;
        self.moving -= pending.request.bytes();
        let written = match (&pending.request, status) {
            (Request::Read { len, .. }, Status::Ok) => *len,
            _ => 0,
        };
        match status {
            Status::Ok => self.count(&pending.request),
            _ => self.shared.counters.errors.increment(),
        }
        self.finish(tag, pending.status, status, written)
    }

    fn count(&self, request: &Request) {
        let counters = &self.shared.counters;
        match request {
            Request::Read { len, .. } => {
                counters.reads.increment();
                counters.read_bytes.add(u64::from(*len));
            }
            Request::Write { len, .. } => {
                counters.writes.increment();
                counters.written_bytes.add(u64::from(*len));
            }
            Request::Flush => counters.flushes.increment(),
            _ => {}
        }
    }
}

/// What comes after an operation.
enum Next {
    /// It is done again, for what is left.
    Again,
    /// The request has ended.
    End(Status),
}

impl Pending {
    /// So many bytes were moved, which may be fewer than were asked for.
    fn advance(&mut self, operation: &mut Operation, count: usize) -> Next {
        match operation.action {
            // The file has become shorter, or the disk takes nothing: on and on would not help.
            Action::Read | Action::Write { .. } if count == 0 => return Next::End(Status::IoError),
            Action::Read | Action::Write { .. } => {
                // A file that has become longer has bytes where the next one's belong, which are read over these.
                let count = self.room.min(count as u64);
                operation.buffers.advance(count as usize);
                self.at += count;
                self.zeros = self.zeros.saturating_sub(count);
                if operation.buffers.len() == 0 && self.zeros > 0 {
                    operation.buffers = Buffers::zeros(self.zeros);
                }
                if operation.buffers.len() > 0 {
                    return Next::Again;
                }
            }
            Action::PunchHole(_) | Action::ZeroRange(_) | Action::Sync => {}
        }
        if std::mem::take(&mut self.sync_after) {
            operation.action = Action::Sync;
            return Next::Again;
        }
        Next::End(Status::Ok)
    }

    /// It failed: tries what else there is.
    fn recover(&mut self, operation: &mut Operation, error: &io::Error, shared: &Shared) -> Next {
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        match (operation.action, errno) {
            (_, Some(Errno::INTR)) => return Next::Again,
            // Freeing is a wish. That the range reads as zeros is none.
            (Action::PunchHole(_), Some(Errno::OPNOTSUPP))
                if matches!(self.request, Request::Discard { .. }) =>
            {
                return Next::End(Status::Unsupported);
            }
            (Action::PunchHole(len) | Action::ZeroRange(len), Some(Errno::OPNOTSUPP)) => {
                self.zeros = len;
                operation.action = Action::Write { durable: false };
                operation.buffers = Buffers::zeros(len);
                return Next::Again;
            }
            _ => {}
        }
        if !shared.complained.swap(true, Ordering::Relaxed) {
            log::warn!("{}: an I/O error, which the guest is told of: {error}", shared.id);
        }
        Next::End(Status::IoError)
    }
}

impl Served for BlockWorker {
    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        vec![
            (self.queue.notify.as_raw_fd(), EACH_SIGNAL, NOTIFIED),
            (self.done.as_raw_fd(), EACH_SIGNAL, ENDED),
            (self.timer.as_raw_fd(), EventSet::IN, TIME),
        ]
    }

    fn event(&mut self, token: u64, _ready: EventSet, _epoll: &Epoll) {
        match token {
            ENDED => {
                if let Err(e) = self.give_back() {
                    self.interrupt.needs_reset(&self.shared.id, &e);
                }
                if !std::mem::take(&mut self.crowded) {
                    return;
                }
            }
            TIME => self.timer.acknowledge(),
            _ => {}
        }
        self.serve();
    }

    /// Waits for what is under way: afterwards nothing reaches guest memory any more.
    fn drain(&mut self) {
        while self.in_flight > 0 {
            self.engine.wait();
            if let Err(e) = self.give_back() {
                self.interrupt.needs_reset(&self.shared.id, &e);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::config::DiskConfig;
    use crate::metrics::Registry;

    use super::*;

    const LEN: u64 = 3 << 20;

    fn shared(path: &std::path::Path) -> Shared {
        let image = Image::open(&DiskConfig::new(path.into())).unwrap();
        let counters = BlockCounters::new(&Registry::default().group(&[]));
        Shared::new("disk0".into(), image, counters, (None, None))
    }

    fn zeroes(shared: &Shared) -> (Pending, Operation) {
        let request = Request::WriteZeroes { offset: 512, len: LEN, unmap: false };
        let (at, room) = (512, LEN + 512);
        let pending = Pending { request, status: GuestAddress(0), at, room, zeros: 0, sync_after: true };
        let file = shared.image.buffered(at).clone();
        let action = Action::ZeroRange(LEN);
        (pending, Operation { tag: 0, file, action, offset: 512, buffers: Buffers::empty() })
    }

    #[test]
    fn zeros_are_written_where_the_file_system_has_no_better_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![7; LEN as usize + 1024]).unwrap();
        let shared = shared(file.path());
        let (mut pending, mut operation) = zeroes(&shared);
        let refused = io::Error::from(Errno::OPNOTSUPP);
        assert!(matches!(pending.recover(&mut operation, &refused, &shared), Next::Again));
        let mut calls = 0;
        loop {
            let count = operation.perform().unwrap();
            let Next::Again = pending.advance(&mut operation, count) else { break };
            pending.room = shared.image.choose(&mut operation, pending.at);
            calls += 1;
        }
        // 1 MiB each, and a sync.
        assert_eq!((calls, operation.action), (3, Action::Sync));
        let bytes = fs::read(file.path()).unwrap();
        assert!(bytes[512..512 + LEN as usize].iter().all(|b| *b == 0));
        assert!(bytes[..512].iter().chain(&bytes[512 + LEN as usize..]).all(|b| *b == 7));
        assert_eq!(bytes.len() as u64, LEN + 1024);
    }

    #[test]
    fn what_was_interrupted_or_short_goes_on() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [7; 1024]).unwrap();
        let shared = shared(file.path());
        let (mut pending, mut operation) = zeroes(&shared);
        let interrupted = io::Error::from(Errno::INTR);
        assert!(matches!(pending.recover(&mut operation, &interrupted, &shared), Next::Again));
        operation.action = Action::Write { durable: false };
        operation.buffers = Buffers::zeros(512);
        assert!(matches!(pending.advance(&mut operation, 100), Next::Again));
        assert_eq!((pending.at, operation.buffers.len()), (612, 412));
        assert!(matches!(pending.advance(&mut operation, 0), Next::End(Status::IoError)));
        let full = io::Error::from(Errno::NOSPC);
        assert!(matches!(pending.recover(&mut operation, &full, &shared), Next::End(Status::IoError)));
    }
}
