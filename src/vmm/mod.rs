//! A running VM: built by [`build`], run to its end by [`run`].

mod boot_files;
mod builder;
mod console;
mod devices;
mod end;
mod machine;
mod metrics;
mod request;
mod run;
mod state;

use std::sync::Arc;

use crate::metrics::{Registry, Timeline};
use crate::vm::{Memory, Vm};

pub use builder::{BuildError, build};
pub use end::End;
pub use request::{Answer, Refusal, Request, VmHandle, Wanted};
pub use run::{Ended, RunError, run};
pub use state::{State, StateCell};

/// A VM that is built and not yet running.
///
/// The fields are dropped in this order: KVM must let go of guest memory before it is unmapped.
pub struct Vmm {
    machine: machine::Machine,
    events: run::EventSources,
    console: Option<console::Console>,
    timeline: Arc<Timeline>,
    metrics: Arc<Registry>,
    vm: Vm,
    memory: Memory,
}

impl Vmm {
    /// The VM as other threads see it. To be asked before [`run`], which answers its requests.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        let (requests, wake) = self.events.for_requests();
        VmHandle { requests, wake, state: self.machine.state.clone(), metrics: self.metrics.clone() }
    }
}
