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

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::devices::virtio::vsock::HostSocket;
use crate::metrics::{Registry, Timeline};
use crate::sandbox::{Kept, Layers, ThreadKind};
use crate::vcpu::{Reports, Vcpu};
use crate::vm::{Memory, Vm};

pub use builder::{BuildError, build};
pub use end::End;
pub use request::{Answer, Refusal, Request, VmHandle, Wanted};
pub use run::{Ended, RunError, run};
pub use service::{Service, clean_up_at_end};
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
    vsock: Option<Arc<HostSocket>>,
    signals: Option<Box<dyn SignalSink>>,
    at_end: Option<AtEnd>,
    services: Vec<Box<dyn Service>>,
}

/// Called with how the VM ended.
pub type AtEnd = Box<dyn FnOnce(&End)>;

/// Takes the signals that come for this process, for the guest.
pub trait SignalSink {
    /// Passes a signal on by its number. `false`: the guest is not there to have it, and the VM is to end.
    fn signal(&self, number: u8) -> bool;

    /// The terminal has another size.
    fn resized(&self);
}

impl Vmm {
    /// Starts `service` with the VM, once the process is confined.
    pub fn add_service(&mut self, service: Box<dyn Service>) {
        self.services.push(service);
    }

    /// Has the guest's next connection to a port of the host meet `stream`. The other end is this process's.
    ///
    /// # Errors
    /// The VM has no socket device.
    pub fn meet_guest(&mut self, port: u32, stream: UnixStream) -> io::Result<()> {
        let vsock = self.vsock.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        self.kept.add("a stream for the guest", &stream);
        vsock.meet(port, stream)
    }

    /// Has signals go to `sink` instead of ending the VM.
    pub fn pass_signals_to(&mut self, sink: Box<dyn SignalSink>) {
        self.signals = Some(sink);
    }

    /// Calls `at_end` when it is known how the VM ends, before its services end.
    pub fn at_end(&mut self, at_end: AtEnd) {
        self.at_end = Some(at_end);
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
