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
mod service;
mod share;
mod socket_file;
mod state;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::metrics::{Registry, Timeline};
use crate::sandbox::{Kept, Layers, ThreadKind};
use crate::vcpu::{Reports, Vcpu};
use crate::vm::{Memory, Vm};

pub use builder::{BuildError, build};
pub use end::End;
pub use request::{Answer, Refusal, Request, VmHandle, Wanted};
pub use run::{Ended, RunError, run};
pub use service::Service;
pub use state::{State, StateCell};

/// A VM that is built: everything is open, no thread runs yet, and nothing is confined.
///
/// The fields are dropped in this order: no vCPU may be left when guest memory is unmapped.
pub struct Vmm {
    vcpus: Vec<Vcpu>,
    reports: Reports,
    machine: machine::Machine,
    events: run::EventSources,
    consoles: Vec<console::Console>,
    timeline: Arc<Timeline>,
    metrics: Arc<Registry>,
    vm: Vm,
    memory: Memory,
    layers: Layers,
    kept: Kept,
    /// What the thread that runs it is confined to.
    kind: ThreadKind,
    services: Vec<Box<dyn Service>>,
}

impl Vmm {
    /// Starts `service` with the VM, once the process is confined.
    pub fn add_service(&mut self, service: Box<dyn Service>) {
        self.services.push(service);
    }

    /// Keeps a descriptor open, which must live as long as the VM. All that nobody names are closed.
    pub fn keep(&mut self, name: &'static str, descriptor: &impl AsRawFd) {
        self.kept.add(name, descriptor);
    }

    /// The VM as other threads see it. To be asked before [`run`], which answers its requests.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        let (requests, wake) = self.events.for_requests();
        VmHandle { requests, wake, state: self.machine.parts.state.clone(), metrics: self.metrics.clone() }
    }
}
