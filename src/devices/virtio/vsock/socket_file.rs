//! The file of the socket that host programs connect to.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use thiserror::Error;

use crate::sys::socket_file::{self, Listen};

/// Programs that wait until the device takes them in; the kernel's own limit is often as much. Who may connect follows
/// the umask.
const LISTEN: Listen = Listen { backlog: 128, mode: None };

/// The socket of `--vsock` cannot be made.
#[derive(Debug, Error)]
pub enum HostSocketError {
    /// The folder is missing or closed.
    #[error("--vsock socket={path}: its folder cannot be opened: make it first, or choose another")]
    Folder {
        /// The socket's path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Another VM or program.
    #[error("--vsock socket={0}: another program accepts connections there: stop it, or choose another path")]
    InUse(PathBuf),
    /// A file that is not ours to delete.
    #[error("--vsock socket={0}: there is a file that is no socket: delete it, or choose another path")]
    NoSocket(PathBuf),
    /// The kernel refuses.
    #[error("--vsock socket={path}: cannot listen there")]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// The socket's file. It is removed when this is dropped, on a thread that may.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    file: socket_file::SocketFile,
}

impl SocketFile {
    /// Makes a socket at `path` that listens. That of a dead VM is replaced.
    ///
    /// # Errors
    /// Something is there, or the folder is not.
    pub(super) fn make(path: &Path) -> Result<(OwnedFd, Self), HostSocketError> {
        let failed = |source: io::Error| HostSocketError::Bind { path: path.into(), source };
        let name = path.file_name().ok_or_else(|| failed(ErrorKind::InvalidInput.into()))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(parent(path), flags, Mode::empty())
            .map_err(|e| HostSocketError::Folder { path: path.into(), source: e.into() })?;
        let mut file = socket_file::SocketFile::new(folder, name);
        let listening = file.listen(LISTEN).map_err(|e| refused(path, e))?;
        if listening.replaced {
            log::warn!("--vsock socket={}: replaced the socket that a dead VM left there", path.display());
        }
        Ok((listening.socket, Self { path: path.into(), file }))
    }

    /// The folder that it is in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        parent(&self.path)
    }
}

impl AsRawFd for SocketFile {
    /// The folder's descriptor.
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Names what is wrong with the path.
fn refused(path: &Path, source: io::Error) -> HostSocketError {
    match Errno::from_io_error(&source) {
        Some(Errno::EXIST) => HostSocketError::InUse(path.into()),
        Some(Errno::NOTSOCK) => HostSocketError::NoSocket(path.into()),
        _ => HostSocketError::Bind { path: path.into(), source },
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
