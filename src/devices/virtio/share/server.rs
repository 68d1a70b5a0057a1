//! The threads that do a share's requests. They alone may open, make and remove files, and only in the shared folder:
//! they start before the VMM's thread is confined, whose filter they would have otherwise, and live as long as the VM.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{Confined, Folder, Kept, SandboxError, ThreadKind};
use crate::sys::signals;
use crate::sys::umask::own_umask;
use crate::vm::Memory;

use super::super::{Chain, QueueError};
use super::session::Session;

/// Threads of a share: a request that is slow, as an fsync, holds up the others no sooner than there are so many.
const THREADS: usize = 4;
const STACK: usize = 128 << 10;

/// A request that is to be done.
pub struct Job {
    /// Of which queue it is.
    pub queue: usize,
    pub chain: Chain,
    pub memory: Memory,
    pub done: Arc<Done>,
}

/// One that is done, and how many bytes were written to it.
pub struct Ended {
    pub queue: usize,
    pub chain: Chain,
    pub written: Result<u32, QueueError>,
}

/// Where requests come when they are done.
pub struct Done {
    ended: Mutex<Vec<Ended>>,
    changed: Condvar,
    /// Signalled then.
    pub event: EventFd,
}

impl Done {
    /// An empty one.
    pub fn new(event: EventFd) -> Self {
        Self { ended: Mutex::default(), changed: Condvar::new(), event }
    }

    /// Takes all that has come.
    pub fn take(&self) -> Vec<Ended> {
        std::mem::take(&mut *self.lock())
    }

    /// Waits until something has come, which must be under way.
    pub fn wait(&self) {
        drop(self.changed.wait_while(self.lock(), |ended| ended.is_empty()));
    }

    fn put(&self, ended: Ended) {
        self.lock().push(ended);
        self.changed.notify_one();
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a thread is told.
pub enum Order {
    /// Does a request.
    Work(Job),
    /// Ends.
    End,
}

/// A share's threads, not started yet.
pub struct Server {
    id: String,
    session: Arc<Session>,
    orders: (Sender<Order>, Receiver<Order>),
}

impl Server {
    pub(super) fn new(id: String, session: Arc<Session>) -> Self {
        Self { id, session, orders: mpsc::channel() }
    }

    /// Where requests are given in.
    pub(super) fn orders(&self) -> Sender<Order> {
        self.orders.0.clone()
    }

    /// Names the descriptors that stay open when the VM confines itself, and what Landlock is to allow.
    pub fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        let folder = &self.session.folder;
        folder.keep(kept);
        self.session.inodes.keep(kept);
        let (descriptor, readonly) = (folder.descriptor(), folder.readonly);
        vec![match folder.file {
            Some(_) => Folder::SharedFile { file: descriptor, readonly },
            None => Folder::Shared { folder: descriptor, readonly },
        }]
    }

    /// Starts them. They end when what this returns is dropped.
    ///
    /// # Errors
    /// The host has no thread left, or cannot confine it.
    pub fn start(self, confined: Confined) -> Result<Threads, SandboxError> {
        // A guest that writes beyond the user's limit (ulimit -f) gets the error, and this process no signal.
        signals::ignore(libc::SIGXFSZ);
        let kind = if self.session.folder.readonly { ThreadKind::ReadOnlyShare } else { ThreadKind::Share };
        let (sender, receiver) = self.orders;
        let receiver = Arc::new(Mutex::new(receiver));
        let mut threads = Threads { orders: sender, threads: Vec::new() };
        for _ in 0..THREADS {
            let (orders, session) = (receiver.clone(), self.session.clone());
            let body = move || work(&orders, &session);
            threads.threads.push(confined.spawn(kind, self.id.clone(), STACK, body)?);
        }
        Ok(threads)
    }
}

/// A share's threads.
pub struct Threads {
    orders: Sender<Order>,
    threads: Vec<JoinHandle<Option<()>>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        for _ in &self.threads {
            let _ = self.orders.send(Order::End);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(orders: &Mutex<Receiver<Order>>, session: &Session) {
    if !session.folder.readonly
        && let Err(e) = own_umask()
    {
        log::warn!("a share's new files have fewer permissions than its guest asks for: {e}");
    }
    loop {
        // The lock goes before the work begins.
        let order = orders.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match order {
            Ok(Order::Work(Job { queue, chain, memory, done })) => {
                let written = if session.is_ending() { Ok(0) } else { session.serve(&memory, &chain) };
                done.put(Ended { queue, chain, written });
            }
            Ok(Order::End) | Err(_) => return,
        }
    }
}
