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

    /// Does the jobs that wait, and none that comes meanwhile: vCPUs that always want something would keep the VMM's
    /// thread from all else, as the signal that ends them. What they start is `confined`, too.
    pub fn run_all(&self, confined: Confined) {
        // Counted once each, after it was sent: so many are there.
        let count = self.wake.read().unwrap_or(0);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.jobs.try_iter().take(count).for_each(|job| job(confined));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn vcpus_that_always_want_something_leave_time_for_others() {
        let (vmm, jobs) = VmmThread::new().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        // Each has its next job there while another's is being done.
        let ask = |vmm: VmmThread, stop: Arc<AtomicBool>| {
            thread::spawn(move || {
                while !stop.load(Ordering::SeqCst)
                    && vmm.run(|_| thread::sleep(Duration::from_millis(1))).is_some()
                {}
            })
        };
        let vcpus = [(); 4].map(|()| ask(vmm.clone(), stop.clone()));
        let begin = Instant::now();
        // Where the loop below does not end by itself.
        let limit = thread::spawn(move || {
            thread::sleep(Duration::from_secs(2));
            stop.store(true, Ordering::SeqCst);
        });
        for _ in 0..20 {
            jobs.run_all(Confined::not());
        }
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        drop(jobs);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        drop(limit);
    }
}
