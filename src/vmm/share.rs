//! The threads of a shared folder run as long as the VM.

use std::any::Any;

use crate::devices::virtio::share::Server;
use crate::sandbox::{Confined, Folder, Kept, SandboxError};

use super::service::Service;

/// Started with the VM and not with the device: the thread that starts a device's worker must not be able to open a file.
impl Service for Server {
    fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        Server::keep(self, kept)
    }

    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError> {
        Ok(Box::new(Server::start(*self, confined)?))
    }
}
