//! The thread of an active device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{Confined, ThreadKind};

use super::ActivateError;

/// What a device's thread does, event by event.
pub trait Served: Send + 'static {
    /// What its thread is confined to.
    const THREAD: ThreadKind = ThreadKind::Worker;
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

/// A running device's thread. [`Worker::stop`] ends it and gives the device's state back.
pub struct Worker<S> {
    stop: Arc<EventFd>,
    thread: JoinHandle<Option<S>>,
}

impl<S: Served> Worker<S> {
    /// Starts a thread named `name` that serves `state`, confined before it does.
    ///
    /// # Errors
    /// The host has no thread or descriptor left, or cannot confine it.
    pub fn start(name: &str, confined: Confined, mut state: S) -> Result<Self, ActivateError> {
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        let watch = |fd, set, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token));
        watch(stop.as_raw_fd(), EventSet::IN, STOP)?;
        for (fd, set, token) in state.events() {
            watch(fd, set, token)?;
        }
        let stop_event = stop.clone();
        let thread = confined.spawn(S::THREAD, name.into(), STACK, move || {
            serve(&mut state, &epoll);
            drop(stop_event);
            state
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread and waits for it. `None`: it panicked, and its state is lost.
    pub fn stop(self) -> Option<S> {
        let _ = self.stop.write(1);
        self.thread.join().ok().flatten()
    }
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
