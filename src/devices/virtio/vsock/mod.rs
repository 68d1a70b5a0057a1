//! The socket device (virtio 1.3 §5.10): connections between guest sockets and Unix sockets of the host.

mod connection;
mod credit;
mod host;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;
mod thread;
mod txbuf;

use std::path::Path;
use std::sync::Arc;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, VirtioDevice, Worker, read_config_space, take_queue,
};

pub use host::{HostSocket, HostSocketError};
pub use muxer::{MAX_CONNECTIONS, VsockCounters};

use muxer::Muxer;
use thread::{FIRST_STREAM, VsockThread};

/// Receive, transmit and event queue (§5.10.2).
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
const NAME: &str = "vsock";

/// The socket device.
pub struct Vsock {
    cid: u32,
    host: Arc<HostSocket>,
    counters: Arc<VsockCounters>,
    worker: Option<Worker<VsockThread>>,
}

impl Vsock {
    /// A device for a guest with this CID, which host programs reach at `socket`. They are heard once the guest's
    /// driver is there.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(cid: u32, socket: &Path) -> Result<Self, HostSocketError> {
        let host = Arc::new(HostSocket::bind(socket)?);
        Ok(Self { cid, host, counters: Arc::default(), worker: None })
    }

    /// What goes through it, counted on and on over resets.
    #[must_use]
    pub fn counters(&self) -> Arc<VsockCounters> {
        self.counters.clone()
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn id(&self) -> &str {
        NAME
    }

    /// Stream sockets only (§5.10.3).
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let muxer = Muxer::new(self.cid, self.host.clone(), self.counters.clone(), FIRST_STREAM);
        let queues = [0, 1, 2].map(|index| take_queue(&mut activation.queues, index));
        let thread = VsockThread::new(activation, queues, muxer, self.host.clone(), self.counters.clone())?;
        self.worker = Some(Worker::start(NAME, thread)?);
        Ok(())
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        self.worker.take().and_then(Worker::stop).map(VsockThread::into_queues).unwrap_or_default()
    }
}

impl Drop for Vsock {
    /// The thread holds the socket, too, whose file must not outlive the VM.
    fn drop(&mut self) {
        drop(self.quiesce());
    }
}
