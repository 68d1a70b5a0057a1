//! What a network card is connected to.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use vm_memory::{Bytes, GuestMemoryMmap};

use super::super::Segment;

/// Length of the header before each frame, `struct virtio_net_hdr_v1` (§5.1.6).
pub const HEADER: usize = 12;
/// The longest frame with its header (§5.1.6.3.1).
pub const MAX_FRAME: usize = 65562;
/// An Ethernet header: no frame is shorter.
pub const MIN_FRAME: usize = HEADER + 14;

/// How sending a frame ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Done,
    /// It was taken, and its end has to wait until the backend can be written to.
    Kept,
    /// There is no room: wait until the backend can be written to.
    Wait,
}

/// The other end of a network card. Its descriptor is non-blocking and is waited for in an epoll.
pub trait Backend: AsFd + Send {
    /// The features that it brings.
    fn features(&self) -> u64;
    /// The largest packet, where it says so.
    fn mtu(&self) -> Option<u16>;
    /// Does as the driver has accepted; 0 when there is none.
    ///
    /// # Errors
    /// The host refuses.
    fn set_features(&mut self, features: u64) -> io::Result<()>;
    /// Takes part in the network, or does not: of a backend for one of several pairs of queues. While it is off, nothing
    /// is sent, received or waited for.
    ///
    /// # Errors
    /// The host refuses.
    fn switch(&mut self, _on: bool) -> io::Result<()> {
        Ok(())
    }
    /// Sends a frame, whose header comes first. At most [`MAX_FRAME`] bytes.
    ///
    /// # Errors
    /// The frame is lost; see [`is_gone`].
    fn send(&mut self, memory: &GuestMemoryMmap, frame: &[Segment]) -> io::Result<Sent>;
    /// What was left of the last frame is sent, now that the descriptor can be written to.
    ///
    /// # Errors
    /// As for [`Backend::send`].
    fn flush(&mut self) -> io::Result<Sent> {
        Ok(Sent::Done)
    }
    /// Receives a frame behind its header, and returns the length of both.
    ///
    /// # Errors
    /// `WouldBlock`: there is none. Others as for [`Backend::send`].
    fn receive(&mut self, room: &mut Room<'_>) -> io::Result<usize>;
}

/// Where a received frame goes: guest memory, and behind it memory of ours, so that nothing is cut off.
pub struct Room<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemoryMmap,
    /// The driver's buffers, of which the first `count` count.
    pub segments: &'a VecDeque<Segment>,
    /// How many of them.
    pub count: usize,
    /// What does not fit them.
    pub spill: &'a mut [u8],
}

impl Room<'_> {
    /// Copies a frame that is already in memory of ours. It fits, as `spill` alone has room for the largest.
    pub fn put(&mut self, frame: &[u8]) -> io::Result<()> {
        let header = [0; HEADER];
        scatter(self.memory, self.segments.iter().take(self.count), 0, &header)?;
        let before = self.segments.iter().take(self.count).map(|s| s.len as usize).sum::<usize>();
        let inside = frame.len().min(before.saturating_sub(HEADER));
        scatter(self.memory, self.segments.iter().take(self.count), HEADER, &frame[..inside])?;
        let rest = &frame[inside..];
        let spill = self.spill.get_mut(..rest.len()).ok_or(io::ErrorKind::InvalidInput)?;
        spill.copy_from_slice(rest);
        Ok(())
    }
}

/// Writes `data` at `offset` of these segments, as far as they reach.
///
/// # Errors
/// They lie outside of memory, which checked ones never do.
pub fn scatter<'a>(
    memory: &GuestMemoryMmap,
    segments: impl Iterator<Item = &'a Segment>,
    offset: usize,
    mut data: &[u8],
) -> io::Result<()> {
    let mut skip = offset;
    for segment in segments {
        let len = segment.len as usize;
        let skipped = skip.min(len);
        skip -= skipped;
        let (now, later) = data.split_at(data.len().min(len - skipped));
        let at = segment.address.0 + skipped as u64;
        if !now.is_empty() {
            memory.write_slice(now, vm_memory::GuestAddress(at)).map_err(io::Error::other)?;
        }
        data = later;
        if data.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Whether an error says that the other end is gone for good, and not that one frame was lost.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    let gone = [libc::EBADFD, libc::EBADF, libc::ENODEV, libc::ENXIO, libc::EPIPE, libc::ECONNRESET];
    error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error().is_some_and(|e| gone.contains(&e))
}
