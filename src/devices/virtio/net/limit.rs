//! The rate limit of one direction. It outlives drivers: a guest gains nothing by a reset.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::devices::rate_limiter::RateLimiter;
use crate::devices::timer::Timer;

/// How much may pass through one of the card's queues, and whether it waits for that. All queues of a direction share the
/// limiter.
pub(super) struct Limit {
    /// None where there is no limit, so that there is no lock either.
    limiter: Option<Arc<Mutex<RateLimiter>>>,
    timer: Timer,
    is_reached: bool,
}

impl Limit {
    pub(super) fn new(limiter: Option<Arc<Mutex<RateLimiter>>>) -> io::Result<Self> {
        Ok(Self { limiter, timer: Timer::new()?, is_reached: false })
    }

    /// Whether there is any limit.
    pub(super) fn is_limited(&self) -> bool {
        self.limiter.is_some()
    }

    /// Whether the timer runs, and nothing may pass before it has ended.
    pub(super) fn is_reached(&self) -> bool {
        self.is_reached
    }

    /// Lets a frame of so many bytes pass, or says how long it has to wait.
    pub(super) fn take(&self, bytes: u64) -> Result<(), Duration> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        limiter.lock().unwrap_or_else(PoisonError::into_inner).take(1, bytes)
    }

    /// Starts the timer.
    pub(super) fn wait(&mut self, time: Duration) {
        // Where the timer cannot be set there is no limit rather than no network.
        self.is_reached = self.timer.set(time).is_ok();
    }

    /// The timer has ended.
    pub(super) fn is_over(&mut self) {
        self.timer.acknowledge();
        self.is_reached = false;
    }
}

/// What the queues of one direction share.
pub(super) fn limiter(iops: Option<u64>, bandwidth: Option<u64>) -> Option<Arc<Mutex<RateLimiter>>> {
    let limiter = RateLimiter::new(iops, bandwidth);
    limiter.is_limited().then(|| Arc::new(Mutex::new(limiter)))
}

impl AsRawFd for Limit {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
