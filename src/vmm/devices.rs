//! The virtio devices of a VM: made from the configuration, and connected to the guest.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_ioctls::IoEventAddress;
use thiserror::Error;

use crate::arch::x86_64::layout::{MAX_VIRTIO_DEVICES, VIRTIO_MMIO_LEN, VirtioSlot, virtio_slots};
use crate::bus::{Bus, Overlap};
use crate::config::{HostEnd, VmConfig};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::{
    Interrupt, MmioTransport, NOTIFY_OFFSET, Transport, TransportParts, VirtioDevice, VmmThread,
    WorkerControl,
};
use crate::devices::{AddDeviceError, DeviceControls};
use crate::metrics::Registry;
use crate::sandbox::Kept;
use crate::vm::{KvmError, Memory, Vm};

use super::console::GuestEnd;

/// A virtio device cannot be part of the VM.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// More than there are interrupts.
    #[error("the VM has {0} virtio devices, and there is room for {MAX_VIRTIO_DEVICES}: leave some out")]
    TooMany(usize),
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The virtio console.
    #[error("--console: no descriptor is left: raise the limit (ulimit -n)")]
    Console(#[source] std::io::Error),
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
pub(super) struct Devices {
    all: Vec<(VirtioSlot, Box<dyn VirtioDevice>)>,
    /// What the virtio console prints and takes, until the host's end has it.
    pub console: Option<GuestEnd>,
}

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
            let block = Block::open(disk, place, config.cpus, metrics)?;
            controls.add(block.control())?;
            devices.push(Box::new(block));
        }
        if let Some(balloon) = &config.balloon {
            let balloon = Balloon::new(balloon, config.memory.size);
            controls.add(balloon.control())?;
            devices.push(Box::new(balloon));
        }
        let mut console = None;
        if *config.console_end() != HostEnd::Null {
            let (device, end) = GuestEnd::virtio(metrics).map_err(DeviceError::Console)?;
            controls.add(end.control())?;
            devices.push(Box::new(device));
            console = Some(end);
        }
        if devices.len() > MAX_VIRTIO_DEVICES {
            return Err(DeviceError::TooMany(devices.len()));
        }
        Ok(Self { all: virtio_slots().zip(devices).collect(), console })
    }

    /// Where they are.
    pub(super) fn slots(&self) -> Vec<VirtioSlot> {
        self.all.iter().map(|(slot, _)| *slot).collect()
    }

    /// Gives each its interrupt, its notifications and its place on the bus, and returns the way to pause all.
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
    ) -> Result<DeviceThreads, DeviceError> {
        let mut threads = DeviceThreads::default();
        for (slot, device) in self.all {
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
            threads.transports.push(registers.clone());
            bus.insert("a virtio device", slot.address, VIRTIO_MMIO_LEN, registers)?;
        }
        Ok(threads)
    }
}

/// The threads of all virtio devices.
#[derive(Default)]
pub(super) struct DeviceThreads {
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    paused: Vec<WorkerControl>,
}

impl DeviceThreads {
    /// Has all of them finish what is under way and stop, by `deadline`: when this says so, no device touches guest
    /// memory. No vCPU runs, so no device starts or ends meanwhile, and none is locked.
    ///
    /// # Errors
    /// The name of one that still works; all go on.
    pub(super) fn pause(&mut self, deadline: Instant) -> Result<(), String> {
        let workers =
            |t: &Arc<Mutex<MmioTransport>>| t.lock().unwrap_or_else(PoisonError::into_inner).workers();
        self.paused = self.transports.iter().flat_map(workers).collect();
        // All at once: the time is that of the slowest.
        self.paused.iter().for_each(WorkerControl::ask_to_pause);
        match self.paused.iter().find(|worker| !worker.is_paused_by(deadline)) {
            None => Ok(()),
            Some(worker) => {
                let name = worker.name().to_string();
                self.resume();
                Err(name)
            }
        }
    }

    /// Lets those go on that were paused.
    pub(super) fn resume(&mut self) {
        self.paused.drain(..).for_each(|worker| worker.resume());
    }
}
