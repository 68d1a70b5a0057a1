//! Something of the host's that runs beside the guest, in a thread of its own, as the control socket.

use std::any::Any;

use crate::sandbox::{Confined, Folder, Kept, SandboxError};

/// What is open before the process is confined, and starts once it is.
pub trait Service {
    /// Puts its descriptors on the list of those that stay open, and says what it goes on to need of which folders.
    fn keep(&self, kept: &mut Kept) -> Vec<Folder>;

    /// Starts its confined thread. It runs until what this returns is dropped, after the VM's end.
    ///
    /// # Errors
    /// No thread can be had, or it cannot be confined.
    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError>;
}
