//! What can be asked of a running VM, by whoever has its [`VmHandle`].
//!
//! The event loop answers, so it alone changes the VM. It knows nothing of sockets: a request comes through a channel
//! and carries the way back for its answer.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::{ChangeError, DeviceSummary};
use crate::metrics::Registry;

use super::machine::PAUSE_BOUND;
use super::state::{State, StateCell};

/// Longer than the event loop takes for anything.
const ANSWER_BOUND: Duration = Duration::from_secs(6);

/// A state that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// The guest runs.
    Running,
    /// No vCPU runs, and no device works.
    Paused,
    /// The VM is closed, as by SIGTERM.
    Stopped,
}

/// What can be asked.
#[derive(Debug)]
pub enum Request {
    /// Change the state. The answer comes when the VM is there: it is confirmed, not only noted.
    SetState(Wanted),
    /// List the devices.
    Devices,
    /// Describe the device of this id.
    Device(String),
    /// Change the device of this id, then describe it.
    ChangeDevice(String, Map<String, Value>),
}

/// What the VM answers.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// The state that the VM is in.
    State(State),
    /// Its devices.
    Devices(Vec<DeviceSummary>),
    /// A device.
    Device(DeviceSummary, Value),
}

/// Why a request was refused. The VM is as it was.
#[derive(Debug, Error)]
pub enum Refusal {
    /// There is no such way in the table of states.
    #[error("the VM is {}, and cannot be asked to be {}", from.name(), State::from(*wanted).name())]
    NoWay {
        /// Where it is.
        from: State,
        /// Where it was to go.
        wanted: Wanted,
    },
    /// A vCPU waits for something inside a device, or in the host; or a device for a slow host.
    #[error("a vCPU or a device did not pause within {PAUSE_BOUND:?}; the guest runs on: try again")]
    Stuck,
    /// No such device.
    #[error("there is no device {0}: GET /devices lists them")]
    NoDevice(String),
    /// The device refused.
    #[error(transparent)]
    Device(#[from] ChangeError),
    /// The VM ended before it could answer.
    #[error("the VM is ending")]
    Ended,
    /// The event loop hangs.
    #[error("the VM did not answer within {ANSWER_BOUND:?}")]
    NoAnswer,
}

/// Room for the one answer, so that the event loop never waits for whoever asked.
pub(super) type AnswerTo = SyncSender<Result<Answer, Refusal>>;
/// A request and the way back.
pub(super) type Envelope = (Request, AnswerTo);

/// A running VM, seen from another thread.
#[derive(Clone)]
pub struct VmHandle {
    pub(super) requests: mpsc::Sender<Envelope>,
    pub(super) wake: Arc<EventFd>,
    pub(super) state: Arc<StateCell>,
    pub(super) metrics: Arc<Registry>,
}

impl VmHandle {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The VM refuses, ends, or does not answer within some seconds.
    pub fn ask(&self, request: Request) -> Result<Answer, Refusal> {
        let (to, answer) = mpsc::sync_channel(1);
        self.requests.send((request, to)).map_err(|_| Refusal::Ended)?;
        // Full only after 2⁶⁴ - 2 writes without a read.
        let _ = self.wake.write(1);
        match answer.recv_timeout(ANSWER_BOUND) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(Refusal::Ended),
            Err(RecvTimeoutError::Timeout) => Err(Refusal::NoAnswer),
        }
    }

    /// The state now. Never waits.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.get()
    }

    /// The VM's counters. Reading them never waits for the VM.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Registry> {
        &self.metrics
    }
}

impl From<Wanted> for State {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Running => Self::Running,
            Wanted::Paused => Self::Paused,
            Wanted::Stopped => Self::Stopped,
        }
    }
}
