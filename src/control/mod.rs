//! The control socket of a running VM: HTTP/1.1 with JSON on a Unix socket (docs/control.md).
//!
//! [`Place::claim`] comes before the VM is built, so that a name that is taken costs nothing and disturbs nobody.
//! [`Control::start`] comes behind it and before the VM is confined: it makes the socket and the one thread. The VM
//! knows nothing of all this; it answers a [`VmHandle`](crate::vmm::VmHandle).

mod api;
mod client;
mod connection;
mod http;
mod place;
mod server;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::config::VmConfig;
use crate::vmm::VmHandle;

use api::{Api, VmInfo};
pub use client::{Client, ClientError, wait_for_end};
pub use place::{Place, PlaceError, base_path, names, socket_path};
use server::Server;

/// JSON of the deepest allowed nesting needs some of it; the rest is never touched.
const STACK: usize = 256 << 10;

/// The control socket cannot be served.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Its place.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// No descriptor or no thread.
    #[error("the control socket cannot be served")]
    Thread(#[source] io::Error),
}

/// A control socket that is served.
pub struct Control {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    place: Option<Place>,
}

impl Control {
    /// Makes the socket at `place` and serves it for the VM of `config` from now on.
    ///
    /// # Errors
    /// The socket cannot be made, or no thread can be had.
    pub fn start(mut place: Place, config: &VmConfig, vm: VmHandle) -> Result<Self, ControlError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| ControlError::Thread(e.into()))?;
        let stop = Arc::new(stop);
        let info = VmInfo::new(place.name(), config);
        let server = Server::new(place.listen()?, stop.clone(), Api { vm, info });
        let thread = thread::Builder::new().name("control".into()).stack_size(STACK);
        let thread = thread.spawn(move || server.run()).map_err(ControlError::Thread)?;
        log::info!("VM {} is controlled through {}", place.name(), place.path().display());
        Ok(Self { stop, thread: Some(thread), place: Some(place) })
    }
}

/// Ends the thread, which is at most as long at it as the VM takes for one request, and removes the socket.
impl Drop for Control {
    fn drop(&mut self) {
        // First, so that who comes now finds no VM instead of one that does not answer.
        drop(self.place.take());
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It only fails where the thread panicked, which has been told.
            let _ = thread.join();
        }
    }
}
