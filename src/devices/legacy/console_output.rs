//! What the guest has printed and nobody has written out yet.
//!
//! A vCPU puts bytes in; a thread of its own takes them out a few milliseconds later, many at a time. The buffer is
//! bounded: where the host's reader is slow, the guest waits, as it would for a slow UART.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::metrics::Counter;

/// The guest waits when this much is unwritten.
const CAPACITY: usize = 64 << 10;
/// What a vCPU may add beyond that when it has to leave the device: KVM brings at most a page of bytes in one exit.
const LEAVING: usize = 1 << 20;
/// How long output may lie: unnoticed by a person, and long enough to gather a line.
const DELAY: Duration = Duration::from_millis(3);

/// A bounded buffer between the vCPUs and whoever writes out what they print.
#[derive(Default)]
pub struct ConsoleOutput {
    state: Mutex<State>,
    space: Condvar,
    filled: Condvar,
    printed: Counter,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    closed: bool,
    /// How many have asked that whoever waits may leave.
    leaving: usize,
}

impl State {
    fn is_full(&self) -> bool {
        self.bytes.len() >= CAPACITY
    }

    /// Whether a vCPU has to wait. One that is about to pause may go on for the few bytes that it holds, but not pause
    /// after pause without end while nobody reads.
    fn keeps_waiting(&self) -> bool {
        let capacity = if self.leaving > 0 { CAPACITY + LEAVING } else { CAPACITY };
        self.bytes.len() >= capacity && !self.closed
    }
}

impl ConsoleOutput {
    /// An empty buffer that counts in `printed` what the guest puts in.
    #[must_use]
    pub fn new(printed: Counter) -> Self {
        Self { printed, ..Self::default() }
    }

    /// How many bytes nobody has taken yet.
    #[must_use]
    pub fn unwritten(&self) -> usize {
        self.lock().bytes.len()
    }

    /// Waits until there is something, gathers what follows closely, and takes it all. `None`: closed, and all taken.
    pub fn take(&self) -> Option<Vec<u8>> {
        let waiting = |s: &mut State| s.bytes.is_empty() && !s.closed;
        let state = self.filled.wait_while(self.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
        let gathering = |s: &mut State| !s.is_full() && !s.closed;
        let gathered = self.filled.wait_timeout_while(state, DELAY, gathering);
        let mut state = gathered.unwrap_or_else(PoisonError::into_inner).0;
        let bytes = std::mem::take(&mut state.bytes);
        drop(state);
        self.space.notify_all();
        (!bytes.is_empty()).then_some(bytes)
    }

    /// From now on bytes are dropped, and neither a vCPU nor the taker waits.
    pub fn close(&self) {
        self.lock().closed = true;
        self.space.notify_all();
        self.filled.notify_all();
    }

    /// Waits until there is room. The caller must hold no lock that stands between the taker and the buffer.
    pub fn wait_for_room(&self) {
        drop(self.space.wait_while(self.lock(), |s| s.keeps_waiting()));
    }

    /// As [`ConsoleOutput::wait_for_room`], no longer than `limit`; says whether there is room. What is added without
    /// would be memory without bound.
    #[must_use]
    pub fn has_room_within(&self, limit: Duration) -> bool {
        let waited = self.space.wait_timeout_while(self.lock(), limit, |s| s.keeps_waiting());
        !waited.unwrap_or_else(PoisonError::into_inner).0.keeps_waiting()
    }

    /// Whether those who print are to leave soon ([`ConsoleOutput::let_vcpus_leave`]).
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.lock().leaving > 0
    }

    /// While `on`, a vCPU that waits for room may finish its write without it: the VM pauses, and a vCPU parks outside
    /// of devices. Nothing is dropped. Several may ask at a time; each that said `true` says `false` once.
    pub fn let_vcpus_leave(&self, on: bool) {
        let mut state = self.lock();
        state.leaving = if on { state.leaving.saturating_add(1) } else { state.leaving.saturating_sub(1) };
        drop(state);
        self.space.notify_all();
    }

    /// Adds `bytes`, without waiting.
    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        self.printed.add(bytes.len() as u64);
        let first = state.bytes.is_empty();
        state.bytes.extend_from_slice(bytes);
        let wake = first || state.is_full();
        drop(state);
        // In between the taker is gathering, with a time limit.
        if wake {
            self.filled.notify_all();
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
        let output = Arc::new(ConsoleOutput::default());
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
        assert_eq!(output.take().unwrap().len(), CAPACITY);
        writer.join().unwrap();
        assert_eq!(output.take().unwrap(), b"late");
    }

    #[test]
    fn a_writer_may_leave_with_its_bytes_though_not_without_end() {
        let (output, writer) = full_with_writer();
        output.let_vcpus_leave(true);
        writer.join().unwrap();
        output.push(&vec![1; LEAVING]);
        assert!(output.lock().keeps_waiting());
        output.let_vcpus_leave(false);
        let all = output.take().unwrap();
        assert_eq!(&all[CAPACITY..CAPACITY + 4], b"late");
    }

    #[test]
    fn a_bound_on_the_wait_says_whether_there_is_room() {
        let output = ConsoleOutput::default();
        assert!(output.has_room_within(Duration::ZERO));
        output.push(&vec![1; CAPACITY]);
        assert!(!output.has_room_within(Duration::from_millis(1)));
        output.let_vcpus_leave(true);
        output.let_vcpus_leave(true);
        output.let_vcpus_leave(false);
        assert!(output.is_leaving() && output.has_room_within(Duration::ZERO));
        output.let_vcpus_leave(false);
        assert!(!output.is_leaving() && !output.has_room_within(Duration::ZERO));
        output.close();
        assert!(
            output.has_room_within(Duration::from_secs(60)),
            "what comes after the end is dropped at once"
        );
    }

    #[test]
    fn closing_frees_a_waiting_writer() {
        let (output, writer) = full_with_writer();
        output.close();
        writer.join().unwrap();
        assert_eq!(output.take().unwrap().len(), CAPACITY, "what comes after the end is dropped");
        assert!(output.take().is_none(), "a closed and empty buffer ends its taker");
    }
}
