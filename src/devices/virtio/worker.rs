//! The thread of an active device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{Confined, ThreadKind};

use super::ActivateError;

/// What a device's thread does, event by event.
pub trait Served: Send + 'static {
    /// The descriptors that it waits for, each with the token that [`Served::event`] gets.
    fn events(&self) -> Vec<(RawFd, EventSet, u64)>;
    /// Descriptor `token` is ready. `epoll` is there to wait for more, or for less.
    fn event(&mut self, token: u64, ready: EventSet, epoll: &Epoll);
    /// Called once, on the device's own thread, after the last event: nothing may touch the queues afterwards.
    fn stop(&mut self) {}
}

const STOP: u64 = u64::MAX;
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
    stop: Arc<EventFd>,
    thread: JoinHandle<Option<Option<S>>>,
}

impl<S: Served> Worker<S> {
    /// Starts a thread named `name` that serves `state`, confined before it does.
    ///
    /// # Errors
    /// The host has no thread or descriptor left, or cannot confine it. The state comes back.
    pub fn start(name: &str, confined: Confined, state: S) -> Result<Self, NotStarted<S>> {
        let prepared = Epoll::new().and_then(|epoll| Ok((watch(&epoll, &state)?, epoll)));
        let (stop, epoll) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => return Err(NotStarted { error: e.into(), state: Some(state) }),
        };
        // A thread that does not start drops what it was given, but not what it takes once it runs.
        let place = Arc::new(Mutex::new(Some(state)));
        let (stop_event, taken) = (stop.clone(), place.clone());
        let thread = confined.spawn(ThreadKind::Worker, name.into(), STACK, move || {
            let mut state = lock(&taken).take()?;
            serve(&mut state, &epoll);
            drop(stop_event);
            Some(state)
        });
        match thread {
            Ok(thread) => Ok(Self { stop, thread }),
            Err(e) => Err(NotStarted { error: e.into(), state: lock(&place).take() }),
        }
    }

    /// Ends the thread and waits for it. `None`: it panicked, and its state is lost.
    pub fn stop(self) -> Option<S> {
        let _ = self.stop.write(1);
        self.thread.join().ok().flatten().flatten()
    }
}

/// Waits for what the state waits for, and for the end, whose event it makes.
fn watch(epoll: &Epoll, state: &impl Served) -> io::Result<Arc<EventFd>> {
    let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let add = |fd, set, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token));
    add(stop.as_raw_fd(), EventSet::IN, STOP)?;
    for (fd, set, token) in state.events() {
        add(fd, set, token)?;
    }
    Ok(stop)
}

/// What is behind it is whole: it is locked to move it alone.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve<S: Served>(state: &mut S, epoll: &Epoll) {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                log::error!("a device cannot wait for its events: {e}");
                break;
            }
        };
        if events[..count].iter().any(|e| e.data() == STOP) {
            break;
        }
        for event in &events[..count] {
            let ready = EventSet::from_bits_truncate(event.events());
            state.event(event.data(), ready, epoll);
        }
    }
    state.stop();
}
