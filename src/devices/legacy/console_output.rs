//! What the guest has printed and nobody has written out yet.
//!
//! A vCPU puts bytes in; the event loop takes them out a few milliseconds later, many at a time. The buffer is
//! bounded: where the host's reader is slow, the guest waits, as it would for a slow UART.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// The guest waits when this much is unwritten.
const CAPACITY: usize = 64 << 10;
/// How long output may lie: unnoticed by a person, and long enough to gather a line.
const DELAY: Duration = Duration::from_millis(3);

/// A bounded buffer with a timer that says when to empty it.
pub struct ConsoleOutput {
    state: Mutex<State>,
    space: Condvar,
    /// Expires when there is something to take.
    timer: Mutex<TimerFd>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    closed: bool,
}

impl ConsoleOutput {
    /// An empty buffer.
    ///
    /// # Errors
    /// No descriptor is left for the timer.
    pub fn new() -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self { state: Mutex::default(), space: Condvar::new(), timer: Mutex::new(timer) })
    }

    /// The descriptor that turns readable when there is something to take.
    pub fn timer_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsRawFd;
        self.timer.lock().unwrap_or_else(PoisonError::into_inner).as_raw_fd()
    }

    /// To be called when the timer's descriptor is readable; it is not any more afterwards.
    pub fn timer_expired(&self) {
        // Only the loop waits on it, and only after it has expired: this does not block.
        let _ = self.timer.lock().unwrap_or_else(PoisonError::into_inner).wait();
    }

    /// Takes everything that is there.
    pub fn take(&self) -> Vec<u8> {
        let bytes = std::mem::take(&mut self.lock().bytes);
        self.space.notify_all();
        bytes
    }

    /// From now on bytes are dropped, and no vCPU waits.
    pub fn close(&self) {
        self.lock().closed = true;
        self.space.notify_all();
    }

    /// Waits until there is room. The caller must hold no lock that the event loop takes: it is what makes room.
    pub fn wait_for_room(&self) {
        let full = |s: &mut State| s.bytes.len() >= CAPACITY && !s.closed;
        drop(self.space.wait_while(self.lock(), full));
    }

    /// Adds `bytes`, without waiting.
    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        let first = state.bytes.is_empty();
        state.bytes.extend_from_slice(bytes);
        drop(state);
        if first {
            let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = timer.reset(DELAY, None) {
                log::error!("the console's timer cannot be set: {e}");
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The serial port's end of it.
impl Write for &ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    /// A full buffer, and a vCPU that waits for room in it.
    fn full_with_writer() -> (Arc<ConsoleOutput>, thread::JoinHandle<()>) {
        let output = Arc::new(ConsoleOutput::new().unwrap());
        output.push(&vec![1; CAPACITY]);
        let writer = output.clone();
        let thread = thread::spawn(move || {
            writer.wait_for_room();
            writer.push(b"late");
        });
        (output, thread)
    }

    #[test]
    fn a_full_buffer_waits_for_room() {
        let (output, writer) = full_with_writer();
        assert_eq!(output.take().len(), CAPACITY);
        writer.join().unwrap();
        assert_eq!(output.take(), b"late");
    }

    #[test]
    fn closing_frees_a_waiting_writer() {
        let (output, writer) = full_with_writer();
        output.close();
        writer.join().unwrap();
        assert_eq!(output.take().len(), CAPACITY, "what comes after the end is dropped");
    }
}
