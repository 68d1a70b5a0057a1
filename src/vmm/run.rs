//! Running a VM: confine, resume, the event loop, and taking it all down.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Action;
use crate::devices::DeviceControls;
use crate::devices::timer::Timer;
use crate::devices::virtio::VmmThreadJobs;
use crate::metrics::{Phase, Snapshot};
use crate::sandbox::{Confined, Kept, SandboxError};
use crate::sys::event::new_event;
use crate::sys::program::Code;
use crate::sys::signals::{Signal, Signals};
use crate::vcpu::{VcpuEvent, VcpuThread};

use super::console::{Console, ConsoleEvents, TerminalSize, finish_all};
use super::devices::DeviceThreads;
use super::machine::Machine;
use super::request::Envelope;
use super::{End, SignalSink, Vmm};

/// vCPUs that have not ended by then are left to the end of the process.
const STOP_BOUND: Duration = Duration::from_secs(2);

/// The event loop failed; the guest is stopped.
#[derive(Debug, Error)]
pub enum RunError {
    /// epoll.
    #[error("the event loop failed: {0:?}")]
    Loop(event_manager::Error),
    /// The terminal.
    #[error("the terminal on standard input cannot be made raw")]
    Terminal(#[source] io::Error),
    /// The process or a thread cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A vCPU thread hangs.
    #[error("a vCPU did not stop within {STOP_BOUND:?}")]
    Stuck,
}

/// Why the loop ends, once it does. The first reason stays.
#[derive(Clone, Default)]
pub(super) struct EndSlot(Rc<RefCell<Option<End>>>);

impl EndSlot {
    pub(super) fn set(&self, end: End) {
        self.0.borrow_mut().get_or_insert(end);
    }

    fn take(&self) -> Option<End> {
        self.0.borrow_mut().take()
    }
}

/// What the event loop listens to beside the consoles: vCPUs, requests, signals, the time limit.
pub(super) struct EventSources {
    signals: Signals,
    timer: Option<Timer>,
    wake: Arc<EventFd>,
    vcpu_events: Option<Receiver<VcpuEvent>>,
    requests: (Sender<Envelope>, Receiver<Envelope>),
    jobs: Option<VmmThreadJobs>,
}

impl EventSources {
    /// Blocks the signals: called before any thread is started.
    pub(super) fn new(timeout: Option<Duration>) -> io::Result<Self> {
        let timer = timeout.map(|t| {
            let timer = Timer::new()?;
            timer.set(t)?;
            Ok::<_, io::Error>(timer)
        });
        let timer = timer.transpose()?;
        let (signals, wake) = (Signals::new()?, Arc::new(new_event()?));
        Ok(Self { signals, timer, wake, vcpu_events: None, requests: mpsc::channel(), jobs: None })
    }

    /// What a vCPU writes to after it has sent an event.
    pub(super) fn wake(&self) -> Arc<EventFd> {
        self.wake.clone()
    }

    /// Puts the descriptors on the list of those that stay open.
    pub(super) fn keep(&self, kept: &mut Kept) {
        kept.add("signals", &self.signals.as_fd());
        kept.add("wake-ups of the event loop", &*self.wake);
        if let Some(jobs) = &self.jobs {
            kept.add("wake-ups for devices", jobs.event());
        }
        if let Some(timer) = &self.timer {
            kept.add("the time limit", timer);
        }
    }

    /// Where requests are sent, and what to write to after one.
    pub(super) fn for_requests(&self) -> (Sender<Envelope>, Arc<EventFd>) {
        (self.requests.0.clone(), self.wake())
    }

    pub(super) fn with_vcpu_events(self, events: Receiver<VcpuEvent>) -> Self {
        Self { vcpu_events: Some(events), ..self }
    }

    /// What devices want done on this thread.
    pub(super) fn with_jobs(self, jobs: VmmThreadJobs) -> Self {
        Self { jobs: Some(jobs), ..self }
    }
}

struct VmEvents {
    sources: EventSources,
    machine: Rc<RefCell<Machine>>,
    end: EndSlot,
    confined: Confined,
    terminal_size: Option<TerminalSize>,
    signal_sink: Option<Box<dyn SignalSink>>,
}

impl VmEvents {
    /// Not this process's where somebody takes it for the guest.
    fn signalled(&self, signal: Signal) {
        match (signal, &self.signal_sink) {
            (Signal::End(number), Some(sink)) if sink.signal(number) => {}
            (Signal::End(number), _) => self.end.set(End::Signal(number)),
            (Signal::Resize, sink) => {
                self.terminal_size.iter().for_each(TerminalSize::update);
                sink.iter().for_each(|sink| sink.resized());
            }
        }
    }

