//! What a driver asks of a disk (virtio 1.3 §5.2.6), read from a chain once and checked.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::{Chain, QueueError};
use super::{F_DISCARD, F_FLUSH, F_WRITE_ZEROES, MAX_RANGE_SECTORS, SECTOR};

/// Type, a reserved field, and the first sector.
pub const HEADER_LEN: u32 = 16;
/// Bytes of a name.
pub const ID_LEN: u32 = 20;
const RANGE_LEN: u32 = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const FLAG_UNMAP: u32 = 1;

/// What the driver finds at the end of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// A request that may be done: everything in it lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Bytes of the disk from `offset` into the writable part.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// The readable part behind the header, to `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// What was written is on the disk.
    Flush,
    /// The disk's name.
    GetId,
    /// A range whose content nobody needs.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A range that reads as zeros from now on.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// It may be freed.
        unmap: bool,
    },
}

impl Request {
    /// Bytes that are moved, as limits count them. Zeros are some: where the file can do no better, they are written.
    pub fn bytes(&self) -> u64 {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len.into(),
            Self::WriteZeroes { len, .. } => len,
            _ => 0,
        }
    }
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The disk's length.
    pub sectors: u64,
    /// Nothing may be written, whatever was negotiated.
    pub readonly: bool,
    /// The features that both sides have.
    pub features: u64,
}

/// Where the status goes: the last byte that the device may write.
///
/// # Errors
/// There is none.
pub fn status_address(chain: &Chain) -> Result<GuestAddress, QueueError> {
    let last = chain.writable().last().ok_or(QueueError::Shape)?;
    Ok(GuestAddress(last.address.0 + u64::from(last.len) - 1))
}

impl Limits {
    /// Reads a request. The inner error is the status of one that cannot be done.
    ///
    /// # Errors
    /// The chain has no header.
    pub fn parse(
        self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
    ) -> Result<Result<Request, Status>, QueueError> {
        let header: [u8; HEADER_LEN as usize] = chain.read_obj(memory, 0)?;
        let kind = u32_at(&header, 0);
        let sector = u64_at(&header, 8);
        let room = chain.writable_len().saturating_sub(1);
        let data = chain.readable_len() - HEADER_LEN;
        Ok(match kind {
            T_IN => self.transfer(sector, room).map(|offset| Request::Read { offset, len: room }),
            T_OUT if self.readonly => Err(Status::IoError),
            T_OUT => self.transfer(sector, data).map(|offset| Request::Write { offset, len: data }),
            // One to a disk that cannot be written has nothing to do, and does it.
            T_FLUSH if self.has(F_FLUSH) => Ok(Request::Flush),
            T_GET_ID if room < ID_LEN => Err(Status::IoError),
            T_GET_ID => Ok(Request::GetId),
            T_DISCARD if self.has(F_DISCARD) => self.discard(memory, chain)?,
            T_WRITE_ZEROES if self.has(F_WRITE_ZEROES) => self.write_zeroes(memory, chain)?,
            _ => Err(Status::Unsupported),
        })
    }

    fn has(self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// The offset of `len` bytes from `sector` that lie on the disk.
    fn transfer(self, sector: u64, len: u32) -> Result<u64, Status> {
        if u64::from(len) % SECTOR != 0 {
            return Err(Status::IoError);
        }
        self.place(sector, u64::from(len) / SECTOR)
    }

    fn place(self, sector: u64, count: u64) -> Result<u64, Status> {
        let end = sector.checked_add(count).filter(|end| *end <= self.sectors);
        // The disk's length in bytes fits, so each place on it does.
        end.map(|_| sector * SECTOR).ok_or(Status::IoError)
    }

    fn discard(self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<Result<Request, Status>, QueueError> {
        // No flag has a meaning here (§5.2.6.2).
        let range = self.range(memory, chain, 0)?;
        Ok(range.map(|(offset, len, _)| Request::Discard { offset, len }))
    }

    fn write_zeroes(
        self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
    ) -> Result<Result<Request, Status>, QueueError> {
        let range = self.range(memory, chain, FLAG_UNMAP)?;
        Ok(range.map(|(offset, len, unmap)| Request::WriteZeroes { offset, len, unmap }))
    }

    /// The one range of a request: offset, length, and whether it has a flag.
    fn range(
        self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        allowed: u32,
    ) -> Result<Result<(u64, u64, bool), Status>, QueueError> {
        // More than one is more than the configuration allows.
        if self.readonly || chain.readable_len() != HEADER_LEN + RANGE_LEN {
            return Ok(Err(Status::IoError));
        }
        let range: [u8; RANGE_LEN as usize] = chain.read_obj(memory, HEADER_LEN)?;
        let (sector, count, flags) = (u64_at(&range, 0), u32_at(&range, 8), u32_at(&range, 12));
        Ok(match (flags & !allowed, count) {
            (1.., _) => Err(Status::Unsupported),
            (0, 1..=MAX_RANGE_SECTORS) => {
                let len = u64::from(count) * SECTOR;
                self.place(sector, count.into()).map(|offset| (offset, len, flags != 0))
            }
            _ => Err(Status::IoError),
        })
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
