//! The states of a VM and the ways between them.

use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

/// What a VM is doing, as the control socket shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Built; no instruction of the guest has run.
    Built,
    /// The guest runs.
    Running,
    /// A pause is under way: some vCPUs still run.
    Pausing,
    /// No vCPU runs, and no device works.
    Paused,
    /// The VM is being closed. There is no way back.
    Stopped,
}

/// What happens to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Run, for the first time or again.
    Resume,
    /// Ask the vCPUs to park.
    Pause,
    /// All vCPUs have parked.
    Parked,
    /// A vCPU did not park in time.
    GaveUp,
    /// Close the VM.
    Stop,
}

/// Every way there is; what is not here is refused.
const WAYS: [(State, Change, State); 13] = [
    (State::Built, Change::Resume, State::Running),
    (State::Built, Change::Stop, State::Stopped),
    (State::Running, Change::Resume, State::Running),
    (State::Running, Change::Pause, State::Pausing),
    (State::Running, Change::Stop, State::Stopped),
    (State::Pausing, Change::Pause, State::Pausing),
    (State::Pausing, Change::Parked, State::Paused),
    (State::Pausing, Change::GaveUp, State::Running),
    (State::Pausing, Change::Stop, State::Stopped),
    (State::Paused, Change::Pause, State::Paused),
    (State::Paused, Change::Resume, State::Running),
    (State::Paused, Change::Stop, State::Stopped),
    (State::Stopped, Change::Stop, State::Stopped),
];

impl State {
    pub(super) const ALL: [Self; 5] =
        [Self::Built, Self::Running, Self::Pausing, Self::Paused, Self::Stopped];

    /// The word for it, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }

    /// The state after `change`; `None` where there is no such way.
    pub(super) fn after(self, change: Change) -> Option<Self> {
        WAYS.iter().find(|(from, by, _)| (*from, *by) == (self, change)).map(|(.., to)| *to)
    }
}

/// A VM's state, written by the event loop alone and read from any thread.
#[derive(Debug)]
pub struct StateCell(AtomicU8);

impl StateCell {
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(State::Built as u8))
    }

    /// The state now.
    #[must_use]
    pub fn get(&self) -> State {
        let number = usize::from(self.0.load(Ordering::Acquire));
        State::ALL.get(number).copied().unwrap_or(State::Stopped)
    }

    pub(super) fn set(&self, state: State) {
        self.0.store(state as u8, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGES: [Change; 5] =
        [Change::Resume, Change::Pause, Change::Parked, Change::GaveUp, Change::Stop];

    #[test]
    fn no_way_stands_in_the_table_twice() {
        for (i, (from, by, _)) in WAYS.iter().enumerate() {
            let again = WAYS.iter().skip(i + 1).any(|(f, b, _)| (f, b) == (from, by));
            assert!(!again, "{from:?} {by:?}");
        }
    }

    #[test]
    fn a_stopped_vm_stays_stopped_and_every_vm_can_be_stopped() {
        for state in State::ALL {
            assert_eq!(state.after(Change::Stop), Some(State::Stopped), "{state:?}");
        }
        for change in CHANGES {
            assert!(matches!(State::Stopped.after(change), None | Some(State::Stopped)), "{change:?}");
        }
    }

    #[test]
    fn a_pause_goes_through_pausing() {
        let walk = |changes: &[Change]| changes.iter().try_fold(State::Built, |s, c| s.after(*c));
        use Change::{GaveUp, Parked, Pause, Resume};
        assert_eq!(walk(&[Resume, Pause, Parked, Resume]), Some(State::Running));
        assert_eq!(walk(&[Resume, Pause, GaveUp]), Some(State::Running));
        assert_eq!(walk(&[Resume, Pause, Resume]), None, "some vCPUs still have to park");
        assert_eq!(walk(&[Pause]), None, "nothing runs yet");
        assert_eq!(walk(&[Resume, Parked]), None, "nobody asked for that");
    }

    #[test]
    fn the_cell_keeps_each_state() {
        for state in State::ALL {
            let cell = StateCell::new();
            cell.set(state);
            assert_eq!(cell.get(), state);
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
