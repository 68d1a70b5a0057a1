//! The virtual machine as KVM has it: capabilities, memory slots, the interrupt controllers, event descriptors.

pub mod host;
mod kvm;
mod memory;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout;
use crate::sandbox::Kept;
use crate::sys::background_close::BackgroundClose;
use crate::sys::event::new_event;

pub use kvm::{HostKvm, OpenKvmError};
pub use memory::{LoadError, Loaded, Memory, MemoryError};

/// A request that KVM refused.
#[derive(Debug, Error)]
#[error("KVM cannot {what}")]
pub struct KvmError {
    what: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

/// Names what was asked of KVM.
pub(crate) fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { what, source }
}

/// A VM with its in-kernel interrupt controllers.
pub struct Vm {
    fd: VmFd,
    /// Declared, and so dropped, after the descriptor itself.
    end: Option<BackgroundClose>,
}

impl Vm {
    /// Makes a VM with 8259, I/O APIC and local APICs inside KVM, and an i8254 timer if `pit` asks for it.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn new(kvm: &Kvm, pit: bool) -> Result<Self, KvmError> {
        let fd = loop {
            match kvm.create_vm() {
                // A signal that arrives in the middle makes KVM give up, though nothing is wrong.
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other.map_err(kvm_error("make a VM"))?,
            }
        };
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(kvm_error("place its TSS"))?;
        // Before any vCPU is made, so that each gets a local APIC (KVM API, KVM_CREATE_IRQCHIP).
        fd.create_irq_chip().map_err(kvm_error("make the interrupt controllers"))?;
        if pit {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(config).map_err(kvm_error("make the i8254 timer"))?;
        }
        Ok(Self { fd, end: None })
    }

    /// Has the kernel close the VM in the background. KVM takes a VM down in what waits for several grace periods of
    /// RCU, 10 to 30 ms in which nothing is done, and a process cannot end before. Where this cannot be had, it waits.
    /// `kvm` is this process's own opening of the device, where these VMs are counted.
    pub fn close_in_background(&mut self, kvm: &Kvm) {
        match BackgroundClose::of(&self.fd, kvm) {
            Ok(end) => self.end = Some(end),
            Err(e) => log::debug!("this process waits for KVM at its end: {e}"),
        }
    }

    /// Gives `memory` to the guest: a slot for each of its regions.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_memory(&self, memory: &Memory) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.guest().iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the region is mapped as long as `memory` lives, and a `Vmm` drops its vCPUs, through which alone
            // KVM uses the address, before its memory. Regions do not overlap, so neither do the slots.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(kvm_error("take the guest's memory"))?;
        }
        Ok(())
    }

    /// Puts its descriptor on the list of those that stay open.
    pub fn keep(&self, kept: &mut Kept) {
        kept.add("the VM", &self.fd);
        if let Some(end) = &self.end {
            kept.add("the VM's end", end);
        }
    }

    /// A new vCPU.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_vcpu(&self, index: u32) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(index.into()).map_err(kvm_error("make a vCPU"))
    }

    /// An event descriptor (irqfd): writing to it raises interrupt `gsi` in the guest, edge-triggered.
    ///
    /// # Errors
    /// KVM refuses, or there is no descriptor left.
    pub fn irqfd(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let what = "connect an interrupt";
        let event = event_for(what)?;
        self.fd.register_irqfd(&event, gsi).map_err(kvm_error(what))?;
        Ok(event)
    }

    /// An event descriptor (ioeventfd) that KVM itself signals when the guest writes to `address`; with `value`, only
    /// when it writes just that, in 32 bits.
    ///
    /// # Errors
    /// KVM refuses, or there is no descriptor left.
    pub fn ioeventfd(&self, address: &IoEventAddress, value: Option<u32>) -> Result<EventFd, KvmError> {
        let what = "connect a notification address";
        let event = event_for(what)?;
        let registered = match value {
            Some(value) => self.fd.register_ioevent(&event, address, value),
            None => self.fd.register_ioevent(&event, address, NoDatamatch),
        };
        registered.map_err(kvm_error(what))?;
        Ok(event)
    }
}

fn event_for(what: &'static str) -> Result<EventFd, KvmError> {
    new_event().map_err(|e| kvm_error(what)(kvm_ioctls::Error::new(e.raw_os_error().unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kvm_ioctls::VcpuExit;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn a_notification_stays_in_the_kernel() {
        let host = HostKvm::open(Path::new("/dev/kvm")).unwrap();
        let vm = Vm::new(host.kvm(), false).unwrap();
        let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
        vm.set_memory(&memory).unwrap();
        // In real mode: mov dx, 0x700; out dx, al; inc dx; out dx, al
        memory.guest().write_slice(&[0xba, 0x00, 0x07, 0xee, 0x42, 0xee], GuestAddress(0x1000)).unwrap();
        let notified = vm.ioeventfd(&IoEventAddress::Pio(0x700), None).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() }).unwrap();
        // The first write never comes out to us, only the second.
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x701, _)));
        assert_eq!(notified.read().unwrap(), 1);
    }

    #[test]
    fn an_interrupt_can_be_connected_once() {
        let host = HostKvm::open(Path::new("/dev/kvm")).unwrap();
        let vm = Vm::new(host.kvm(), false).unwrap();
        vm.irqfd(5).unwrap().write(1).unwrap();
    }
}
