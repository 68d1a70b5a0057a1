//! The console (virtio 1.3 §5.3), `/dev/hvc0` to Linux: one port, many bytes at a time, and a size.
//!
//! Linux' driver prints with a spinlock held and interrupts off until the device has taken its buffer. So a reader on the
//! host who stalls may not keep the device from taking it: what nobody reads for [`PATIENCE`] is dropped, and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::legacy::ConsoleOutput;
use crate::metrics::Counter;
use crate::sandbox::Kept;
use crate::sys::event::new_event;
use crate::vm::Memory;

use super::{
    ActivateError, Activation, ActiveQueue, Chain, DeviceKind, Interrupt, QueueError, Served, VirtioDevice,
    Worker, WorkerControl, read_config_space, take_queue,
};

/// `VIRTIO_CONSOLE_F_SIZE` (§5.3.3).
const F_SIZE: u64 = 1;
const QUEUE_SIZES: [u16; 2] = [64; 2];
/// Input that waits for a guest which does not read.
const MAX_INPUT: usize = 4096;
/// Bytes moved at once.
const PIECE: usize = 4096;
/// Output in one request. One that is as long as a chain may be would keep us from hearing of the end.
const MAX_OUTPUT: u32 = 1 << 20;
/// How long output waits for its reader: far below the 20 seconds after which Linux takes a processor for locked up.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a driver is told of the terminal's size beside its changes; see [`ConsoleWorker::announce_size`].
const ANNOUNCEMENTS: u8 = 8;

const INPUT_QUEUE: u64 = 0;
const OUTPUT_QUEUE: u64 = 1;
const INPUT: u64 = 2;

const NAME: &str = Console::ID;

/// The end of the console that a host's terminal is plugged into. Clones share it.
#[derive(Clone)]
pub struct ConsolePort(Arc<Shared>);

struct Shared {
    input: Mutex<VecDeque<u8>>,
    /// Signalled when there is input.
    filled: EventFd,
    /// Signalled when the guest has taken all input.
    drained: Arc<EventFd>,
    /// Columns, and rows in the upper half.
    size: AtomicU32,
    /// The size is a terminal's.
    is_sized: AtomicBool,
    driver: Mutex<Option<Arc<Interrupt>>>,
}

/// What a console counts beside what it prints.
#[derive(Clone, Debug, Default)]
pub struct ConsoleCounters {
    /// Bytes of output that nobody read.
    pub dropped: Counter,
}

impl ConsolePort {
    /// Gives the guest as much of `bytes` as there is room for, and says how much that was.
    #[must_use]
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.0.input);
        let count = bytes.len().min(MAX_INPUT - input.len());
        input.extend(&bytes[..count]);
        drop(input);
        if count > 0 {
            let _ = self.0.filled.write(1);
        }
        count
    }

    /// Tells the guest the terminal's size (§5.3.4).
    pub fn set_size(&self, columns: u16, rows: u16) {
        self.0.is_sized.store(true, Ordering::SeqCst);
        let size = u32::from(columns) | u32::from(rows) << 16;
        let change = || self.0.size.store(size, Ordering::SeqCst);
        match lock(&self.0.driver).as_ref() {
            _ if self.0.size.load(Ordering::SeqCst) == size => {}
            Some(interrupt) => interrupt.change_config(change),
            None => change(),
        }
    }

    /// Columns and rows, as the guest is told them.
    #[must_use]
    pub fn size(&self) -> (u16, u16) {
        let size = self.0.size.load(Ordering::SeqCst);
        (size as u16, (size >> 16) as u16)
    }

    /// Whether a driver serves it.
    #[must_use]
    pub fn is_active(&self) -> bool {
        lock(&self.0.driver).is_some()
    }

    /// Takes input for the guest; says whether that was the last.
    fn take(&self, bytes: &mut [u8]) -> (usize, bool) {
        let mut input = lock(&self.0.input);
        let count = bytes.len().min(input.len());
        bytes.iter_mut().zip(input.drain(..count)).for_each(|(to, from)| *to = from);
        (count, input.is_empty())
    }

    fn has_input(&self) -> bool {
        !lock(&self.0.input).is_empty()
    }
}

/// What is behind it stays whole when a thread panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The console.
pub struct Console {
    port: ConsolePort,
    output: Arc<ConsoleOutput>,
    counters: ConsoleCounters,
    worker: Option<Worker<ConsoleWorker>>,
}

