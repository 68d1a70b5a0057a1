//! The file of the socket that host programs connect to: made so that it listens from the start, and removed at the end
//! if it is still the same.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat, open, renameat_with, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use thiserror::Error;

use super::host::connect_now;

/// Programs that wait until the device takes them in; the kernel's own limit is often as much.
const BACKLOG: i32 = 128;

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
    /// The folder, open: it is the same one at the end, whatever is renamed, and needs no path walked then.
    folder: OwnedFd,
    name: OsString,
    /// Device and inode of the socket's file, by which another one at its place is told apart.
    identity: (u64, u64),
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
        let mut file = Self { path: path.into(), folder, name: name.into(), identity: (0, 0) };
        let listener = file.listen().map_err(|e| file.refused(e))?;
        Ok((listener, file))
    }

    /// The folder that it is in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        parent(&self.path)
    }

    /// The socket gets its name once it listens: to another VM that starts, one that refuses is a dead VM's.
    fn listen(&mut self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let new = format!(".{}.new", std::process::id());
        // By the folder's descriptor, so that the way to it is short whatever the path is.
        let address = format!("/proc/self/fd/{}/{new}", self.folder.as_raw_fd());
        let _ = unlinkat(&self.folder, &new, AtFlags::empty());
        bind(&socket, &SocketAddrUnix::new(address.as_str())?)?;
        let placed = listen(&socket, BACKLOG).map_err(io::Error::from).and_then(|()| self.place(&new));
        if placed.is_err() {
            let _ = unlinkat(&self.folder, &new, AtFlags::empty());
        }
        placed.map(|()| socket)
    }

    /// Moves the socket `new` to its place, and takes note of what it is.
    fn place(&mut self, new: &str) -> io::Result<()> {
        self.identity = identity(&statat(&self.folder, new, AtFlags::SYMLINK_NOFOLLOW)?);
        let rename = || renameat_with(&self.folder, new, &self.folder, &self.name, RenameFlags::NOREPLACE);
        match rename() {
            Err(Errno::EXIST) => {
                self.remove_dead()?;
                // Whoever was faster has it.
                Ok(rename()?)
            }
            other => Ok(other?),
        }
    }

    /// Removes the socket of a VM that is no more.
    fn remove_dead(&self) -> io::Result<()> {
        let there = self.there()?;
        if FileType::from_raw_mode(there.st_mode) != FileType::Socket {
            return Err(Errno::NOTSOCK.into());
        }
        match connect_now(&self.path) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
            // Accepted, or its queue is full.
            Ok(_) => return Err(Errno::EXIST.into()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(Errno::EXIST.into()),
            Err(e) => return Err(e),
        }
        if identity(&self.there()?) != identity(&there) {
            return Err(Errno::EXIST.into());
        }
        log::warn!("--vsock socket={}: replaced the socket that a dead VM left there", self.path.display());
        Ok(unlinkat(&self.folder, &self.name, AtFlags::empty())?)
    }

    fn there(&self) -> rustix::io::Result<Stat> {
        statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Names what is wrong with the path.
    fn refused(&self, source: io::Error) -> HostSocketError {
        let path = self.path.clone();
        match Errno::from_io_error(&source) {
            Some(Errno::EXIST) => HostSocketError::InUse(path),
            Some(Errno::NOTSOCK) => HostSocketError::NoSocket(path),
            _ => HostSocketError::Bind { path, source },
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nothing is left to do where this fails: who starts next sees that the VM is dead.
        if self.there().is_ok_and(|file| identity(&file) == self.identity) {
            let _ = unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }
}

impl AsRawFd for SocketFile {
    /// The folder's descriptor.
    fn as_raw_fd(&self) -> RawFd {
        self.folder.as_raw_fd()
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn identity(file: &Stat) -> (u64, u64) {
    (file.st_dev, file.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = SocketFile::make(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(matches!(SocketFile::make(&path), Err(HostSocketError::InUse(_))));
        drop((listener, file));
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(SocketFile::make(&path), Err(HostSocketError::NoSocket(_))));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something is left behind");
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let (_listener, _file) = SocketFile::make(&path).unwrap();
        let _waiting: Vec<_> = std::iter::from_fn(|| connect_now(&path).ok()).take(10_000).collect();
        assert!(matches!(SocketFile::make(&path), Err(HostSocketError::InUse(_))));
    }

    #[test]
    fn anothers_socket_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let (listener, file) = SocketFile::make(&path).unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop((listener, file));
        assert!(path.exists());
    }
}
