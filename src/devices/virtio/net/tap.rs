//! A tap interface of the host's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::sys::guest_iovec::GuestIovecs;
use crate::sys::tap::{self, Queues};

use super::super::Segment;
use super::backend::{Backend, HEADER, Room, Sent};
use super::{F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MRG_RXBUF};

const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// A tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// No such interface.
    #[error(
        "--net tap={0}: there is no such interface: make it (sudo ip tuntap add {0} mode tap user $USER)"
    )]
    Missing(String),
    /// The host has no taps.
    #[error("--net tap={0}: {path} cannot be opened: load its module (sudo modprobe tun)", path = tap::DEVICE)]
    NoDevice(String, #[source] io::Error),
    /// Taps are not for everybody on this host.
    #[error("--net tap={0}: {path} may not be opened by this user: let them (sudo chmod 666 {path})", path = tap::DEVICE)]
    DevicePermission(String),
    /// Another program has it.
    #[error("--net tap={0}: it is busy: another program, or VM, uses it")]
    Busy(String),
    /// It is another user's.
    #[error(
        "--net tap={0}: this user may not use it: make it theirs (sudo ip tuntap add {0} mode tap user $USER)"
    )]
    Permission(String),
    /// Another kind of interface.
    #[error("--net tap={0}: it is no tap: make one (sudo ip tuntap add NAME mode tap user $USER)")]
    NoTap(String),
    /// Something else.
    #[error("--net tap={0}: it cannot be used")]
    Other(String, #[source] io::Error),
}

/// A tap, or one of its queues.
pub struct Tap {
    file: File,
    pieces: GuestIovecs,
}

impl Tap {
    /// Opens tap `name`, which must be there: one queue, or, where it was made for many, up to `most` of them. All but
    /// the first are off ([`Backend::switch`]).
    ///
    /// # Errors
    /// It is not there, not ours, or busy.
    pub fn open(name: &str, most: usize) -> Result<Vec<Self>, TapError> {
        if !tap::exists(name) {
            return Err(TapError::Missing(name.into()));
        }
        match Self::open_queue(name, Queues::One) {
            // What the kernel says of a tap for many queues, and of what is no tap.
            Err(TapError::NoTap(_)) => Self::open_many(name, most),
            one => Ok(vec![one?]),
        }
    }

    fn open_many(name: &str, most: usize) -> Result<Vec<Self>, TapError> {
        // The kernel lets anybody add a queue to such a tap; two VMs would take frames from each other.
        let busy = tap::is_running(name).unwrap_or(false);
        let first = Self::open_queue(name, Queues::Many)?;
        if busy {
            return Err(TapError::Busy(name.into()));
        }
        let mut queues = vec![first];
        for _ in 1..most {
            let mut queue = Self::open_queue(name, Queues::Many)?;
            queue.switch(false).map_err(|e| TapError::Other(name.into(), e))?;
            queues.push(queue);
        }
        Ok(queues)
    }

    fn open_queue(name: &str, queues: Queues) -> Result<Self, TapError> {
        let own = || name.to_string();
        let file = tap::open_device().map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => TapError::DevicePermission(own()),
            _ => TapError::NoDevice(own(), e),
        })?;
        tap::attach(&file, name, queues, HEADER as libc::c_int).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(own()),
            Some(libc::EPERM | libc::EACCES) => TapError::Permission(own()),
            Some(libc::EINVAL) => TapError::NoTap(own()),
            _ => TapError::Other(own(), e),
        })?;
        Ok(Self::over(file))
    }

    /// A card on anything that takes and gives a frame at a time behind virtio's header, without blocking.
    #[must_use]
    pub fn over(file: File) -> Self {
        Self { file, pieces: GuestIovecs::default() }
    }

    /// Whether the interface was removed. Also true of a queue that is off.
    pub(super) fn is_gone(&self) -> bool {
        let mut tap = [PollFd::new(&self.file, PollFlags::empty())];
        // Where the host cannot say, it is still there.
        poll(&mut tap, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
            .is_ok_and(|_| tap[0].revents().contains(PollFlags::ERR))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What the kernel may hand over, by what the driver takes.
fn offloads(features: u64) -> u32 {
    // Segments without a checksum need the driver to make one (§5.1.3.1).
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let mut flags = TUN_F_CSUM;
    for (feature, flag) in [(F_GUEST_TSO4, TUN_F_TSO4), (F_GUEST_TSO6, TUN_F_TSO6)] {
        if features & feature != 0 {
            flags |= flag;
        }
    }
    flags
}

impl Backend for Tap {
    fn features(&self) -> u64 {
        F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6 | F_MRG_RXBUF
    }

    fn mtu(&self) -> Option<u16> {
        None
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        tap::set_offloads(self.file.as_fd(), offloads(features))
    }

    fn switch(&mut self, on: bool) -> io::Result<()> {
        tap::use_queue(self.file.as_fd(), on)
    }

    fn send(&mut self, memory: &GuestMemoryMmap, frame: &[Segment]) -> io::Result<Sent> {
        let pieces = frame.iter().map(|s| (s.address, s.len));
        match self.pieces.write(self.file.as_fd(), &[], memory, pieces) {
            Ok(_) => Ok(Sent::Done),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Wait),
            Err(e) => Err(e),
        }
    }

    fn receive(&mut self, room: &mut Room<'_>) -> io::Result<usize> {
        let pieces = room.segments.iter().take(room.count).map(|s| (s.address, s.len));
        match self.pieces.read(self.file.as_fd(), room.memory, pieces, room.spill)? {
            // A tap has no end, but a guest must not make us ask again and again.
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => Ok(n),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_follow_what_was_accepted() {
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(F_GUEST_TSO4), 0);
        assert_eq!(offloads(F_GUEST_CSUM), TUN_F_CSUM);
        assert_eq!(offloads(F_GUEST_CSUM | F_GUEST_TSO6), TUN_F_CSUM | TUN_F_TSO6);
    }

    #[test]
    fn a_tap_that_is_not_there_is_not_made() {
        assert!(matches!(Tap::open("no-such-tap", 2), Err(TapError::Missing(_))));
    }
}