struct ConsoleWorker {
    memory: Memory,
    interrupt: Arc<Interrupt>,
    port: ConsolePort,
    output: Arc<ConsoleOutput>,
    into_guest: ActiveQueue,
    from_guest: ActiveQueue,
    chain: Chain,
    counters: ConsoleCounters,
    /// Nobody reads the output.
    stalled: bool,
    announcements: u8,
}

impl Console {
    /// Its name in a VM, which has one at most.
    pub const ID: &str = "hvc0";

    /// A console that prints to `output`, and signals `drained` when its input is used up.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(
        output: Arc<ConsoleOutput>,
        drained: Arc<EventFd>,
        counters: ConsoleCounters,
    ) -> io::Result<Self> {
        let shared = Shared {
            input: Mutex::default(),
            filled: new_event()?,
            drained,
            // What a terminal has that says nothing.
            size: AtomicU32::new(80 | 25 << 16),
            is_sized: AtomicBool::new(false),
            driver: Mutex::default(),
        };
        Ok(Self { port: ConsolePort(Arc::new(shared)), output, counters, worker: None })
    }

    /// The host's end.
    #[must_use]
    pub fn port(&self) -> ConsolePort {
        self.port.clone()
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn id(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.port.0.size.load(Ordering::SeqCst).to_le_bytes(), offset, data);
    }

    fn keep(&self, kept: &mut Kept) {
        kept.add("the virtio console has input", &self.port.0.filled);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = ConsoleWorker {
            into_guest: take_queue(&mut activation.queues, 0)?,
            from_guest: take_queue(&mut activation.queues, 1)?,
            memory: activation.memory,
            interrupt: activation.interrupt.clone(),
            port: self.port.clone(),
            output: self.output.clone(),
            chain: Chain::default(),
            counters: self.counters.clone(),
            stalled: false,
            announcements: ANNOUNCEMENTS,
        };
        self.worker = Some(Worker::start(NAME, activation.confined, worker)?);
        *lock(&self.port.0.driver) = Some(activation.interrupt);
        Ok(())
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.worker.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        *lock(&self.port.0.driver) = None;
        // Its thread may be waiting for a reader.
        self.output.let_vcpus_leave(true);
        let worker = self.worker.take().and_then(Worker::stop);
        self.output.let_vcpus_leave(false);
        worker.map(|w| vec![w.into_guest, w.from_guest]).unwrap_or_default()
    }
}

impl Served for ConsoleWorker {
    fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
        let watch = |fd: &EventFd, token| (fd.as_raw_fd(), EventSet::IN, token);
        vec![
            watch(&self.into_guest.notify, INPUT_QUEUE),
            watch(&self.from_guest.notify, OUTPUT_QUEUE),
            watch(&self.port.0.filled, INPUT),
        ]
    }

    fn event(&mut self, token: u64, _ready: EventSet, _epoll: &Epoll) {
        let event = match token {
            INPUT_QUEUE => &*self.into_guest.notify,
            OUTPUT_QUEUE => &*self.from_guest.notify,
            _ => &self.port.0.filled,
        };
        let _ = event.read();
        if self.interrupt.is_reset_needed() {
            return;
        }
        let served = if token == OUTPUT_QUEUE { self.print() } else { self.feed() };
        if let Err(e) = served {
            self.interrupt.needs_reset(NAME, &e);
        }
    }
}

impl ConsoleWorker {
    /// Fills the guest's buffers with what input there is.
    fn feed(&mut self) -> Result<(), QueueError> {
        let (memory, queue) = (self.memory.guest(), &mut self.into_guest.queue);
        queue.disable_notify(memory)?;
        for _ in 0..queue.size() {
            // Input without a buffer waits for one; a buffer without input waits for that.
            if !self.port.has_input() {
                return Ok(());
            }
            if queue.pop(memory, &mut self.chain)? {
                Self::announce_size(&mut self.announcements, &self.port, &self.interrupt);
                let mut bytes = [0; PIECE];
                let room = (self.chain.writable_len() as usize).min(PIECE);
                let (count, last) = self.port.take(&mut bytes[..room]);
                self.chain.write(memory, 0, &bytes[..count])?;
                queue.push_used(memory, self.chain.head(), count as u32)?;
                queue.publish_to(memory, &self.interrupt)?;
                if last {
                    let _ = self.port.0.drained.write(1);
                }
            } else if !queue.enable_notify(memory)? {
                return Ok(());
            }
        }
        self.into_guest.serve_again();
        Ok(())
    }

