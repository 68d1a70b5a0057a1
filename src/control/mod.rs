//! The control socket of a running VM: HTTP/1.1 with JSON on a Unix socket (docs/control.md).
//!
//! [`Place::claim`] comes before the VM is built, so that a name that is taken costs nothing and disturbs nobody.
//! [`Control::prepare`] comes behind it and before the VM is confined: it makes the socket. As a
//! [`Service`](crate::vmm::Service) of the VM it gets its one thread once the process is confined. The VM knows nothing
//! of all this; it answers a [`VmHandle`](crate::vmm::VmHandle).

mod api;
mod client;
mod connection;
mod http;
mod place;
mod server;

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::config::VmConfig;
use crate::sandbox::{Confined, Folder, Kept, SandboxError, ThreadKind};
use crate::vmm::{Service, VmHandle};

use api::{Api, VmInfo};
pub use client::{Client, ClientError, wait_for_end};
pub use place::{Place, PlaceError, base_path, default_name, folders, names, socket_path};
use server::Server;

/// JSON of the deepest allowed nesting needs some of it; the rest is never touched.
const STACK: usize = 256 << 10;

/// The control socket cannot be served.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Its place.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// No descriptor.
    #[error("the control socket cannot be served")]
    Event(#[source] io::Error),
}

/// A control socket that is there and not yet served.
pub struct Control {
    stop: Arc<OwnedFd>,
    server: Server<Api>,
    place: Place,
}

impl Control {
    /// Makes the socket at `place`, for the VM of `config`. Clients may come from now on, and wait.
    ///
    /// # Errors
    /// The socket cannot be made, or there is no descriptor left.
    pub fn prepare(mut place: Place, config: &VmConfig, vm: VmHandle) -> Result<Self, ControlError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| ControlError::Event(e.into()))?;
        let stop = Arc::new(stop);
        let info = VmInfo::new(place.name(), config);
        let server = Server::new(place.listen()?, stop.clone(), Api { vm, info });
        Ok(Self { stop, server, place })
    }
}

impl Service for Control {
    fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        kept.add("the control socket", self.server.listener());
        kept.add("the control socket's end", &*self.stop);
        self.place.keep(kept)
    }

    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError> {
        let Self { stop, server, place } = *self;
        log::info!("VM {} is controlled through {}", place.name(), place.path().display());
        let thread = confined.spawn(ThreadKind::Control, "control".into(), STACK, move || {
            // In this order, so that who comes meanwhile finds no VM instead of one that does not answer.
            let _socket_is_open = server.run();
            drop(place);
        })?;
        Ok(Box::new(Serving { stop, thread: Some(thread) }))
    }
}

/// A control socket that is served.
struct Serving {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<Option<()>>>,
}

/// Ends the thread, which is at most as long at it as the VM takes for one request, and removes the socket.
impl Drop for Serving {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It only fails where the thread panicked, which has been told.
            let _ = thread.join();
        }
    }
}
