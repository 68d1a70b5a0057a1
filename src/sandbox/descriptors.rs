//! The descriptors that a running VM keeps; all others, such as those that a parent leaked, are closed.

use std::os::fd::{AsRawFd, RawFd};

use crate::sys::confinement::close_all_but;

use super::{SandboxError, layer};

/// The named list of what stays open. Standard input, output and error always do.
#[derive(Debug, Default)]
pub struct Kept(Vec<(&'static str, RawFd)>);

impl Kept {
    /// Puts a descriptor on the list, under a name for the log. Its owner must live as long as the VM.
    pub fn add(&mut self, name: &'static str, descriptor: &impl AsRawFd) {
        self.0.push((name, descriptor.as_raw_fd()));
    }
}

/// Closes every descriptor that is not on the list.
pub(super) fn close_others(kept: &Kept) -> Result<(), SandboxError> {
    for (name, fd) in &kept.0 {
        log::debug!("descriptor {fd} stays open: {name}");
    }
    let listed = kept.0.iter().map(|(_, fd)| *fd);
    let all: Vec<_> =
        [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO].into_iter().chain(listed).collect();
    close_all_but(&all).map_err(layer("close the descriptors that it does not need"))
}