    /// Linux reads the size when it is told of a change, not when it starts, and forgets what it is told while it
    /// starts. So it is told again with the first input of a terminal: somebody is there, and the driver is up.
    fn announce_size(left: &mut u8, port: &ConsolePort, interrupt: &Interrupt) {
        if *left > 0 && port.0.is_sized.load(Ordering::SeqCst) {
            *left -= 1;
            interrupt.config_changed();
        }
    }

    /// Prints what the guest offers.
    fn print(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        let memory = memory.guest();
        self.from_guest.queue.disable_notify(memory)?;
        for _ in 0..self.from_guest.queue.size() {
            // The rest comes later, where there is a later: the device is being stopped, or the VM pauses.
            if self.output.is_leaving() {
                break;
            }
            if self.from_guest.queue.pop(memory, &mut self.chain)? {
                self.print_chain(memory)?;
                let queue = &mut self.from_guest.queue;
                queue.push_used(memory, self.chain.head(), 0)?;
                queue.publish_to(memory, &self.interrupt)?;
            } else if !self.from_guest.queue.enable_notify(memory)? {
                return Ok(());
            }
        }
        self.from_guest.serve_again();
        Ok(())
    }

    fn print_chain(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let len = self.chain.readable_len();
        if len > MAX_OUTPUT {
            return Err(QueueError::Shape);
        }
        let mut bytes = [0; PIECE];
        for offset in (0..len).step_by(PIECE) {
            let bytes = &mut bytes[..PIECE.min((len - offset) as usize)];
            self.chain.read(memory, offset, bytes)?;
            if self.is_read() {
                // A buffer in memory: it takes all, and never fails.
                let _ = (&*self.output).write_all(bytes);
            } else {
                self.counters.dropped.add(bytes.len() as u64);
            }
        }
        Ok(())
    }

