//! What every transport does: follows the driver's progress and hands the queues over (virtio 1.3 §2.1, §3.1).
//!
//! Register decoding is a transport's own (`mmio.rs`); a transport for PCI would sit beside it and use the same state.

mod mmio;
#[cfg(test)]
mod tests;
mod vmm_thread;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::vm::Memory;

use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt, Queue,
    QueueSetup, VirtioDevice, WorkerControl,
};

pub use mmio::{MmioTransport, NOTIFY_OFFSET};
pub use vmm_thread::{VmmThread, VmmThreadJobs};

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// The order in which a driver sets the status bits (§3.1.1).
const PROGRESS: [u8; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// Offered for every device.
const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// What a transport is made from.
pub struct TransportParts {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Guest memory.
    pub memory: Memory,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// An event for each queue, signalled by KVM when the driver notifies.
    pub notify: Vec<Arc<EventFd>>,
    /// Where devices are activated.
    pub vmm: VmmThread,
}

/// A device and how far its driver has come.
pub struct Transport {
    /// Away while it is being activated; after a VM that is being stopped took it, for good.
    device: Option<Box<dyn VirtioDevice>>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    notify: Vec<Arc<EventFd>>,
    vmm: VmmThread,
    offered: u64,
    max_sizes: Vec<u16>,
    status: u8,
    accepted: u64,
    queues: Vec<QueueSetup>,
}

impl Transport {
    /// A device without a driver.
    #[must_use]
    pub fn new(parts: TransportParts) -> Self {
        let max_sizes = parts.device.queue_sizes().to_vec();
        let mut transport = Self {
            offered: parts.device.features() | COMMON_FEATURES,
            queues: Vec::new(),
            device: Some(parts.device),
            memory: parts.memory,
            interrupt: parts.interrupt,
            notify: parts.notify,
            vmm: parts.vmm,
            max_sizes,
            status: 0,
            accepted: 0,
        };
        transport.forget_driver();
        transport
    }

    /// The threads of the device, where it is active.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerControl> {
        self.device.as_ref().map(|d| d.workers()).unwrap_or_default()
    }

    /// The device's type number.
    fn device_id(&self) -> u32 {
        self.device.as_ref().map_or(0, |d| d.kind() as u32)
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn status(&self) -> u8 {
        if self.interrupt.is_reset_needed() { self.status | NEEDS_RESET } else { self.status }
    }

    /// 32 of the offered features; there are 64 so far (§2.2).
    fn offered_features(&self, select: u32) -> u32 {
        match select {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver accepts features, which counts only before it says that it has done so.
    fn accept_features(&mut self, select: u32, bits: u32) {
        if self.status != ACKNOWLEDGE | DRIVER {
            return;
        }
        let (shift, bits) = match select {
            0 => (0, u64::from(bits)),
            1 => (32, u64::from(bits)),
            _ => return,
        };
        self.accepted = self.accepted & !(0xffff_ffff << shift) | bits << shift;
    }

    /// The queue that the driver may set up now: between accepted features and its start (§4.2.3.2).
    fn queue_mut(&mut self, select: u32) -> Option<&mut QueueSetup> {
        let open = self.status == ACKNOWLEDGE | DRIVER | FEATURES_OK;
        usize::try_from(select).ok().and_then(|i| self.queues.get_mut(i)).filter(|_| open)
    }

    fn queue(&self, select: u32) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(select).ok()?)
    }

    /// The largest size of a queue; 0 where there is none.
    fn max_size(&self, select: u32) -> u16 {
        usize::try_from(select).ok().and_then(|i| self.max_sizes.get(i)).copied().unwrap_or(0)
    }

    /// The driver notifies of a queue by a plain write, which happens only where KVM has no ioeventfd for it.
    fn notify(&self, queue: u32) {
        if let Some(event) = usize::try_from(queue).ok().and_then(|i| self.notify.get(i)) {
            let _ = event.write(1);
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(device) = &self.device {
            device.read_config(offset, data);
        }
    }

    /// The configuration is open to a driver that has been found, and not to one that gave up.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & (DRIVER | FAILED) == DRIVER
            && let Some(device) = &mut self.device
        {
            device.write_config(offset, data);
        }
    }

    /// The driver writes the status (§2.1). It may add the next bit, say that it gave up, or reset; all else is ignored.
    fn set_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        // A driver that adds a bit to what it reads writes this one back; it is not the driver's to set or to clear.
        let status = status & !(self.status() & NEEDS_RESET);
        let added = status & !self.status;
        if status & self.status != self.status || self.status & FAILED != 0 {
            return;
        }
        let next = PROGRESS.into_iter().find(|bit| self.status & bit == 0);
        match added {
            FAILED => self.status |= FAILED,
            // Not set where the features are refused: the driver reads it back (§3.1.1, step 5).
            FEATURES_OK if !self.are_features_good() => {}
            DRIVER_OK if next == Some(DRIVER_OK) => self.activate(),
            bit if next == Some(bit) => self.status |= bit,
            _ => {}
        }
    }

    fn are_features_good(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }

    /// Moves the queues into the device. The driver has set the status either way (§3.1.1, step 8); one that made a
    /// mistake finds `DEVICE_NEEDS_RESET` beside it.
    fn activate(&mut self) {
        self.status |= DRIVER_OK;
        let queues = match self.make_queues() {
            Ok(queues) => queues,
            Err(e) => return self.interrupt.needs_reset(self.name(), &e),
        };
        let Some(mut device) = self.device.take() else { return };
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        let features = self.accepted;
        // A VM that is being stopped has nobody to do it; then the device is gone, and so is its guest.
        let Some((device, result)) = self.vmm.run(move |confined| {
            let result = device.activate(Activation { memory, features, interrupt, queues, confined });
            (device, result)
        }) else {
            return;
        };
        self.device = Some(device);
        if let Err(e) = result {
            self.refuse(&e);
        }
    }

    fn refuse(&self, error: &ActivateError) {
        let by_host = matches!(error, ActivateError::Host(_) | ActivateError::Thread(_));
        if by_host && self.interrupt.may_complain() {
            let reason = std::error::Error::source(error).map(|e| format!(": {e}")).unwrap_or_default();
            log::warn!("{}: cannot start: {error}{reason}", self.name());
        }
        self.interrupt.needs_reset(self.name(), error);
    }

    fn name(&self) -> &str {
        self.device.as_ref().map_or("a device", |d| d.id())
    }

    /// The queues that are ready. Those the driver leaves out do not exist for the device.
    fn make_queues(&self) -> Result<Vec<ActiveQueue>, super::QueueError> {
        let all = self.queues.iter().zip(&self.max_sizes).zip(&self.notify).enumerate();
        all.filter(|(_, ((setup, _), _))| setup.ready)
            .map(|(index, ((setup, max_size), notify))| {
                let queue = Queue::new(self.memory.guest(), *setup, *max_size, self.accepted)?;
                Ok(ActiveQueue { index: index as u16, queue, notify: notify.clone() })
            })
            .collect()
    }

    /// At any moment, with requests under way, too: when it returns, none of them completes any more.
    fn reset(&mut self) {
        if let Some(device) = &mut self.device {
            drop(device.quiesce());
        }
        for event in &self.notify {
            // What the old driver has said is not for the new one.
            let _ = event.read();
        }
        self.interrupt.reset();
        self.forget_driver();
    }

    fn forget_driver(&mut self) {
        self.status = 0;
        self.accepted = 0;
        self.queues.clear();
        self.queues
            .extend(self.max_sizes.iter().map(|size| QueueSetup { size: *size, ..QueueSetup::default() }));
    }
}
