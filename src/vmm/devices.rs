//! The virtio devices of a VM: made from the configuration, and connected to the guest.

use std::sync::{Arc, Mutex};

use kvm_ioctls::IoEventAddress;
use thiserror::Error;

use crate::arch::x86_64::layout::{MAX_VIRTIO_DEVICES, VIRTIO_MMIO_LEN, VirtioSlot, virtio_slots};
use crate::bus::{Bus, Overlap};
use crate::config::VmConfig;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{HostSocketError, Vsock};
use crate::devices::virtio::{
    Interrupt, MmioTransport, NOTIFY_OFFSET, Transport, TransportParts, VirtioDevice, VmmThread,
};
use crate::vm::{KvmError, Memory, Vm};

/// A virtio device cannot be part of the VM.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// More than there are interrupts.
    #[error("the VM has {0} virtio devices, and there is room for {MAX_VIRTIO_DEVICES}: leave some out")]
    TooMany(usize),
    /// The socket of `--vsock`.
    #[error(transparent)]
    Vsock(#[from] HostSocketError),
    /// KVM refused its interrupt or its notifications.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its place is taken.
    #[error(transparent)]
    Bus(#[from] Overlap),
}

/// The devices of a VM, not yet connected, each with its place.
pub(super) struct Devices(Vec<(VirtioSlot, Box<dyn VirtioDevice>)>);

impl Devices {
    /// Opens what the devices of `config` need. Their order is the order in which the guest finds them, and so that of
    /// its names for them (`vda`, `vdb`): it never changes.
    ///
    /// # Errors
    /// A device cannot be made, or there are too many.
    pub(super) fn open(config: &VmConfig) -> Result<Self, DeviceError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        if config.rng {
            devices.push(Box::new(Rng::default()));
        }
        if let Some(vsock) = &config.vsock {
            devices.push(Box::new(Vsock::open(vsock.cid, &vsock.socket)?));
        }
        if devices.len() > MAX_VIRTIO_DEVICES {
            return Err(DeviceError::TooMany(devices.len()));
        }
        Ok(Self(virtio_slots().zip(devices).collect()))
    }

    /// Where they are.
    pub(super) fn slots(&self) -> Vec<VirtioSlot> {
        self.0.iter().map(|(slot, _)| *slot).collect()
    }

    /// Gives each its interrupt, its notifications and its place on the bus.
    ///
    /// # Errors
    /// KVM refuses.
    pub(super) fn connect(
        self,
        vm: &Vm,
        memory: &Memory,
        bus: &mut Bus,
        vmm: &VmmThread,
    ) -> Result<(), DeviceError> {
        for (slot, device) in self.0 {
            let address = IoEventAddress::Mmio(slot.address + NOTIFY_OFFSET);
            let queues = 0..device.queue_sizes().len() as u32;
            let notify = queues.map(|queue| vm.ioeventfd(&address, Some(queue)).map(Arc::new));
            let parts = TransportParts {
                notify: notify.collect::<Result<_, _>>()?,
                interrupt: Arc::new(Interrupt::new(vm.irqfd(slot.gsi)?)),
                memory: memory.clone(),
                vmm: vmm.clone(),
                device,
            };
            let registers = Arc::new(Mutex::new(MmioTransport::new(Transport::new(parts))));
            bus.insert("a virtio device", slot.address, VIRTIO_MMIO_LEN, registers)?;
        }
        Ok(())
    }
}
