//! Something of the host's that runs beside the guest, in a thread of its own, as the control socket.

use std::any::Any;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::sandbox::{Confined, Folder, Kept, SandboxError, ThreadKind};

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

/// It waits and makes a call or two.
const STACK: usize = 64 << 10;

/// Drops `leavings` at the VM's end on a thread that may remove files, and waits all the while: the threads that the guest
/// talks to must not be able to. What this returns is the end.
///
/// # Errors
/// No thread can be had, or it cannot be confined.
pub fn clean_up_at_end(
    confined: Confined,
    thread: &str,
    leavings: impl Send + 'static,
) -> Result<Box<dyn Any>, SandboxError> {
    let (end, is_end) = channel::<()>();
    let thread = confined.spawn(ThreadKind::Cleaner, thread.into(), STACK, move || {
        // Nothing is ever sent: the other side goes away.
        let _ = is_end.recv();
        drop(leavings);
    })?;
    Ok(Box::new(Waiting { end: Some(end), thread: Some(thread) }))
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
