//! Virtio devices (virtio 1.3), whatever bus they are found on.
//!
//! A [`VirtioDevice`] knows guest memory, its queues and an [`Interrupt`]; a [`Transport`] knows registers and the
//! driver's progress, and no device. The transport holds the queues until the driver has set them up and moves them
//! into the device; a reset takes them back.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
#[cfg(test)]
mod hostile_tests;
mod interrupt;
pub mod net;
mod pause;
#[cfg(test)]
mod pause_tests;
mod queue;
#[cfg(test)]
mod queue_tests;
pub mod rng;
pub mod share;
#[cfg(test)]
pub mod testing;
mod transport;
pub mod vsock;
mod worker;

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{Confined, Kept, SandboxError};
use crate::vm::Memory;

pub use chain::{Chain, Segment, slice};
pub use interrupt::Interrupt;
pub use pause::WorkerControl;
pub use queue::{MAX_QUEUE_SIZE, Queue, QueueError, QueueSetup};
pub use transport::{MmioTransport, NOTIFY_OFFSET, Transport, TransportParts, VmmThread, VmmThreadJobs};
pub use worker::{EACH_SIGNAL, NotStarted, Served, Worker};

/// `VIRTIO_F_INDIRECT_DESC` (§6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: nothing older is spoken here.
pub const F_VERSION_1: u64 = 1 << 32;

/// Device types (§5), with their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// File system.
    FileSystem = 26,
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The features that both sides have.
    pub features: u64,
    /// How to tell the driver of something.
    pub interrupt: Arc<Interrupt>,
    /// The queues that the driver has set up, by index.
    pub queues: Vec<ActiveQueue>,
    /// How a thread of the device is confined.
    pub confined: Confined,
}

/// A queue that the driver has set up.
pub struct ActiveQueue {
    /// Its number, as the device counts them.
    pub index: u16,
    /// The queue.
    pub queue: Queue,
    /// Signalled when the driver has made something available.
    pub notify: Arc<EventFd>,
}

impl ActiveQueue {
    /// Comes back to this queue after the other events that wait: what a device does instead of serving without end.
    pub fn serve_again(&self) {
        let _ = self.notify.write(1);
    }
}

/// A device cannot start; its driver finds it in need of a reset.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// A queue that the device cannot do without.
    #[error("queue {0} was not set up")]
    QueueMissing(u16),
    /// The host has no thread or descriptor left.
    #[error("the host refuses a resource")]
    Host(#[from] io::Error),
    /// No thread, or none that is confined.
    #[error(transparent)]
    Thread(#[from] SandboxError),
}

/// A virtio device. All methods but `activate` are called by a vCPU's thread, one at a time.
pub trait VirtioDevice: Send {
    /// Its type.
    fn kind(&self) -> DeviceKind;
    /// Its name on this host, as in logs and on the control socket.
    fn id(&self) -> &str;
    /// The features it offers beside those of every device here (version 1, indirect descriptors, event index).
    fn features(&self) -> u64;
    /// The largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// The driver reads the configuration space. `data` comes filled with zeros; what lies past the end stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver writes to the configuration space. Fields that it may not write are left alone.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Does what takes guest memory and a process that is not confined yet. Called once, before [`VirtioDevice::keep`].
    ///
    /// # Errors
    /// The host refuses; no VM then.
    fn prepare(&mut self, _memory: &Memory) -> io::Result<()> {
        Ok(())
    }
    /// Names the descriptors that it has, which are to stay open when the VM confines itself.
    fn keep(&self, _kept: &mut Kept) {}
    /// Starts serving. Called on the VMM's thread, which alone may start threads.
    ///
    /// # Errors
    /// The device cannot start. It is as it was before the call.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// The threads that serve it, which a pause of the VM stops. What touches guest memory for it in another way, as the
    /// kernel does, must have a thread here that waits for that ([`Served::drain`]).
    fn workers(&self) -> Vec<WorkerControl>;
    /// Stops serving: when this returns, nothing of what the driver had offered is touched any more. The queues come
    /// back, for a snapshot; a reset drops them. Does nothing where the device is not active.
    fn quiesce(&mut self) -> Vec<ActiveQueue>;
}

/// Finds queue `index` among those of an activation.
///
/// # Errors
/// The driver has not set it up.
pub fn take_queue(queues: &mut Vec<ActiveQueue>, index: u16) -> Result<ActiveQueue, ActivateError> {
    let at = queues.iter().position(|q| q.index == index).ok_or(ActivateError::QueueMissing(index))?;
    Ok(queues.swap_remove(at))
}

/// Copies the part of a little-endian configuration space that an access of any width at any offset covers.
pub fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (byte, value) in data.iter_mut().zip(space.iter().skip(start)) {
        *byte = *value;
    }
}
