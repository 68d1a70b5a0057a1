//! A VM's parts that run, and how they are paused, resumed and stopped: in this order, for this reason.
//!
//! - **Pause**: first all vCPUs, then the devices. A guest that still runs would give a device new work while it
//!   drains, and would see a machine of which only a half is there.
//! - **Resume**: first the devices, then the vCPUs. The first thing that a vCPU does may be to notify a device, which
//!   must be listening by then.
//! - **Stop**: the vCPUs, from any state. Devices are dropped with the VM.
//!
//! A pause is a handshake: each vCPU confirms that it has parked. The event loop goes on meanwhile, because a vCPU may
//! be waiting for it inside a device. Then each thread of a device confirms that it has ended what was under way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::devices::legacy::ConsoleOutput;
use crate::devices::{DeviceControls, DeviceSummary};
use crate::metrics::Counter;
use crate::vcpu::VcpuThread;

use super::End;
use super::devices::DeviceThreads;
use super::request::{Answer, AnswerTo, Envelope, Refusal, Request, Wanted};
use super::run::EndSlot;
use super::state::{Change, State, StateCell};

/// A pause in which a vCPU has not parked, or after that a device not ended its work, by then is given up.
pub(super) const PAUSE_BOUND: Duration = Duration::from_secs(2);

/// What runs.
pub(super) struct Machine {
    pub vcpus: Vec<VcpuThread>,
    pub parts: MachineParts,
    pause: Pause,
    stopping: Vec<AnswerTo>,
}

/// What a machine is made from. Its vCPU threads are still to come: they start once the process is confined.
pub(super) struct MachineParts {
    /// What can be asked.
    pub devices: DeviceControls,
    /// The threads of devices.
    pub threads: DeviceThreads,
    /// What the guest has printed.
    pub consoles: Vec<Arc<ConsoleOutput>>,
    pub state: Arc<StateCell>,
    pub pauses: Counter,
}

/// The pause under way, or the last one.
#[derive(Default)]
struct Pause {
    /// Tells its confirmations from those of a pause that was given up.
    number: u64,
    missing: usize,
    deadline: Option<Instant>,
    waiting: Vec<AnswerTo>,
}

impl Machine {
    /// A machine that is not running.
    pub(super) fn new(parts: MachineParts) -> Self {
        Self { vcpus: Vec::new(), parts, pause: Pause::default(), stopping: Vec::new() }
    }

    /// Answers a request, now or when it is done. A stop is put into `end`.
    pub(super) fn handle(&mut self, (request, to): Envelope, end: &EndSlot) {
        let answer = match request {
            Request::SetState(Wanted::Running) => self.resume(),
            Request::SetState(Wanted::Paused) => return self.pause(to),
            Request::SetState(Wanted::Stopped) => {
                // Answered when it is true.
                self.stopping.push(to);
                return end.set(End::Stop);
            }
            Request::Devices => Ok(Answer::Devices(self.parts.devices.list())),
            Request::Device(id) => self.describe(id),
            Request::ChangeDevice(id, change) => match self.parts.devices.get(&id) {
                None => Err(Refusal::NoDevice(id)),
                Some(device) => device.change(change).map_err(Into::into).and_then(|()| self.describe(id)),
            },
        };
        send(&to, answer);
    }

    /// Lets the guest run, for the first time or again.
    pub(super) fn resume(&mut self) -> Result<Answer, Refusal> {
        let from = self.parts.state.get();
        let to = from.after(Change::Resume).ok_or(Refusal::NoWay { from, wanted: Wanted::Running })?;
        if from != to {
            if from == State::Paused {
                self.parts.threads.resume();
            }
            self.parts.state.set(to);
            self.vcpus.iter().for_each(VcpuThread::resume);
        }
        Ok(Answer::State(to))
    }

