//! The socket device (virtio 1.3 §5.10): connections between guest sockets and Unix sockets of the host.

mod connection;
mod control;
mod counters;
mod credit;
mod host;
mod muxer;
mod packet;
mod socket_file;
#[cfg(test)]
pub(super) mod tests;
mod thread;
mod txbuf;

use std::path::Path;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::devices::DeviceControl;
use crate::metrics::Registry;
use crate::sandbox::Kept;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, Served, VirtioDevice, Worker, WorkerControl,
    read_config_space,
};

pub use counters::VsockCounters;
pub use host::HostSocket;
pub use muxer::MAX_CONNECTIONS;
pub use socket_file::{HostSocketError, SocketFile};

use control::VsockControl;
use muxer::Muxer;
use thread::VsockThread;

/// Receive, transmit and event queue (§5.10.2).
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
const NAME: &str = "vsock";
/// What the rest of a large VM has open, and some to spare.
const OTHER_DESCRIPTORS: usize = 512;

/// The socket device.
pub struct Vsock {
    cid: u32,
    host: Arc<HostSocket>,
    counters: Arc<VsockCounters>,
    worker: Option<Worker<VsockThread>>,
}

impl Vsock {
    /// A device for a guest with this CID, which host programs reach at `socket`. They are heard once the guest's
    /// driver is there. The socket's file goes when the second value is dropped, on a thread that may remove it.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(cid: u32, socket: &Path, metrics: &Registry) -> Result<(Self, SocketFile), HostSocketError> {
        let (host, file) = HostSocket::bind(socket)?;
        allow_descriptors();
        let counters = Arc::new(VsockCounters::new(metrics, NAME));
        Ok((Self { cid, host: Arc::new(host), counters, worker: None }, file))
    }

    /// What goes through it, counted on and on over resets.
    #[must_use]
    pub fn counters(&self) -> Arc<VsockCounters> {
        self.counters.clone()
    }

    /// The host's end of it.
    #[must_use]
    pub fn host(&self) -> Arc<HostSocket> {
        self.host.clone()
    }

    /// What its thread serves, for [`VirtioDevice::activate`] and for who serves it without a thread, as a fuzzer.
    ///
    /// # Errors
    /// A queue is missing, or the host has no descriptor left.
    pub fn serving(&self, activation: Activation) -> Result<impl Served + use<>, ActivateError> {
        self.thread(activation)
    }

    fn thread(&self, activation: Activation) -> Result<VsockThread, ActivateError> {
        VsockThread::new(activation, Muxer::new(self.cid, self.host.clone(), self.counters.clone()))
    }

    /// It in the list of devices.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        // For clients in other folders. It fails where there is no current folder, and then nothing better is known.
        let path = self.host.path();
        let socket = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Box::new(VsockControl { cid: self.cid, socket, counters: self.counters.clone() })
    }
}

/// Raises this process's limit to what all connections need, as far as the user may: most systems begin with 1,024.
/// Where that is not enough, what comes beyond it is refused or waits.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = (MAX_CONNECTIONS + OTHER_DESCRIPTORS) as u64;
    if limit.current.is_some_and(|current| current < wanted) {
        let current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current, ..limit }) {
            log::debug!("{NAME}: the limit of descriptors stays as it is: {e}");
        }
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

    fn keep(&self, kept: &mut Kept) {
        kept.add("the vsock's socket", self.host.listener());
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let confined = activation.confined;
        self.worker = Some(Worker::start(NAME, confined, self.thread(activation)?)?);
        Ok(())
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.worker.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        self.worker.take().and_then(Worker::stop).map(VsockThread::into_queues).unwrap_or_default()
    }
}
