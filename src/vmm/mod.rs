//! A running VM: built by [`build`], run to its end by [`run`].

mod boot_files;
mod builder;
mod console;
mod devices;
mod end;
mod run;

use std::sync::Arc;

use crate::metrics::Timeline;
use crate::sandbox::{Kept, Layers};
use crate::vcpu::{Reports, Vcpu};
use crate::vm::{Memory, Vm};

pub use builder::{BuildError, build};
pub use end::End;
pub use run::{RunError, run};

/// A VM that is built: everything is open, no thread runs yet, and nothing is confined.
///
/// The fields are dropped in this order: KVM must let go of guest memory before it is unmapped.
pub struct Vmm {
    vcpus: Vec<Vcpu>,
    reports: Reports,
    events: run::EventSources,
    console: Option<console::Console>,
    timeline: Arc<Timeline>,
    vm: Vm,
    memory: Memory,
    layers: Layers,
    kept: Kept,
}
