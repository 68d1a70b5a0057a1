//! The port and memory buses: which device answers at which address.
//!
//! A [`Bus`] is built once and never changes while the VM runs, so looking a device up takes no lock; each device
//! has its own. A handler runs with only that lock held, and takes no other device's.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// What a device wants the VM to do after a write. Devices hold no pointer back to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: go on.
    None,
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest's kernel panicked.
    Panic,
    /// The guest ended the VM and chose this exit status.
    Exit(u8),
    /// The guest wrote this byte to the timeline's port.
    Mark(u8),
}

/// A device on a bus. `offset` counts from the start of the device's range; `offset + data.len()` never passes its end.
pub trait BusDevice: Send {
    /// The guest reads; `data` comes filled with ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action;
}

/// A device as the bus holds it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Two devices want one address.
#[derive(Debug, Error)]
#[error("the addresses {start:#x} to {end:#x} of {name} are taken or wrap around")]
pub struct Overlap {
    name: &'static str,
    start: u64,
    end: u64,
}

struct Range {
    start: u64,
    end: u64,
    device: SharedDevice,
}

/// Devices sorted by address. A read where there is none is all ones, as on real hardware; a write does nothing.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts `device` at `start..start + len`. `name` is for the error.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps one that is there.
    pub fn insert(
        &mut self,
        name: &'static str,
        start: u64,
        len: u64,
        device: SharedDevice,
    ) -> Result<(), Overlap> {
        let end = start.saturating_add(len);
        let at = self.ranges.partition_point(|r| r.start < start);
        let clash_before = at > 0 && self.ranges[at - 1].end > start;
        let clash_after = self.ranges.get(at).is_some_and(|r| r.start < end);
        if len == 0 || start.checked_add(len).is_none() || clash_before || clash_after {
            return Err(Overlap { name, start, end });
        }
        self.ranges.insert(at, Range { start, end, device });
        Ok(())
    }

    /// The guest reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(range) = self.find(address, data.len()) {
            lock(&range.device).read(address - range.start, data);
        }
    }

    /// The guest writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Action {
        match self.find(address, data.len()) {
            Some(range) => lock(&range.device).write(address - range.start, data),
            None => Action::None,
        }
    }

    /// The range that holds the whole access: one that straddles an end belongs to nobody.
    fn find(&self, address: u64, len: usize) -> Option<&Range> {
        let at = self.ranges.partition_point(|r| r.start <= address).checked_sub(1)?;
        let range = &self.ranges[at];
        let end = address.checked_add(len as u64)?;
        (end <= range.end).then_some(range)
    }
}

/// A device stays usable after a thread that held it panicked: its registers are plain values.
fn lock(device: &SharedDevice) -> std::sync::MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Probe(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Action {
            self.0.push((offset, data.to_vec()));
            Action::Mark(data[0])
        }
    }

    fn bus_with(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::default();
        for (start, len) in ranges {
            bus.insert("probe", *start, *len, Arc::new(Mutex::new(Probe(Vec::new())))).unwrap();
        }
        bus
    }

    #[test]
    fn finds_the_device_and_its_offset() {
        let bus = bus_with(&[(0x60, 5), (0x3f8, 8), (0x80, 1)]);
        let mut data = [0; 1];
        bus.read(0x3fd, &mut data);
        assert_eq!(data, [5]);
        assert_eq!(bus.write(0x80, &[7]), Action::Mark(7));
    }

    #[test]
    fn nobody_there_reads_as_ones() {
        let bus = bus_with(&[(0x60, 5)]);
        for address in [0, 0x5f, 0x65, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            assert_eq!(bus.write(address, &[1]), Action::None);
        }
    }

    #[test]
    fn an_access_over_the_end_belongs_to_nobody() {
        let bus = bus_with(&[(0x60, 5), (0x65, 5)]);
        let mut data = [0; 2];
        bus.read(0x64, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = bus_with(&[(0x60, 5)]);
        for (start, len) in [(0x60, 5), (0x5f, 2), (0x64, 1), (0x50, 0x100), (0x70, 0), (u64::MAX, 2)] {
            let device = Arc::new(Mutex::new(Probe(Vec::new())));
            assert!(bus.insert("probe", start, len, device).is_err(), "{start:#x}+{len}");
        }
    }
}