    fn pause(&mut self, answer: AnswerTo) {
        let from = self.parts.state.get();
        let Some(to) = from.after(Change::Pause) else {
            return send(&answer, Err(Refusal::NoWay { from, wanted: Wanted::Paused }));
        };
        if to == State::Paused {
            return send(&answer, Ok(Answer::State(to)));
        }
        self.pause.waiting.push(answer);
        if from == to {
            return;
        }
        self.parts.state.set(to);
        self.pause.number += 1;
        self.pause.missing = self.vcpus.len();
        self.pause.deadline = Some(Instant::now() + PAUSE_BOUND);
        self.parts.consoles.iter().for_each(|console| console.let_vcpus_leave(true));
        self.vcpus.iter().for_each(|v| v.pause(self.pause.number));
    }

    /// A vCPU has confirmed that it is parked.
    pub(super) fn parked(&mut self, number: u64) {
        if number != self.pause.number || self.parts.state.get() != State::Pausing {
            return;
        }
        self.pause.missing = self.pause.missing.saturating_sub(1);
        if self.pause.missing == 0 {
            self.pause_devices();
        }
    }

    /// The second half of a pause. The event loop waits here: whoever needs it is a vCPU, and those are parked.
    fn pause_devices(&mut self) {
        match self.parts.threads.pause(Instant::now() + PAUSE_BOUND) {
            Ok(()) => {
                self.parts.pauses.increment();
                self.end_pause(Change::Parked);
            }
            Err(device) => {
                log::warn!("{device} has not ended its work within {PAUSE_BOUND:?}: the pause is given up");
                self.give_up();
            }
        }
    }

    /// How long the event loop may sleep before [`Machine::check_pause`] has something to do.
    pub(super) fn time_left(&self) -> Option<Duration> {
        self.pause.deadline.map(|d| d.saturating_duration_since(Instant::now()))
    }

    /// Gives a pause up that takes too long: those that have parked run again.
    pub(super) fn check_pause(&mut self) {
        if self.pause.deadline.is_some_and(|d| d <= Instant::now()) {
            self.give_up();
        }
    }

    fn give_up(&mut self) {
        self.end_pause(Change::GaveUp);
        self.vcpus.iter().for_each(VcpuThread::resume);
    }

    fn end_pause(&mut self, change: Change) {
        self.pause.deadline = None;
        self.parts.consoles.iter().for_each(|console| console.let_vcpus_leave(false));
        let to = self.parts.state.get().after(change).unwrap_or(State::Stopped);
        self.parts.state.set(to);
        for waiting in self.pause.waiting.drain(..) {
            let paused = to == State::Paused;
            send(&waiting, if paused { Ok(Answer::State(to)) } else { Err(Refusal::Stuck) });
        }
    }

    /// Asks all vCPUs to end, from any state, and frees those that wait for the console's reader.
    pub(super) fn stop(&mut self) {
        self.parts.state.set(State::Stopped);
        // Dropped without an answer: whoever waits learns that the VM is ending.
        self.pause.waiting.clear();
        self.vcpus.iter().for_each(VcpuThread::stop);
        self.parts.consoles.iter().for_each(|console| console.close());
    }

    /// Waits for the vCPUs' ends, but not after `deadline`, and says how many hang.
    pub(super) fn join(&mut self, deadline: Instant) -> usize {
        // Each is waited for, also after one that hangs.
        let vcpus = std::mem::take(&mut self.vcpus);
        let stuck = vcpus.into_iter().map(|v| v.join(deadline)).filter(|stopped| !stopped).count();
        for waiting in self.stopping.drain(..) {
            send(&waiting, Ok(Answer::State(State::Stopped)));
        }
        stuck
    }

    fn describe(&mut self, id: String) -> Result<Answer, Refusal> {
        let Some(device) = self.parts.devices.get(&id) else { return Err(Refusal::NoDevice(id)) };
        let description = device.describe();
        Ok(Answer::Device(DeviceSummary { kind: device.kind(), id }, description))
    }
}

fn send(to: &AnswerTo, answer: Result<Answer, Refusal>) {
    // Whoever asked may have given up. There is room for the answer, so this never waits.
    let _ = to.try_send(answer);
}
