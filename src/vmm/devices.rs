//! The virtio devices of a VM: made from the configuration, and connected to the guest.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_ioctls::IoEventAddress;
use thiserror::Error;

use crate::arch::x86_64::layout::{MAX_VIRTIO_DEVICES, VIRTIO_MMIO_LEN, VirtioSlot, virtio_slots};
use crate::bus::{Bus, Overlap};
use crate::config::{HostEnd, NetBackend, NetConfig, Publish, Vhost, VmConfig};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::net::{
    Backend, Kernels, MAX_PAIRS, Net, NetParts, Passt, PasstError, Tap, TapError, VhostError, VhostNet,
    VhostParts,
};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::share::{Limits, Share, ShareError};
use crate::devices::virtio::vsock::{HostSocket, HostSocketError, Vsock};
use crate::devices::virtio::{
    Interrupt, MmioTransport, NOTIFY_OFFSET, Transport, TransportParts, VirtioDevice, VmmThread,
    WorkerControl,
};
use crate::devices::{AddDeviceError, DeviceControl, DeviceControls};
use crate::metrics::Registry;
use crate::sandbox::Kept;
use crate::vm::{KvmError, Memory, Vm};

use super::console::GuestEnd;
use super::service::Service;

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
    /// The socket of `--vsock`.
    #[error(transparent)]
    Vsock(#[from] HostSocketError),
    /// A shared folder.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A network card has no descriptor for its timers.
    #[error("--net: no descriptor is left: raise the limit (ulimit -n)")]
    Net(#[source] io::Error),
    /// A network card's tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A network card's passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// A network card's kernel worker.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The host refuses what a device needs of it.
    #[error("{0}: the host refuses what it needs")]
    Prepare(String, #[source] io::Error),
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
    /// The host's end of the socket device.
    pub vsock: Option<Arc<HostSocket>>,
    services: Vec<Box<dyn Service>>,
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
        open_nets(config, metrics, |control, net| {
            controls.add(control)?;
            devices.push(net);
            Ok(())
        })?;
        let mut console = None;
        if *config.console_end() != HostEnd::Null {
            let (device, end) = GuestEnd::virtio(metrics).map_err(DeviceError::Console)?;
            controls.add(end.control())?;
            devices.push(Box::new(device));
            console = Some(end);
        }
        let mut services: Vec<Box<dyn Service>> = Vec::new();
        let mut host_socket = None;
        if let Some(vsock) = &config.vsock {
            let (vsock, file) = Vsock::open(vsock.cid, &vsock.socket, metrics)?;
            services.push(Box::new(file));
            controls.add(vsock.control())?;
            host_socket = Some(vsock.host());
            devices.push(Box::new(vsock));
        }
        if !config.shares.is_empty() {
            let limits = Limits::of(config.shares.len());
            for (place, share) in config.shares.iter().enumerate() {
                let (share, server) = Share::open(share, place, limits, metrics)?;
                services.push(Box::new(server));
                controls.add(share.control())?;
                devices.push(Box::new(share));
            }
        }
        if devices.len() > MAX_VIRTIO_DEVICES {
            return Err(DeviceError::TooMany(devices.len()));
        }
        Ok(Self { all: virtio_slots().zip(devices).collect(), console, vsock: host_socket, services })
    }

    /// What runs beside the guest for them.
    pub(super) fn take_services(&mut self) -> Vec<Box<dyn Service>> {
        std::mem::take(&mut self.services)
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
        for (slot, mut device) in self.all {
            let address = IoEventAddress::Mmio(slot.address + NOTIFY_OFFSET);
            let queues = 0..device.queue_sizes().len() as u32;
            let notify = queues.map(|queue| vm.ioeventfd(&address, Some(queue)).map(Arc::new));
            let notify: Vec<_> = notify.collect::<Result<_, _>>()?;
            let line = vm.irqfd(slot.gsi)?;
            notify.iter().for_each(|event| kept.add("a virtio device's notifications", &**event));
            kept.add("a virtio device's interrupt", &line);
            device.prepare(memory).map_err(|e| DeviceError::Prepare(device.id().into(), e))?;
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

/// Opens the network cards. The first in user mode has all published ports.
fn open_nets(
    config: &VmConfig,
    metrics: &Registry,
    mut add: impl FnMut(Box<dyn DeviceControl>, Box<dyn VirtioDevice>) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let mut publish: &[Publish] = &config.publish;
    for (index, net) in config.nets.iter().enumerate() {
        let (id, mac) = (format!("net{index}"), net.mac(index));
        let (backends, name): (Vec<Box<dyn Backend>>, _) = match &net.backend {
            NetBackend::Tap(tap) => {
                let most = (config.cpus as usize).clamp(1, MAX_PAIRS);
                let (taps, name) = (Tap::open(tap, most)?, format!("tap={tap}"));
                if let Some(kernels) = open_kernels(net, taps.len())? {
                    let card = VhostNet::new(VhostParts { id, mac, taps, kernels, name })?;
                    add(card.control(), Box::new(card))?;
                    continue;
                }
                (taps.into_iter().map(|queue| Box::new(queue) as _).collect(), name)
            }
            NetBackend::User => {
                let passt = Passt::start(std::mem::take(&mut publish), net)?;
                (vec![Box::new(passt)], "user".into())
            }
        };
        let (iops, bandwidth) = (net.iops, net.bandwidth.map(|b| b.0));
        let card = Net::new(NetParts { id, mac, backends, name, iops, bandwidth }, metrics);
        let card = card.map_err(DeviceError::Net)?;
        add(card.control(), Box::new(card))?;
    }
    Ok(())
}

/// The kernel's workers for a card, where it is to have them.
fn open_kernels(net: &NetConfig, pairs: usize) -> Result<Option<Kernels>, VhostError> {
    match net.vhost {
        Vhost::On => Kernels::open(pairs).map(Some),
        Vhost::Auto if net.can_use_vhost() => {
            Ok(Kernels::open(pairs).inspect_err(|e| log::info!("vhost=auto does without: {e}")).ok())
        }
        Vhost::Auto | Vhost::Off => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, RawFd};
    use std::sync::mpsc::{self, Receiver};
    use std::time::Duration;

    use vmm_sys_util::epoll::{Epoll, EventSet};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::virtio::testing::Driver;
    use crate::devices::virtio::{ActivateError, Activation, ActiveQueue, DeviceKind, Served, Worker};
    use crate::sys::event::new_event;

    /// A device with a host that answers late.
    struct Slow {
        host: Option<Receiver<()>>,
        worker: Option<Worker<SlowWorker>>,
    }

    struct SlowWorker {
        event: EventFd,
        host: Receiver<()>,
    }

    impl Served for SlowWorker {
        fn events(&self) -> Vec<(RawFd, EventSet, u64)> {
            vec![(self.event.as_raw_fd(), EventSet::IN, 0)]
        }
        fn event(&mut self, _token: u64, _ready: EventSet, _epoll: &Epoll) {}
        fn drain(&mut self) {
            let _ = self.host.recv();
        }
    }

    impl VirtioDevice for Slow {
        fn kind(&self) -> DeviceKind {
            DeviceKind::Block
        }
        fn id(&self) -> &str {
            "slow"
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            let host = self.host.take().ok_or(ActivateError::QueueMissing(0))?;
            let worker = SlowWorker { event: new_event()?, host };
            self.worker = Some(Worker::start("slow", activation.confined, worker)?);
            Ok(())
        }
        fn workers(&self) -> Vec<WorkerControl> {
            self.worker.iter().map(Worker::control).collect()
        }
        fn quiesce(&mut self) -> Vec<ActiveQueue> {
            self.worker.take().and_then(Worker::stop);
            Vec::new()
        }
    }

    fn open(disks: usize) -> Result<Devices, DeviceError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = serde_json::json!({ "path": file.path(), "readonly": true });
        let config = serde_json::json!({ "kernel": { "path": "vmlinux" }, "rng": true, "balloon": "0",
            "disks": vec![disk; disks] });
        let config = serde_json::from_value(config).unwrap();
        Devices::open(&config, &Registry::default(), &mut DeviceControls::default())
    }

    #[test]
    fn devices_have_their_places_in_a_stable_order_and_a_bound() {
        let devices = open(2).unwrap();
        let ids: Vec<_> = devices.all.iter().map(|(_, device)| device.id()).collect();
        assert_eq!(ids, ["rng", "disk0", "disk1", "balloon"]);
        assert!(devices.all.is_sorted_by(|(a, _), (b, _)| a.address < b.address && a.gsi != b.gsi));
        // With the entropy source and the balloon.
        assert_eq!(open(MAX_VIRTIO_DEVICES - 2).unwrap().slots().len(), MAX_VIRTIO_DEVICES);
        for disks in [MAX_VIRTIO_DEVICES - 1, 100] {
            assert!(matches!(open(disks), Err(DeviceError::TooMany(n)) if n == disks + 2));
        }
    }

    #[test]
    fn a_device_that_is_not_ready_in_time_is_named_and_all_go_on() {
        let (answer, host) = mpsc::channel();
        let driver = Driver::start(Box::new(Slow { host: Some(host), worker: None }), &[16]);
        // One that no driver has found has nothing to pause.
        let idle = Driver::new(Box::new(Slow { host: None, worker: None }));
        let transports = [idle, driver].map(|d| Arc::new(Mutex::new(d.mmio))).to_vec();
        let mut threads = DeviceThreads { transports, paused: Vec::new() };
        assert_eq!(threads.pause(Instant::now() + Duration::from_millis(20)), Err("slow".into()));
        // Its host answers from now on.
        drop(answer);
        assert_eq!(threads.pause(Instant::now() + Duration::from_secs(10)), Ok(()));
        threads.resume();
    }
}
