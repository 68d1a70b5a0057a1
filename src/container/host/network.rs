//! A container's own network on the host's kernel: a name space that `pasta` connects, with the addresses of a VM's.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::mount::mount_bind;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::config::{NetConfig, Publish};
use crate::devices::virtio::net::{PasstError, start_pasta};
use crate::sys::fork::unshare;

/// This thread's own.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network name space, and what it is to be connected to.
pub struct HostNetwork {
    /// Where it is mounted: a file in the container's tmpfs, so that it ends with that.
    pub path: PathBuf,
    card: NetConfig,
    publish: Vec<Publish>,
}

impl HostNetwork {
    /// Makes it, with nothing but its loopback interface, in `work`.
    ///
    /// # Errors
    /// Not root, or a kernel without network name spaces.
    pub fn make(work: &Path, card: NetConfig, publish: Vec<Publish>) -> io::Result<Self> {
        let path = work.join("network");
        File::create(&path)?;
        let own = File::open(OWN)?;
        unshare(UnshareFlags::NEWNET)?;
        let mounted = mount_bind(OWN, &path);
        // Back, whatever became of it.
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
        mounted?;
        Ok(Self { path, card, publish })
    }

    /// Connects it. Called in the container's PID name space, with which what serves it ends.
    ///
    /// # Errors
    /// As [`start_pasta`].
    pub fn connect(&self) -> Result<(), PasstError> {
        start_pasta(&self.path, &self.publish, &self.card)
    }
}