    /// Whether there is room for output, or will be soon: one who did not make any in time is not waited for again
    /// before there is some.
    fn is_read(&mut self) -> bool {
        let limit = if self.stalled { Duration::ZERO } else { PATIENCE };
        self.stalled = !self.output.has_room_within(limit);
        !self.stalled
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testing::{Driver, Rig};
    use super::*;

    /// For tests of all kinds of devices.
    pub fn rig() -> Rig {
        let (driver, port, output, _) = start();
        let stirring = port.clone();
        Rig {
            name: "console",
            driver,
            sizes: vec![16, 16],
            queues: vec![0, 1],
            stir: Box::new(move || _ = stirring.send(b"key")),
            offer: Box::new(|driver| {
                let (input, text) = (driver.buffer(64), driver.filled(&[b'x'; 4096]));
                driver.post(0, &[], &[input]);
                driver.post(1, &[text], &[]);
            }),
            works: Box::new(move |driver| {
                let (input, text) = (driver.buffer(64), driver.filled(b"text"));
                driver.offer(1, &[text], &[]);
                assert_eq!(driver.wait_used(1), (0, 0));
                assert!(output.take().unwrap().ends_with(b"text"));
                assert!(port.send(b"x") <= 1);
                driver.offer(0, &[], &[input]);
                assert!(driver.wait_used(0).1 > 0);
            }),
        }
    }

    fn start() -> (Driver, ConsolePort, Arc<ConsoleOutput>, Arc<EventFd>) {
        let output = Arc::new(ConsoleOutput::default());
        let drained = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let console = Console::new(output.clone(), drained.clone(), ConsoleCounters::default()).unwrap();
        let port = console.port();
        (Driver::start(Box::new(console), &[16, 16]), port, output, drained)
    }

    #[test]
    fn output_arrives_in_order() {
        let (mut driver, _, output, _) = start();
        let (a, b) = (driver.filled(b"one "), driver.filled(b"two"));
        driver.offer(1, &[a, b], &[]);
        assert_eq!(driver.wait_used(1).1, 0);
        assert_eq!(output.take().unwrap(), b"one two");
    }

    #[test]
    fn input_waits_for_a_buffer_and_a_buffer_for_input() {
        let (mut driver, port, _, drained) = start();
        assert_eq!(port.send(b"abcde"), 5);
        let (first, second) = (driver.buffer(3), driver.buffer(64));
        driver.offer(0, &[], &[first]);
        assert_eq!(driver.wait_used(0).1, 3);
        assert!(drained.read().is_err());
        driver.offer(0, &[], &[second]);
        assert_eq!(driver.wait_used(0).1, 2);
        assert_eq!((driver.bytes(first), &driver.bytes(second)[..2]), (b"abc".to_vec(), &b"de"[..]));
        driver.wait("nobody says that input is used up", |_| drained.read().ok());
        let third = driver.buffer(64);
        driver.offer(0, &[], &[third]);
        assert_eq!(port.send(b"f"), 1);
        assert_eq!(driver.wait_used(0).1, 1);
    }

    #[test]
    fn input_has_a_bound() {
        let (_driver, port, ..) = start();
        assert_eq!(port.send(&[b'x'; 2 * MAX_INPUT]), MAX_INPUT);
        assert_eq!(port.send(b"y"), 0);
    }

    #[test]
    fn a_new_size_interrupts() {
        let (mut driver, port, ..) = start();
        assert_eq!(driver.read(0x100), 80 | 25 << 16);
        port.set_size(80, 25);
        assert_eq!(driver.read(0x60), 0, "nothing new");
        port.set_size(132, 43);
        assert_eq!((driver.read(0x100), driver.read(0x60)), (132 | 43 << 16, 2));
        driver.write(0x70, 0);
        port.set_size(100, 50);
        assert_eq!(driver.read(0x60), 0, "nobody is there");
    }

    #[test]
    fn the_first_input_tells_the_terminals_size() {
        let (mut driver, port, ..) = start();
        let mut feed = |port: &ConsolePort| {
            let buffer = driver.buffer(8);
            driver.offer(0, &[], &[buffer]);
            assert_eq!(port.send(b"x"), 1);
            driver.wait_used(0);
            let status = driver.read(0x60);
            driver.write(0x64, status);
            status & 2
        };
        assert_eq!(feed(&port), 0, "no terminal, no size");
        port.set_size(132, 43);
        let told = (0..100).filter(|_| feed(&port) != 0).count();
        assert_eq!(told, usize::from(ANNOUNCEMENTS), "not with each key");
        assert!(port.is_active());
        assert_eq!(port.size(), (132, 43));
    }

    #[test]
    fn a_stalled_reader_costs_output_and_not_the_guest() {
        let dropped = Counter::default();
        let output = Arc::new(ConsoleOutput::default());
        let drained = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let counters = ConsoleCounters { dropped: dropped.clone() };
        let console = Console::new(output.clone(), drained, counters).unwrap();
        let mut driver = Driver::start(Box::new(console), &[16, 16]);
        let buffer = driver.filled(&[b'x'; 16 << 10]);
        // 4 MiB, of which nothing is read.
        for _ in 0..256 {
            driver.offer(1, &[buffer], &[]);
            driver.wait_used(1);
        }
        let unwritten = output.unwritten() as u64;
        assert!(unwritten <= 64 << 10, "{unwritten}");
        assert_eq!(unwritten + dropped.get(), 4 << 20);
        // Somebody reads again, and nothing more is dropped.
        let before = (output.take().unwrap().len(), dropped.get()).1;
        driver.offer(1, &[buffer], &[]);
        driver.wait_used(1);
        assert_eq!((output.unwritten(), dropped.get()), (16 << 10, before));
    }

    #[test]
    fn a_reset_does_not_wait_for_the_reader() {
        let (mut driver, ..) = start();
        let buffer = driver.filled(&vec![b'x'; 1 << 20]);
        for _ in 0..16 {
            driver.post(1, &[buffer], &[]);
        }
        driver.notify(1);
        let begin = std::time::Instant::now();
        driver.write(0x70, 0);
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    }

    #[test]
    fn buffers_of_the_wrong_kind_are_given_back() {
        let (mut driver, port, ..) = start();
        let buffer = driver.buffer(16);
        driver.offer(1, &[], &[buffer]);
        assert_eq!(driver.wait_used(1).1, 0);
        driver.offer(0, &[buffer], &[]);
        assert_eq!(port.send(b"x"), 1);
        assert_eq!(driver.wait_used(0).1, 0);
        driver.offer(0, &[], &[buffer]);
        assert_eq!(driver.wait_used(0).1, 1, "the byte is not lost");
    }

    #[test]
    fn endless_output_asks_for_a_reset() {
        let (mut driver, ..) = start();
        driver.offer(1, &[(0x200_0000, MAX_OUTPUT + 1)], &[]);
        driver.wait_needs_reset();
    }
}
