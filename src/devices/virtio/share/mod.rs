//! A shared folder (virtio 1.3 §5.11): a file system whose requests are FUSE's, answered here.
//!
//! A request's names are one component each, below a folder that a descriptor holds (`inodes.rs`); a symbolic link is
//! told, and never followed. The device's thread takes requests from the queues (`worker.rs`), threads of their own do
//! them (`server.rs`), which are confined to what that takes and to this folder. docs/shares.md says why it is so.

mod attributes;
mod control;
mod counters;
mod files;
mod folder;
mod folders;
mod handles;
mod ids;
mod inodes;
mod limits;
mod names;
mod serve;
mod server;
mod session;
mod single;
#[cfg(test)]
pub(super) mod tests;
mod wire;
mod worker;

use std::sync::Arc;
use std::sync::mpsc::Sender;

use crate::config::ShareConfig;
use crate::devices::DeviceControl;
use crate::metrics::Registry;

use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, Served, VirtioDevice, Worker, WorkerControl,
    read_config_space,
};
use folder::SharedFolder;
use ids::Ids;
use server::Order;
use session::Session;
use worker::ShareWorker;

pub use counters::ShareCounters;
pub use folder::ShareError;
pub use limits::Limits;
pub use server::{Server, Threads};

/// What has no answer, and requests. A request of 1 MiB has 256 pages and some headers.
const QUEUE_SIZES: [u16; worker::QUEUES] = [128, 512];
/// Length of a tag's field.
const TAG: usize = 36;

/// A shared folder.
pub struct Share {
    id: String,
    config: ShareConfig,
    session: Arc<Session>,
    orders: Sender<Order>,
    worker: Option<Worker<ShareWorker>>,
}

impl Share {
    /// Opens the folder of `config`, of whose files the guest may hold as many as `limits` say, and counts in `metrics`.
    /// `place`: its number among shares. The second value does the requests: nothing is answered before it is started.
    ///
    /// # Errors
    /// The folder is none, or not for us.
    pub fn open(
        config: &ShareConfig,
        place: usize,
        limits: Limits,
        metrics: &Registry,
    ) -> Result<(Self, Server), ShareError> {
        let folder = SharedFolder::open(config)?;
        let id = format!("share{place}");
        let counters = ShareCounters::new(&metrics.group(&[("device", &id)]));
        let ids = Ids::new(config.uid, config.gid);
        let session = Session::new(folder, ids, limits, counters);
        let session = session.map_err(|source| ShareError::Host { path: config.path.clone(), source })?;
        let session = Arc::new(session);
        let server = Server::new(id.clone(), session.clone());
        let (config, orders) = (config.clone(), server.orders());
        Ok((Self { id, config, session, orders, worker: None }, server))
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> ShareCounters {
        self.session.counters.clone()
    }

    /// It in the list of devices.
    #[must_use]
    pub fn control(&self) -> Box<dyn DeviceControl> {
        let path = &self.config.path;
        Box::new(control::ShareControl {
            id: self.id.clone(),
            tag: self.config.tag.clone(),
            // For clients in other folders.
            path: std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            readonly: self.config.readonly,
            counters: self.counters(),
        })
    }

    /// What its thread serves, for [`VirtioDevice::activate`] and for who serves it without a thread, as a fuzzer.
    ///
    /// # Errors
    /// A queue is missing, or the host has no descriptor left.
    pub fn serving(&self, activation: Activation) -> Result<impl Served + use<>, ActivateError> {
        ShareWorker::new(&self.id, activation, self.orders.clone())
    }
}

/// A VM ends with requests under way.
impl Drop for Share {
    fn drop(&mut self) {
        drop(self.quiesce());
    }
}

impl VirtioDevice for Share {
    fn kind(&self) -> DeviceKind {
        DeviceKind::FileSystem
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// The tag, and how many queues there are for requests: the share's threads serve one side by side.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; TAG + 4];
        let tag = self.config.tag.as_bytes();
        let len = tag.len().min(TAG);
        space[..len].copy_from_slice(&tag[..len]);
        space[TAG..].copy_from_slice(&1_u32.to_le_bytes());
        read_config_space(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let confined = activation.confined;
        let worker = ShareWorker::new(&self.id, activation, self.orders.clone())?;
        self.worker = Some(Worker::start(&self.id, confined, worker)?);
        Ok(())
    }

    fn workers(&self) -> Vec<WorkerControl> {
        self.worker.iter().map(Worker::control).collect()
    }

    fn quiesce(&mut self) -> Vec<ActiveQueue> {
        self.session.set_ending(true);
        let queues = self.worker.take().and_then(Worker::stop).map(ShareWorker::into_queues);
        self.session.clear();
        self.session.set_ending(false);
        queues.unwrap_or_default()
    }
}
