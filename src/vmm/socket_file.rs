//! The file of the socket device's socket goes with the VM.

use std::any::Any;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::devices::virtio::vsock::SocketFile;
use crate::sandbox::{Confined, Folder, Kept, SandboxError, ThreadKind};

use super::service::Service;

/// It waits and makes one call or two.
const STACK: usize = 64 << 10;

/// A thread of its own, which waits all the while: the thread that the guest talks to must not be able to remove a file.
impl Service for SocketFile {
    fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        kept.add("the folder of the vsock's socket", self);
        // Where the guest connects to, `PATH_PORT`, lies beside it.
        vec![Folder::Files(self.folder().into()), Folder::Sockets(self.folder().into())]
    }

    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError> {
        let (end, is_end) = channel::<()>();
        let thread = confined.spawn(ThreadKind::Cleaner, "vsock-file".into(), STACK, move || {
            // Nothing is ever sent: the other side goes away.
            let _ = is_end.recv();
            drop(self);
        })?;
        Ok(Box::new(Waiting { end: Some(end), thread: Some(thread) }))
    }
}

struct Waiting {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<Option<()>>>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It only fails where the thread panicked, which has been told.
            let _ = thread.join();
        }
    }
}
