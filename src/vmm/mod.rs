//! A running VM: built by [`build`], run to its end by [`run`].

mod boot_files;
mod builder;
mod console;
mod devices;
mod end;
mod run;

use std::sync::Arc;

use crate::devices::virtio::balloon::BalloonHandle;
use crate::metrics::Timeline;
use crate::vcpu::VcpuThread;
use crate::vm::{Memory, Vm};

pub use builder::{BuildError, build};
pub use end::End;
pub use run::{RunError, run};

/// A VM that is built and not yet running.
///
/// The fields are dropped in this order: KVM must let go of guest memory before it is unmapped.
pub struct Vmm {
    vcpus: Vec<VcpuThread>,
    events: run::EventSources,
    console: Option<console::Console>,
    timeline: Arc<Timeline>,
    balloon: Option<BalloonHandle>,
    vm: Vm,
    memory: Memory,
}

impl Vmm {
    /// The way to change the balloon while the VM runs, where it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<BalloonHandle> {
        self.balloon.clone()
    }
}
