//! The file of the socket device's socket goes with the VM.

use std::any::Any;

use crate::devices::virtio::vsock::SocketFile;
use crate::sandbox::{Confined, Folder, Kept, SandboxError};

use super::service::{Service, clean_up_at_end};

impl Service for SocketFile {
    fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        kept.add("the folder of the vsock's socket", self);
        // Where the guest connects to, `PATH_PORT`, lies beside it.
        vec![Folder::Files(self.folder().into()), Folder::Sockets(self.folder().into())]
    }

    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError> {
        clean_up_at_end(confined, "vsock-file", self)
    }
}
