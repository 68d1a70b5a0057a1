//! A descriptor chain that has been read and checked: what the guest gave the device to read and to write.

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::queue::QueueError;

/// A piece of guest memory, checked to lie in one piece of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where.
    pub address: GuestAddress,
    /// Bytes, at least 1.
    pub len: u32,
}

/// The buffers of one request. Made once and filled by each [`super::Queue::pop`], so that a busy queue does not allocate.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Index of its first descriptor, by which it is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// What the device may write.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    pub(super) fn clear(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
    }

    /// `false`: the chain would pass 2³² bytes (§2.7.4.2 forbids it).
    pub(super) fn push(&mut self, segment: Segment, writable: bool) -> bool {
        let (segments, len) = match writable {
            true => (&mut self.writable, &mut self.writable_len),
            false => (&mut self.readable, &mut self.readable_len),
        };
        let Some(sum) = len.checked_add(segment.len) else { return false };
        *len = sum;
        segments.push(segment);
        true
    }

    /// Copies a value from `offset` of the readable part, wherever descriptors divide it. Headers are copied once and
    /// then checked, so that a guest which changes them meanwhile changes nothing.
    ///
    /// # Errors
    /// The readable part ends before.
    pub fn read_obj<T: ByteValued + Default>(
        &self,
        memory: &GuestMemoryMmap,
        offset: u32,
    ) -> Result<T, QueueError> {
        let mut value = T::default();
        self.read(memory, offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// Fills `data` from `offset` of the readable part.
    ///
    /// # Errors
    /// The readable part ends before.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: u32, data: &mut [u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for segment in slice(&self.readable, offset, len_u32(data.len())?) {
            let end = done + segment.len as usize;
            memory.read_slice(&mut data[done..end], segment.address)?;
            done = end;
        }
        if done == data.len() { Ok(()) } else { Err(QueueError::Shape) }
    }

    /// Writes `data` at `offset` of the writable part.
    ///
    /// # Errors
    /// The writable part ends before.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: u32, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for segment in slice(&self.writable, offset, len_u32(data.len())?) {
            let end = done + segment.len as usize;
            memory.write_slice(&data[done..end], segment.address)?;
            done = end;
        }
        if done == data.len() { Ok(()) } else { Err(QueueError::Shape) }
    }
}

fn len_u32(len: usize) -> Result<u32, QueueError> {
    u32::try_from(len).map_err(|_| QueueError::Shape)
}

/// The part of `segments` from `offset`, `len` bytes long or as long as they are.
pub fn slice(segments: &[Segment], offset: u32, len: u32) -> impl Iterator<Item = Segment> + '_ {
    let (mut skip, mut left) = (offset, len);
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len);
        skip -= skipped;
        let taken = (segment.len - skipped).min(left);
        left -= taken;
        // The segment was checked to lie in memory, so this does not wrap.
        (taken > 0)
            .then(|| Segment { address: GuestAddress(segment.address.0 + u64::from(skipped)), len: taken })
    })
}
