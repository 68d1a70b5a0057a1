//! What does the operations of one queue: io_uring, or a pool of threads.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{Confined, SandboxError, ThreadKind};
use crate::sys::file_io;
use crate::sys::uring::Ring;
use crate::vm::Memory;

/// An operation on guest memory.
pub type Operation = file_io::Operation<Memory>;
/// One that has ended, and how.
pub type Ended = (Operation, io::Result<usize>);

/// Threads of a disk: what a slow one can do at a time.
const THREADS: usize = 4;
const STACK: usize = 64 << 10;

/// Does operations, all at the same time, and gives each back when it has ended.
pub enum Engine {
    /// By io_uring.
    Uring(Box<Ring<Memory>>),
    /// By the threads of a [`Pool`].
    Threads(Client),
}

impl Engine {
    /// Begins an operation, at the latest with the next [`Engine::submit`].
    ///
    /// # Errors
    /// There is no room for it, which a queue's worth of operations always has.
    pub fn push(&mut self, operation: Operation) -> Result<(), Operation> {
        match self {
            Self::Uring(ring) => ring.push(operation),
            Self::Threads(client) => client.push(operation),
        }
    }

    /// Begins what was pushed.
    ///
    /// # Errors
    /// The kernel is out of something for the moment: try again later.
    pub fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.submit(0),
            Self::Threads(_) => Ok(()),
        }
    }

    /// The next operation that has ended.
    pub fn complete(&mut self) -> Option<Ended> {
        match self {
            Self::Uring(ring) => ring.complete(),
            Self::Threads(client) => client.complete(),
        }
    }

    /// Waits until one has ended, where there is any.
    pub fn wait(&mut self) {
        match self {
            Self::Uring(ring) if ring.in_flight() > 0 => {
                if ring.submit(1).is_err() {
                    thread::yield_now();
                }
            }
            Self::Uring(_) => {}
            Self::Threads(client) => client.wait(),
        }
    }
}

/// Where the pool puts what has ended.
struct Done {
    ended: Mutex<Vec<Ended>>,
    changed: Condvar,
    event: Arc<EventFd>,
}

impl Done {
    fn ended(&self) -> MutexGuard<'_, Vec<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue's end of a [`Pool`].
pub struct Client {
    jobs: Sender<Job>,
    done: Arc<Done>,
    in_flight: usize,
}

impl Client {
    fn push(&mut self, operation: Operation) -> Result<(), Operation> {
        let job = Job { operation, done: self.done.clone() };
        self.jobs.send(job).map_err(|e| e.0.operation)?;
        self.in_flight += 1;
        Ok(())
    }

    fn complete(&mut self) -> Option<Ended> {
        let ended = self.done.ended().pop()?;
        self.in_flight -= 1;
        Some(ended)
    }

    fn wait(&self) {
        let mut ended = self.done.ended();
        while ended.is_empty() && self.in_flight > 0 {
            ended = self.done.changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Job {
    operation: Operation,
    done: Arc<Done>,
}

impl Job {
    fn run(self) {
        let result = self.operation.perform();
        self.done.ended().push((self.operation, result));
        self.done.changed.notify_one();
        let _ = self.done.event.write(1);
    }
}

/// Threads that do the operations of a disk. They end when it and its clients are dropped.
pub struct Pool {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<Option<()>>>,
}

impl Pool {
    /// Starts the threads, by the name of their disk.
    ///
    /// # Errors
    /// The host has no thread left, or cannot confine it.
    pub fn start(name: &str, confined: Confined) -> Result<Self, SandboxError> {
        let (sender, receiver) = mpsc::channel();
        let mut pool = Self { jobs: Some(sender), threads: Vec::new() };
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..THREADS {
            let jobs = receiver.clone();
            let name = format!("{name}-io");
            pool.threads.push(confined.spawn(ThreadKind::Worker, name, STACK, move || serve(&jobs))?);
        }
        Ok(pool)
    }

    /// An end for a queue, which signals `event` when an operation has ended.
    pub fn client(&self, event: Arc<EventFd>) -> Option<Client> {
        let done = Done { ended: Mutex::default(), changed: Condvar::new(), event };
        Some(Client { jobs: self.jobs.clone()?, done: Arc::new(done), in_flight: 0 })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(jobs: &Mutex<Receiver<Job>>) {
    loop {
        // The lock goes before the work begins.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job.run(),
            Err(_) => return,
        }
    }
}
