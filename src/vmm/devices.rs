//! The virtio devices of a VM: made from the configuration, and connected to the guest.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::IoEventAddress;
use thiserror::Error;

use crate::arch::x86_64::layout::{MAX_VIRTIO_DEVICES, VIRTIO_MMIO_LEN, VirtioSlot, virtio_slots};
use crate::bus::{Bus, Overlap};
use crate::config::{NetBackend, Publish, VmConfig};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::net::{Backend, MAX_PAIRS, Net, NetParts, Passt, PasstError, Tap, TapError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::{
    Interrupt, MmioTransport, NOTIFY_OFFSET, Transport, TransportParts, VirtioDevice, VmmThread,
};
use crate::devices::{AddDeviceError, DeviceControls};
use crate::metrics::Registry;
use crate::sandbox::Kept;
use crate::vm::{KvmError, Memory, Vm};

/// A virtio device cannot be part of the VM.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// More than there are interrupts.
    #[error("the VM has {0} virtio devices, and there is room for {MAX_VIRTIO_DEVICES}: leave some out")]
    TooMany(usize),
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A network card has no descriptor for its timers.
    #[error("--net: no descriptor is left: raise the limit (ulimit -n)")]
    Net(#[source] io::Error),
    /// A network card's tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A network card's passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// KVM refused its interrupt or its notifications.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its id is taken.
    #[error(transparent)]
    Id(#[from] AddDeviceError),
    /// Its place is taken.
    #[error(transparent)]
    Bus(#[from] Overlap),
}

/// The devices of a VM, not yet connected, each with its place.
pub(super) struct Devices(Vec<(VirtioSlot, Box<dyn VirtioDevice>)>);

impl Devices {
    /// Opens what the devices of `config` need, and registers their counters in `metrics` and what they can be asked in
    /// `controls`. Their order is the order in which the guest finds them, and so that of
    /// its names for them (`vda`, `vdb`): it never changes.
    ///
    /// # Errors
    /// A device cannot be made, or there are too many.
    pub(super) fn open(
        config: &VmConfig,
        metrics: &Registry,
        controls: &mut DeviceControls,
    ) -> Result<Self, DeviceError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        if config.rng {
            let rng = Rng::new(metrics);
            controls.add(rng.control())?;
            devices.push(Box::new(rng));
        }
        for (place, disk) in config.disks.iter().enumerate() {
            devices.push(Box::new(Block::open(disk, place, config.cpus)?));
        }
        if let Some(balloon) = &config.balloon {
            let balloon = Balloon::new(balloon, config.memory.size);
            controls.add(balloon.control())?;
            devices.push(Box::new(balloon));
        }
        open_nets(config, metrics, |net| {
            controls.add(net.control())?;
            devices.push(Box::new(net));
            Ok(())
        })?;
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
        vmm: &VmmThread,
        bus: &mut Bus,
        kept: &mut Kept,
    ) -> Result<(), DeviceError> {
        for (slot, device) in self.0 {
            let address = IoEventAddress::Mmio(slot.address + NOTIFY_OFFSET);
            let queues = 0..device.queue_sizes().len() as u32;
            let notify = queues.map(|queue| vm.ioeventfd(&address, Some(queue)).map(Arc::new));
            let notify: Vec<_> = notify.collect::<Result<_, _>>()?;
            let line = vm.irqfd(slot.gsi)?;
            notify.iter().for_each(|event| kept.add("a virtio device's notifications", &**event));
            kept.add("a virtio device's interrupt", &line);
            device.keep(kept);
            let parts = TransportParts {
                notify,
                interrupt: Arc::new(Interrupt::new(line)),
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

/// Opens the network cards. The first in user mode has all published ports.
fn open_nets(
    config: &VmConfig,
    metrics: &Registry,
    mut add: impl FnMut(Net) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let mut publish: &[Publish] = &config.publish;
    for (index, net) in config.nets.iter().enumerate() {
        let (backends, name): (Vec<Box<dyn Backend>>, _) = match &net.backend {
            NetBackend::Tap(name) => {
                let most = (config.cpus as usize).clamp(1, MAX_PAIRS);
                let queues = Tap::open(name, most)?.into_iter();
                (queues.map(|queue| Box::new(queue) as _).collect(), format!("tap={name}"))
            }
            NetBackend::User => {
                let passt = Passt::start(std::mem::take(&mut publish))?;
                (vec![Box::new(passt)], "user".into())
            }
        };
        let parts = NetParts {
            id: format!("net{index}"),
            mac: net.mac(index),
            backends,
            name,
            iops: net.iops,
            bandwidth: net.bandwidth.map(|b| b.0),
        };
        add(Net::new(parts, metrics).map_err(DeviceError::Net)?)?;
    }
    Ok(())
}
