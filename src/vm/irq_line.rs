//! An interrupt line that the calling thread itself drives.

use std::sync::Weak;

use kvm_ioctls::VmFd;

/// A line of the in-kernel interrupt controllers. For a pin of the I/O APIC this is cheaper than an irqfd, whose signals
/// KVM has a thread of its own work off, because the controllers' locks may not be taken where an event is signalled.
#[derive(Clone, Debug)]
pub struct IrqLine {
    /// The VM's owner alone decides when it ends.
    vm: Weak<VmFd>,
    gsi: u32,
}

impl IrqLine {
    pub(super) fn new(vm: Weak<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }

    /// Raises the interrupt, edge-triggered. `false`: KVM refused, or the VM is gone.
    #[must_use]
    pub fn pulse(&self) -> bool {
        let Some(vm) = self.vm.upgrade() else { return false };
        vm.set_irq_line(self.gsi, true).is_ok() && vm.set_irq_line(self.gsi, false).is_ok()
    }
}
