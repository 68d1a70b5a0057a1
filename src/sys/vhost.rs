//! The kernel's own virtio network worker (Linux, `include/uapi/linux/vhost.h`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use vmm_sys_util::eventfd::EventFd;

/// Where they come from.
pub const DEVICE: &str = "/dev/vhost-net";

const GET_FEATURES: u32 = 0x8008_af00;
const SET_FEATURES: u32 = 0x4008_af00;
const SET_OWNER: u32 = 0xaf01;
const SET_MEM_TABLE: u32 = 0x4008_af03;
const SET_VRING_NUM: u32 = 0x4008_af10;
const SET_VRING_ADDR: u32 = 0x4028_af11;
const SET_VRING_BASE: u32 = 0x4008_af12;
const GET_VRING_BASE: u32 = 0xc008_af12;
const SET_VRING_KICK: u32 = 0x4008_af20;
const SET_VRING_CALL: u32 = 0x4008_af21;
const SET_VRING_ERR: u32 = 0x4008_af22;
const NET_SET_BACKEND: u32 = 0x4008_af30;

/// The kernel takes no more, whatever its parameter says.
const MAX_REGIONS: usize = 8;

/// `struct vhost_memory_region`: a piece of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Region {
    /// Its guest address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where this process has it.
    pub host: u64,
    /// 0.
    pub flags: u64,
}

/// `struct vhost_memory`.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

/// `struct vhost_vring_state` and `struct vhost_vring_file`, whose value is a descriptor.
#[repr(C)]
struct RingState {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// A ring for the kernel to serve. Addresses are this process's.
pub struct Ring<'a> {
    /// Number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// The next entry of the available ring.
    pub next: u16,
    /// What the driver signals.
    pub kick: &'a EventFd,
    /// What the kernel signals when the driver wants to hear of used buffers.
    pub call: &'a EventFd,
}

/// A kernel worker for one pair of rings: 0 receives, 1 transmits.
pub struct VhostNet(File);

impl VhostNet {
    /// Opens [`DEVICE`].
    ///
    /// # Errors
    /// It is not there, or not for us.
    pub fn open() -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_CLOEXEC).open(DEVICE).map(Self)
    }

    /// The virtio features that the kernel speaks.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0_u64;
        // SAFETY: the kernel writes a u64.
        unsafe { self.ioctl(GET_FEATURES, &raw mut features) }?;
        Ok(features)
    }

    /// Starts the kernel's thread, which reaches this process's memory. May sleep some 10 ms where the kernel moves the
    /// thread to this process's control groups.
    ///
    /// # Errors
    /// No thread is left, or it was done before.
    pub fn set_owner(&self) -> io::Result<()> {
        // SAFETY: there is no argument. What the kernel's thread reaches is bounded by `set_memory`.
        unsafe { self.ioctl(SET_OWNER, std::ptr::null_mut::<u8>()) }
    }

    /// Says where guest memory is: buffers lie there, or the kernel refuses them.
    ///
    /// # Safety
    /// The regions are mapped as long as this lives, and hold nothing that the guest may not read or write at any time.
    ///
    /// # Errors
    /// Too many regions, or the kernel refuses them.
    pub unsafe fn set_memory(&self, regions: &[Region]) -> io::Result<()> {
        let mut table = MemoryTable { count: 0, padding: 0, regions: [Region::default(); MAX_REGIONS] };
        let place = table.regions.get_mut(..regions.len()).ok_or(io::ErrorKind::InvalidInput)?;
        place.copy_from_slice(regions);
        table.count = regions.len() as u32;
        // SAFETY: the kernel reads `count` regions behind the header. The caller vouches for what they are.
        unsafe { self.ioctl(SET_MEM_TABLE, &raw mut table) }
    }

    /// What the driver has accepted, of what [`VhostNet::features`] has.
    ///
    /// # Errors
    /// The kernel does not speak one.
    pub fn set_features(&self, mut features: u64) -> io::Result<()> {
        // SAFETY: the kernel reads a u64.
        unsafe { self.ioctl(SET_FEATURES, &raw mut features) }
    }

    /// What the kernel signals when the driver breaks a ring's rules.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_error(&self, index: u32, event: &EventFd) -> io::Result<()> {
        self.set_descriptor(SET_VRING_ERR, index, event.as_raw_fd())
    }

    /// Sets ring `index` up, which must have no backend.
    ///
    /// # Safety
    /// The rings lie in guest memory, as in [`VhostNet::set_memory`], with their whole length.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub unsafe fn set_ring(&self, index: u32, ring: &Ring<'_>) -> io::Result<()> {
        self.set_state(SET_VRING_NUM, index, ring.size.into())?;
        self.set_state(SET_VRING_BASE, index, ring.next.into())?;
        let mut addresses = RingAddresses {
            index,
            flags: 0,
            descriptors: ring.descriptors,
            used: ring.used,
            available: ring.available,
            log: 0,
        };
        // SAFETY: the kernel reads a `vhost_vring_addr`. The caller vouches for the addresses.
        unsafe { self.ioctl(SET_VRING_ADDR, &raw mut addresses) }?;
        self.set_descriptor(SET_VRING_CALL, index, ring.call.as_raw_fd())?;
        self.set_descriptor(SET_VRING_KICK, index, ring.kick.as_raw_fd())
    }

    /// Serves ring `index` with a tap, or no more: when this returns, nothing of it is touched then.
    ///
    /// # Errors
    /// That is no tap, the ring was not set up, or the tap is gone.
    pub fn set_backend(&self, index: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set_descriptor(NET_SET_BACKEND, index, tap.map_or(-1, |tap| tap.as_raw_fd()))
    }

    /// The next entry of the available ring that would be served.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn next(&self, index: u32) -> io::Result<u16> {
        let mut state = RingState { index, value: 0 };
        // SAFETY: the kernel reads and writes a `vhost_vring_state`.
        unsafe { self.ioctl(GET_VRING_BASE, &raw mut state) }?;
        // Of a split ring, it has 16 bits.
        Ok(state.value as u16)
    }

    fn set_descriptor(&self, request: u32, index: u32, fd: RawFd) -> io::Result<()> {
        self.set_state(request, index, fd as u32)
    }

    fn set_state(&self, request: u32, index: u32, value: u32) -> io::Result<()> {
        let mut state = RingState { index, value };
        // SAFETY: with the requests that are passed here the kernel reads a `vhost_vring_state` or a `vhost_vring_file`,
        // which are the same eight bytes.
        unsafe { self.ioctl(request, &raw mut state) }
    }

    /// # Safety
    /// `argument` is what `request` reads and writes.
    unsafe fn ioctl<T>(&self, request: u32, argument: *mut T) -> io::Result<()> {
        // SAFETY: as the caller says.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request as libc::Ioctl, argument) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for VhostNet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of what a request reads or writes is part of its number.
    #[test]
    fn the_structures_are_as_long_as_the_requests_say() {
        let size = |request: u32| (request >> 16 & 0x3fff) as usize;
        assert_eq!(size(SET_VRING_ADDR), size_of::<RingAddresses>());
        for request in [SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_CALL, NET_SET_BACKEND] {
            assert_eq!(size(request), size_of::<RingState>());
        }
        assert_eq!((size(GET_FEATURES), size(SET_FEATURES)), (8, 8));
        // `struct vhost_memory` ends with an array without a length.
        assert_eq!(size(SET_MEM_TABLE), size_of::<MemoryTable>() - MAX_REGIONS * size_of::<Region>());
    }
}
