//! The counters of a VM as a whole. Those of its devices are registered where the devices are.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::VmConfig;
use crate::metrics::{Counter, ExitSource, Label, Metric, Registry, Snapshot, Source};
use crate::sandbox::Kept;
use crate::sys::smaps::Smaps;
use crate::vm::Memory;

use super::state::{State, StateCell};

const INFO: Metric = Metric::gauge("microvm_info", "Always 1; its labels tell microvm's version.");
const MEMORY: Metric = Metric::gauge("microvm_memory_bytes", "Guest memory.");
const VCPUS: Metric = Metric::gauge("microvm_vcpus", "Number of vCPUs.");
const START: Metric = Metric::gauge("microvm_start_time_seconds", "When the VM was built, in Unix time.");
const STATE: Metric = Metric::gauge("microvm_state", "1 for the state that the VM is in, 0 for the others.");
const PAUSES: Metric = Metric::counter("microvm_pauses_total", "Pauses that all vCPUs have confirmed.");
const EXITS: Metric =
    Metric::counter("microvm_vcpu_exits_total", "VM exits that reached microvm, by vCPU and reason.");
const KVM_EXITS: Metric =
    Metric::counter("microvm_vcpu_kvm_exits_total", "VM exits as KVM counts them, by vCPU and reason.");
const ALL_EXITS: Metric =
    Metric::counter("microvm_vcpu_all_exits_total", "All VM exits of a vCPU as KVM counts them.");
const TOUCHED: Metric =
    Metric::gauge("microvm_memory_touched_bytes", "Guest memory that the host has given pages to.");
const OWN: Metric = Metric::gauge(
    "microvm_memory_vmm_bytes",
    "Memory of microvm itself, guest memory left out; of shared pages its share (PSS).",
);

/// What is worked out when it is asked for.
struct VmSource {
    state: Arc<StateCell>,
    vcpus: Vec<Arc<dyn ExitSource>>,
}

/// Registers the counters of the VM, and returns the one for its pauses.
pub(super) fn register(
    registry: &Registry,
    config: &VmConfig,
    state: Arc<StateCell>,
    vcpus: Vec<Arc<dyn ExitSource>>,
) -> Counter {
    let vm = registry.group(&[]);
    registry.group(&[("version", env!("CARGO_PKG_VERSION"))]).gauge(INFO).set(1);
    vm.gauge(MEMORY).set(config.memory.size.0);
    vm.gauge(VCPUS).set(config.cpus.into());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    vm.gauge(START).set(now.as_secs());
    registry.add_source(Arc::new(VmSource { state, vcpus }));
    vm.counter(PAUSES)
}

impl Source for VmSource {
    fn collect(&self, snapshot: &mut Snapshot) {
        let now = self.state.get();
        for state in State::ALL {
            snapshot.add(STATE, vec![label("state", state.name())], (state == now).into());
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let vcpu_label = label("vcpu", &index.to_string());
            let exits = vcpu.exits();
            for (metric, counts) in [(EXITS, &exits.user), (KVM_EXITS, &exits.kvm)] {
                for (reason, n) in counts {
                    snapshot.add(metric, vec![vcpu_label.clone(), label("reason", reason)], *n);
                }
            }
            if let Some(total) = exits.total {
                snapshot.add(ALL_EXITS, vec![vcpu_label], total);
            }
        }
    }
}

/// What memory the VM takes of the host. Reading it walks page tables, so it is there where all is wanted.
pub(super) struct MemorySource {
    smaps: Smaps,
    guest: Vec<Range<u64>>,
}

impl MemorySource {
    /// Opens what tells of it.
    ///
    /// # Errors
    /// There is no /proc, or no descriptor left.
    pub(super) fn new(memory: &Memory, kept: &mut Kept) -> io::Result<Self> {
        let smaps = Smaps::open()?;
        kept.add("what memory is taken", &smaps.as_fd());
        Ok(Self { smaps, guest: memory.host_ranges() })
    }
}

impl Source for MemorySource {
    fn collect(&self, snapshot: &mut Snapshot) {
        if let Ok(taken) = self.smaps.read(&self.guest) {
            snapshot.add(TOUCHED, Vec::new(), taken.inside);
            snapshot.add(OWN, Vec::new(), taken.outside);
        }
    }
}

fn label(name: &'static str, value: &str) -> Label {
    (name, value.to_string())
}
