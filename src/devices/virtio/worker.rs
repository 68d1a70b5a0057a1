//! The thread of an active device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::sandbox::{Confined, ThreadKind};

use super::ActivateError;
use super::pause::{Next, WorkerControl};

/// What a device's thread does, event by event.
pub trait Served: Send + 'static {
    /// What its thread is confined to.
    const THREAD: ThreadKind = ThreadKind::Worker;
    /// The descriptors that it waits for, each with the token that [`Served::event`] gets.
    fn events(&self) -> Vec<(RawFd, EventSet, u64)>;
    /// Has others go on with what they do for it. Called on the device's own thread, before the first event and after each
    /// pause, also one that was given up; it may go on already.
    fn begin(&mut self) {}
    /// Descriptor `token` is ready. `epoll` is there to wait for more, or for less.
    fn event(&mut self, token: u64, ready: EventSet, epoll: &Epoll);
    /// Waits for what others do for it, as the kernel with io_uring: until the next event nothing may touch guest
    /// memory. Called on the device's own thread, before a pause and after the last event.
    fn drain(&mut self) {}
    /// Called once, on the device's own thread, after the last event: nothing may touch the queues afterwards.
    fn stop(&mut self) {}
}

/// How to wait for an event descriptor that nobody has to read: told once for each signal, or once for several that came
/// together. What is signalled from the look at it on is told anew.
pub const EACH_SIGNAL: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

const CONTROL: u64 = u64::MAX;
/// Enough for a device's call depth and the largest header on the stack.
const STACK: usize = 256 << 10;
/// Events taken at once.
const BATCH: usize = 16;

/// A worker could not be started. Its state is there for another try: what it has of the host cannot be had again once
/// the VM is confined.
pub struct NotStarted<S> {
    /// Why.
    pub error: ActivateError,
    /// `None`: it was lost with its thread, which cannot happen before it has begun.
    pub state: Option<S>,
}

impl<S> From<NotStarted<S>> for ActivateError {
    fn from(not_started: NotStarted<S>) -> Self {
        not_started.error
    }
}

/// A running device's thread. [`Worker::stop`] ends it and gives the device's state back.
pub struct Worker<S> {
    control: WorkerControl,
    thread: JoinHandle<Option<Option<S>>>,
}

impl<S: Served> Worker<S> {
    /// Starts a thread named `name` that serves `state`, confined before it does.
    ///
    /// # Errors
    /// The host has no thread or descriptor left, or cannot confine it. The state comes back.
    pub fn start(name: &str, confined: Confined, state: S) -> Result<Self, NotStarted<S>> {
        let prepared = WorkerControl::new(name).and_then(|control| Ok((watch(&control, &state)?, control)));
        let (epoll, control) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => return Err(NotStarted { error: e.into(), state: Some(state) }),
        };
        // A thread that does not start drops what it was given, but not what it takes once it runs.
        let place = Arc::new(Mutex::new(Some(state)));
        let (own_control, taken) = (control.clone(), place.clone());
        let thread = confined.spawn(S::THREAD, name.into(), STACK, move || {
            // However the thread ends, nobody waits for it any more.
            let _ending = own_control.ends_with_this();
            let mut state = lock(&taken).take()?;
            serve(&mut state, &epoll, &own_control);
            Some(state)
        });
        match thread {
            Ok(thread) => Ok(Self { control, thread }),
            Err(e) => Err(NotStarted { error: e.into(), state: lock(&place).take() }),
        }
    }

    /// The way to pause it.
    pub fn control(&self) -> WorkerControl {
        self.control.clone()
    }

    /// Ends the thread and waits for it. `None`: it panicked, and its state is lost. Only where panics unwind, as in tests: in
    /// a release build a panic ends the VM, since what was half done may not be served on (docs/security.md).
    pub fn stop(self) -> Option<S> {
        self.control.stop();
        self.thread.join().ok().flatten().flatten()
    }
}

/// Waits for what the state waits for, and for what there is to obey.
fn watch(control: &WorkerControl, state: &impl Served) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |fd, set, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token));
    add(control.as_raw_fd(), EventSet::IN, CONTROL)?;
    for (fd, set, token) in state.events() {
        add(fd, set, token)?;
    }
    Ok(epoll)
}