    /// Everything that has come since the last wake-up.
    fn take_all(&mut self) {
        let mut machine = self.machine.borrow_mut();
        for event in self.sources.vcpu_events.iter().flat_map(Receiver::try_iter) {
            match event {
                VcpuEvent::Parked(number) => machine.parked(number),
                event => end_of(event).into_iter().for_each(|end| self.end.set(end)),
            }
        }
        self.sources.requests.1.try_iter().for_each(|request| machine.handle(request, &self.end));
    }
}

impl MutEventSubscriber for VmEvents {
    fn init(&mut self, ops: &mut EventOps) {
        let sources = &self.sources;
        let fds = [
            Some(sources.signals.as_fd().as_raw_fd()),
            Some(sources.wake.as_raw_fd()),
            sources.timer.as_ref().map(AsRawFd::as_raw_fd),
            sources.jobs.as_ref().map(|jobs| jobs.event().as_raw_fd()),
        ];
        for fd in fds.into_iter().flatten() {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("the event loop cannot watch a descriptor: {e:?}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let sources = &mut self.sources;
        if events.fd() == sources.wake.as_raw_fd() {
            let _ = sources.wake.read();
            self.take_all();
        } else if sources.timer.as_ref().is_some_and(|t| t.as_raw_fd() == events.fd()) {
            self.end.set(End::Timeout);
        } else if let Some(jobs) = sources.jobs.as_ref().filter(|j| j.event().as_raw_fd() == events.fd()) {
            jobs.run_all(self.confined);
        } else {
            let signal = sources.signals.take();
            signal.into_iter().for_each(|signal| self.signalled(signal));
        }
    }
}

/// What an event of a vCPU means for the VM.
fn end_of(event: VcpuEvent) -> Option<End> {
    match event {
        VcpuEvent::Fault(fault) => Some(End::Fault(fault)),
        VcpuEvent::Device(Action::PowerOff) => Some(End::PowerOff),
        VcpuEvent::Device(Action::Reset) => Some(End::Reset),
        VcpuEvent::Device(Action::Panic) => Some(End::Panic),
        VcpuEvent::Device(Action::Exit(status)) => Some(End::Exit(status)),
        VcpuEvent::Device(Action::None | Action::Mark(_)) | VcpuEvent::Parked(_) => None,
    }
}

/// What is left of a VM.
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// What it counted, where its registry is full.
    pub metrics: Option<Snapshot>,
}

/// Confines this process, runs the guest until something ends it, then takes the VM down. The process stays confined.
///
/// # Errors
/// It cannot be confined, the event loop fails, or a vCPU hangs.
pub fn run(mut vmm: Vmm) -> Result<Ended, RunError> {
    let folders: Vec<_> = vmm.services.iter().flat_map(|s| s.keep(&mut vmm.kept)).collect();
    // Looked up while this process may still open files.
    let code = Code::of_program();
    // Before the first thread, so that each takes it over.
    let confined = vmm.layers.confine_process(&vmm.kept, &folders)?;
    let vcpus = vmm.vcpus.into_iter().map(|vcpu| VcpuThread::start(vcpu, vmm.reports.clone(), confined));
    vmm.machine.vcpus = vcpus.collect::<Result<_, _>>()?;
    vmm.consoles.iter_mut().try_for_each(|console| console.start_writer(confined))?;
    // Dropped last of all: what they ask the VM is answered, or refused, before they are waited for.
    let services = vmm.services.into_iter().map(|s| s.start(confined));
    let _services = services.collect::<Result<Vec<_>, _>>()?;

    let end = EndSlot::default();
    let failed = RunError::Loop;
    let machine = Rc::new(RefCell::new(vmm.machine));
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(failed)?;
    let (sources, terminal_size) = (vmm.events, vmm.consoles.iter().find_map(Console::size));
    let events = VmEvents {
        sources,
        machine: machine.clone(),
        end: end.clone(),
        confined,
        terminal_size,
        signal_sink: vmm.signals,
    };
    manager.add_subscriber(Box::new(events));
    // The consoles are taken back at the end, for the guest's last words.
    let mut consoles = Vec::new();
    for mut console in vmm.consoles {
        console.enter_raw_mode().map_err(RunError::Terminal)?;
        let console = Rc::new(RefCell::new(ConsoleEvents { console, end: end.clone() }));
        manager.add_subscriber(Box::new(console.clone()));
        consoles.push(console);
    }
    if let Some(code) = code {
        code.release();
    }
    // Last of all: the threads above have narrower filters of their own, which this one would be added to.
    confined.confine_thread(vmm.kind)?;

    vmm.timeline.mark(Phase::FirstRun);
    // A VM that is built can run: the table of states says so.
    let _ = machine.borrow_mut().resume();
    let reason = loop {
        let left = machine.borrow().time_left().map_or(-1, milliseconds);
        match manager.run_with_timeout(left) {
            Ok(_) => {}
            // A signal that is not ours, as after SIGSTOP and SIGCONT.
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
            Err(e) => break Err(failed(e)),
        }
        machine.borrow_mut().check_pause();
        if let Some(end) = end.take() {
            break Ok(end);
        }
    };
    vmm.timeline.mark(Phase::End);

    let mut machine = machine.borrow_mut();
    machine.stop();
    // With it goes what devices wanted done: a vCPU that waits for that waits no longer.
    drop(manager);
    let stuck = machine.join(Instant::now() + STOP_BOUND);
    finish_all(consoles.into_iter().filter_map(Rc::into_inner).map(|events| events.into_inner().console));
    vmm.timeline.unwatch();
    let metrics = vmm.metrics.finish();
    machine.parts.devices = DeviceControls::default();
    machine.parts.threads = DeviceThreads::default();
    drop((vmm.vm, vmm.memory));
    vmm.timeline.mark(Phase::Teardown);
    if let (Some(at_end), Ok(end)) = (vmm.at_end, &reason) {
        at_end(end);
    }
    if stuck == 0 { reason.map(|end| Ended { end, metrics }) } else { Err(RunError::Stuck) }
}

/// Rounded up, so that the loop does not wake before the time.
fn milliseconds(time: Duration) -> i32 {
    i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}
