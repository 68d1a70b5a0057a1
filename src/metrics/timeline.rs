//! The timeline of one run: when each phase ended and how many VM exits there had been by then.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::clock::Clock;
use super::exits::{ExitSource, Exits};

/// The moments of a run, in the order in which they happen. Each names the phase that it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Exec to the end of flag parsing.
    Start,
    /// `/dev/kvm` is open, and KVM is making the VM.
    OpenKvm,
    /// Guest memory is mapped.
    Memory,
    /// Kernel and initramfs are mapped or copied.
    Kernel,
    /// The VM is made, and has its memory.
    Vm,
    /// Boot parameters, ACPI and page tables are written.
    Tables,
    /// The vCPUs are made and their registers set.
    Vcpus,
    /// Devices and threads are ready: the first `KVM_RUN` follows.
    FirstRun,
    /// A mark: the first instruction of the guest's process 1.
    UserSpace,
    /// A mark: process 1 has set the guest up.
    InitReady,
    /// A mark: the workload starts.
    WorkloadStart,
    /// A mark: the workload has ended.
    WorkloadEnd,
    /// The guest ended the VM, or was ended.
    End,
    /// vCPUs, VM and memory are closed.
    Teardown,
}

impl Phase {
    /// The phase's name in the JSON timeline.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::OpenKvm => "open-kvm",
            Self::Memory => "memory",
            Self::Kernel => "kernel-mapped",
            Self::Vm => "vm-made",
            Self::Tables => "tables",
            Self::Vcpus => "vcpus-made",
            Self::FirstRun => "first-run",
            Self::UserSpace => "guest-kernel",
            Self::InitReady => "guest-init",
            Self::WorkloadStart => "workload-setup",
            Self::WorkloadEnd => "workload",
            Self::End => "guest-end",
            Self::Teardown => "teardown",
        }
    }

    /// The byte that a guest writes to port 0x80 when this phase of its own ends.
    #[must_use]
    pub const fn mark(self) -> Option<u8> {
        match self {
            Self::UserSpace => Some(0xe0),
            Self::InitReady => Some(0xe1),
            Self::WorkloadStart => Some(0xe2),
            Self::WorkloadEnd => Some(0xe3),
            _ => None,
        }
    }

    /// The phase that a byte on port 0x80 ends. Other bytes are no marks: Linux writes there to wait a microsecond.
    #[must_use]
    pub fn of_mark(byte: u8) -> Option<Self> {
        let marked = [Self::UserSpace, Self::InitReady, Self::WorkloadStart, Self::WorkloadEnd];
        marked.into_iter().find(|phase| phase.mark() == Some(byte))
    }
}

/// One moment.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    pub phase: Phase,
    pub at: Duration,
    pub exits: Exits,
}

/// The moments of a run so far. Cheap to share; costs nothing where it is off.
pub struct Timeline {
    clock: Clock,
    on: bool,
    recorded: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    moments: Vec<Moment>,
    sources: Vec<Arc<dyn ExitSource>>,
}

impl Timeline {
    /// An empty timeline. One that is off records nothing.
    #[must_use]
    pub fn new(clock: Clock, on: bool) -> Self {
        Self { clock, on, recorded: Mutex::default() }
    }

    /// Whether anything is recorded.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// From now on each moment also takes these exit counts.
    pub fn watch(&self, sources: Vec<Arc<dyn ExitSource>>) {
        self.lock().sources = sources;
    }

    /// The counts of the vCPUs are read for the last time: closing them must not wait for the timeline.
    pub fn unwatch(&self) {
        self.lock().sources.clear();
    }

    /// Records that `phase` has ended. A moment that is not later in the order than the last one is ignored, so a
    /// guest that writes marks without end takes no memory.
    pub fn mark(&self, phase: Phase) {
        if !self.on {
            return;
        }
        let at = self.clock.elapsed();
        let mut recorded = self.lock();
        let last = recorded.moments.last();
        if last.is_some_and(|m| m.phase >= phase) {
            return;
        }
        let mut exits = Exits::default();
        match (recorded.sources.is_empty(), last) {
            (true, Some(last)) => exits = last.exits.clone(),
            _ => recorded.sources.iter().for_each(|s| exits.add(&s.exits())),
        }
        recorded.moments.push(Moment { phase, at, exits });
    }

    /// Records a byte that the guest wrote to port 0x80.
    pub fn guest_mark(&self, byte: u8) {
        if let Some(phase) = Phase::of_mark(byte) {
            self.mark(phase);
        }
    }

    pub(super) fn moments(&self) -> Vec<Moment> {
        self.lock().moments.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(timeline: &Timeline) -> Vec<Phase> {
        timeline.moments().iter().map(|m| m.phase).collect()
    }

    #[test]
    fn marks_count_once_and_in_order() {
        let t = Timeline::new(Clock::start(), true);
        t.mark(Phase::FirstRun);
        for byte in [0x11, 0xe1, 0xe0, 0xe1, 0xe3, 0xe2, 0xff] {
            t.guest_mark(byte);
        }
        t.mark(Phase::End);
        assert_eq!(phases(&t), [Phase::FirstRun, Phase::InitReady, Phase::WorkloadEnd, Phase::End]);
    }

    #[test]
    fn off_records_nothing() {
        let t = Timeline::new(Clock::start(), false);
        t.mark(Phase::Start);
        assert!(phases(&t).is_empty());
    }
}