/// What is behind it is whole: it is locked to move it alone.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve<S: Served>(state: &mut S, epoll: &Epoll, control: &WorkerControl) {
    let mut events = [EpollEvent::default(); BATCH];
    state.begin();
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                log::error!("a device cannot wait for its events: {e}");
                break;
            }
        };
        // Before the others: what they ask for comes after a pause, or never.
        if events[..count].iter().any(|e| e.data() == CONTROL) {
            match control.obey(|| state.drain()) {
                Next::End => break,
                Next::Serve => state.begin(),
            }
        }
        // Also those that came with a pause: an edge is told once.
        for event in events[..count].iter().filter(|e| e.data() != CONTROL) {
            let ready = EventSet::from_bits_truncate(event.events());
            state.event(event.data(), ready, epoll);
        }
    }
    state.drain();
    state.stop();
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::time::{Duration, Instant};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    /// Counts its events without end, and drains when it may.
    struct Counting {
        event: EventFd,
        count: Arc<AtomicU64>,
        begun: Arc<AtomicU64>,
        draining: Sender<()>,
        may_drain: Receiver<()>,
        panics: Arc<AtomicBool>,
    }

    impl Served for Counting {
        fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
            vec![(self.event.as_raw_fd(), EventSet::IN, 0)]
        }

        fn begin(&mut self) {
            self.begun.fetch_add(1, Ordering::SeqCst);
        }

        fn event(&mut self, _token: u64, _ready: EventSet, _epoll: &Epoll) {
            // The event is never read: always ready, as a hostile guest's queue.
            self.count.fetch_add(1, Ordering::SeqCst);
            assert!(!self.panics.load(Ordering::SeqCst), "as asked");
        }

        fn drain(&mut self) {
            let _ = self.draining.send(());
            let _ = self.may_drain.recv();
        }
    }

    struct Rig {
        worker: Worker<Counting>,
        count: Arc<AtomicU64>,
        begun: Arc<AtomicU64>,
        draining: Receiver<()>,
        let_drain: Sender<()>,
        panics: Arc<AtomicBool>,
    }

    fn rig() -> Rig {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        event.write(1).unwrap();
        let ((draining, drains), (let_drain, may_drain)) = (mpsc::channel(), mpsc::channel());
        let (count, begun) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let panics = Arc::<AtomicBool>::default();
        let state = Counting {
            event,
            count: count.clone(),
            begun: begun.clone(),
            draining,
            may_drain,
            panics: panics.clone(),
        };
        let worker = Worker::start("counting", Confined::not(), state);
        let worker = worker.unwrap_or_else(|e| panic!("{}", e.error));
        Rig { worker, count, begun, draining: drains, let_drain, panics }
    }

    impl Rig {
        fn wait_for_events(&self) {
            let (before, begin) = (self.count.load(Ordering::SeqCst), Instant::now());
            while self.count.load(Ordering::SeqCst) == before {
                assert!(begin.elapsed() < Duration::from_secs(10), "it does nothing");
                std::thread::yield_now();
            }
        }

        fn assert_still(&self) {
            let before = self.count.load(Ordering::SeqCst);
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            assert_eq!(self.count.load(Ordering::SeqCst), before, "it works while it is paused");
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_paused_worker_does_nothing_until_it_is_resumed() {
        let rig = rig();
        let control = rig.worker.control();
        for pauses in 0..3 {
            rig.wait_for_events();
            assert!(rig.begun.load(Ordering::SeqCst) > pauses, "others were not told to go on");
            rig.let_drain.send(()).unwrap();
            control.ask_to_pause();
            assert!(control.is_paused_by(soon()));
            rig.assert_still();
            // Once more is the same.
            control.ask_to_pause();
            assert!(control.is_paused_by(soon()));
            control.resume();
        }
        rig.wait_for_events();
        drop(rig.let_drain);
        assert!(rig.worker.stop().is_some());
    }

    #[test]
    fn a_pause_takes_as_long_as_the_drain_and_can_be_given_up() {
        let rig = rig();
        let control = rig.worker.control();
        rig.wait_for_events();
        control.ask_to_pause();
        rig.draining.recv().unwrap();
        assert!(!control.is_paused_by(Instant::now() + Duration::from_millis(20)));
        control.resume();
        rig.let_drain.send(()).unwrap();
        rig.wait_for_events();
        drop(rig.let_drain);
        rig.worker.stop().unwrap();
    }

    #[test]
    fn a_paused_worker_can_be_stopped() {
        let rig = rig();
        drop(rig.let_drain);
        let control = rig.worker.control();
        control.ask_to_pause();
        assert!(control.is_paused_by(soon()));
        assert!(rig.worker.stop().is_some());
        assert!(control.is_paused_by(soon()), "what has ended does nothing");
    }

    /// Says which of its events came, and holds its thread in the first kind until it is let go.
    struct Edges {
        gate: EventFd,
        edge: EventFd,
        came: Sender<u64>,
        may_go: Receiver<()>,
    }

    impl Served for Edges {
        fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
            let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
            vec![(self.gate.as_raw_fd(), EventSet::IN, 0), (self.edge.as_raw_fd(), edge, 1)]
        }

        fn event(&mut self, token: u64, _ready: EventSet, _epoll: &Epoll) {
            self.came.send(token).unwrap();
            if token == 0 {
                self.gate.read().unwrap();
                let _ = self.may_go.recv();
            }
        }
    }

    /// The sockets of vsock are watched so: what an edge says is said once.
    #[test]
    fn an_edge_that_comes_with_a_pause_is_not_lost() {
        let new = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (gate, edge) = (new(), new());
        let ((came, comes), (let_go, may_go)) = (mpsc::channel(), mpsc::channel());
        let (gate_too, edge_too) = (gate.try_clone().unwrap(), edge.try_clone().unwrap());
        let worker = Worker::start("edges", Confined::not(), Edges { gate, edge, came, may_go });
        let worker = worker.unwrap_or_else(|e| panic!("{}", e.error));
        let control = worker.control();
        gate_too.write(1).unwrap();
        assert_eq!(comes.recv(), Ok(0));
        // While the thread is busy, both become ready: it takes them at once.
        edge_too.write(1).unwrap();
        control.ask_to_pause();
        let_go.send(()).unwrap();
        assert!(control.is_paused_by(soon()));
        assert!(comes.try_recv().is_err(), "it works while it is paused");
        control.resume();
        assert_eq!(comes.recv_timeout(Duration::from_secs(10)), Ok(1));
        drop(let_go);
        assert!(worker.stop().is_some());
    }

    #[test]
    fn a_worker_that_panicked_holds_no_pause_up() {
        let rig = rig();
        let control = rig.worker.control();
        rig.panics.store(true, Ordering::SeqCst);
        drop(rig.let_drain);
        control.ask_to_pause();
        assert!(control.is_paused_by(soon()));
        assert!(rig.worker.stop().is_none_or(|_| true));
    }
}
