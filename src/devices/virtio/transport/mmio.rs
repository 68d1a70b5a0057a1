//! virtio-mmio, version 2: registers to [`Transport`] (virtio 1.3 §4.2.2).

use crate::bus::{Action, BusDevice};

use super::{Transport, WorkerControl};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Any number will do; drivers show it.
const VENDOR: u32 = u32::from_le_bytes(*b"MVM\0");

/// The configuration space starts here.
const CONFIG: u64 = 0x100;
/// `QueueNotify`, to which KVM listens.
pub const NOTIFY_OFFSET: u64 = 0x50;

/// A device's page of registers.
pub struct MmioTransport {
    pub(super) transport: Transport,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

impl MmioTransport {
    /// Registers for a transport without a driver.
    #[must_use]
    pub fn new(transport: Transport) -> Self {
        Self { transport, device_features_select: 0, driver_features_select: 0, queue_select: 0 }
    }

    /// The threads of the device, where it is active.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerControl> {
        self.transport.workers()
    }

    fn read_register(&self, offset: u64) -> u32 {
        let t = &self.transport;
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => t.device_id(),
            0x0c => VENDOR,
            0x10 => t.offered_features(self.device_features_select),
            0x34 => t.max_size(self.queue_select).into(),
            0x44 => t.queue(self.queue_select).is_some_and(|q| q.ready).into(),
            0x60 => t.interrupt().status(),
            0x70 => t.status().into(),
            // No shared memory regions: their length reads as all ones (§4.2.2, SHMLenLow).
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => t.interrupt().generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.transport.accept_features(self.driver_features_select, value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            NOTIFY_OFFSET => self.transport.notify(value),
            0x64 => self.transport.interrupt().acknowledge(value),
            0x70 => self.set_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            (self.device_features_select, self.driver_features_select, self.queue_select) = (0, 0, 0);
        }
        // The status has 8 bits; a value with more is no status.
        if let Ok(status) = u8::try_from(value) {
            self.transport.set_status(status);
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.transport.queue_mut(self.queue_select) else { return };
        let low = |address: u64| address & !0xffff_ffff | u64::from(value);
        let high = |address: u64| address & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            // A size that does not fit 16 bits fits no queue; 0 is refused when the device starts.
            0x38 => queue.size = u16::try_from(value).unwrap_or(0),
            0x44 => queue.ready = value == 1,
            0x80 => queue.descriptors = low(queue.descriptors),
            0x84 => queue.descriptors = high(queue.descriptors),
            0x90 => queue.available = low(queue.available),
            0x94 => queue.available = high(queue.available),
            0xa0 => queue.used = low(queue.used),
            0xa4 => queue.used = high(queue.used),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.transport.read_config(offset, data);
        }
        // Registers are read and written whole (§4.2.2.2); another access finds nothing.
        if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.transport.write_config(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
        Action::None
    }
}
