//! A way for vCPUs to have something done on the VMM's thread.
//!
//! A device starts its threads when it is activated, which a vCPU's write brings about. A vCPU's system calls are
//! confined more than the VMM's: it may not start threads.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::Confined;
use crate::sys::event::new_event;

type Job = Box<dyn FnOnce(Confined) + Send>;

/// The vCPU's end.
#[derive(Clone)]
pub struct VmmThread {
    jobs: Option<Sender<Job>>,
    wake: Arc<EventFd>,
}

/// The VMM's end. Once it is dropped, every job that waits is given up, and so is every later one.
pub struct VmmThreadJobs {
    jobs: Receiver<Job>,
    wake: Arc<EventFd>,
}

impl VmmThread {
    /// Both ends.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<(Self, VmmThreadJobs)> {
        let wake = Arc::new(new_event()?);
        let (sender, jobs) = mpsc::channel();
        Ok((Self { jobs: Some(sender), wake: wake.clone() }, VmmThreadJobs { jobs, wake }))
    }

    /// One that does everything at once, on the caller's thread: for tests without a VMM.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn inline() -> io::Result<Self> {
        Ok(Self { jobs: None, wake: Arc::new(new_event()?) })
    }

    /// Has `job` done, and waits for its result. `None`: the VM is being stopped.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce(Confined) -> T + Send + 'static) -> Option<T> {
        let Some(jobs) = &self.jobs else { return Some(job(Confined::not())) };
        let (sender, result) = mpsc::channel();
        let job = Box::new(move |confined| {
            // The caller waits, unless its thread has died.
            let _ = sender.send(job(confined));
        });
        jobs.send(job).ok()?;
        let _ = self.wake.write(1);
        result.recv().ok()
    }
}

impl VmmThreadJobs {
    /// Readable when there is a job.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.wake
    }

    /// Does all jobs that wait. What they start is `confined`, too.
    pub fn run_all(&self, confined: Confined) {
        let _ = self.wake.read();
        self.jobs.try_iter().for_each(|job| job(confined));
    }
}
