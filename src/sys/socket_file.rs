//! The file of a Unix socket: made so that it listens from the start, never in a living one's place, and removed at the
//! end if it is still the same.

use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags, Stat, fchmod, renameat_with, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// A socket's place in a folder. What was put there is removed when this is dropped, on a thread that may.
#[derive(Debug)]
pub struct SocketFile {
    /// The folder, open: it is the same one at the end, whatever is renamed, and needs no path walked then.
    folder: OwnedFd,
    name: OsString,
    /// Device and inode of the socket's file, by which another one at its place is told apart.
    identity: Option<(u64, u64)>,
}

/// How a socket is to listen.
#[derive(Clone, Copy, Debug)]
pub struct Listen {
    /// Programs that wait until they are taken in.
    pub backlog: i32,
    /// Who may connect; `None`: whom the umask lets.
    pub mode: Option<Mode>,
}

/// A socket that listens at its place.
#[derive(Debug)]
pub struct Listening {
    /// The socket.
    pub socket: OwnedFd,
    /// A dead process had left one there, which was replaced.
    pub replaced: bool,
}

impl SocketFile {
    /// The place `name` in `folder`, where nothing is changed so far.
    #[must_use]
    pub fn new(folder: OwnedFd, name: &OsStr) -> Self {
        Self { folder, name: name.into(), identity: None }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &OwnedFd {
        &self.folder
    }

    /// Whether a socket can be put there: nothing is there, or a dead process's socket.
    ///
    /// # Errors
    /// `EEXIST`: a living process has it. `ENOTSOCK`: it is no socket.
    pub fn check(&self) -> io::Result<()> {
        self.dead().map(drop)
    }

    /// Puts a socket there, which gets its name once it listens: to others, one that refuses them is a dead process's.
    ///
    /// # Errors
    /// As for [`SocketFile::check`], and the kernel's.
    pub fn listen(&mut self, how: Listen) -> io::Result<Listening> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        if let Some(mode) = how.mode {
            // Linux makes the file with the mode of the socket, so at no moment is it open to others.
            fchmod(&socket, mode)?;
        }
        let new = OsString::from(format!(".{}.new", std::process::id()));
        let _ = unlinkat(&self.folder, &new, AtFlags::empty());
        bind(&socket, &self.address(&new)?)?;
        let placed = listen(&socket, how.backlog).map_err(io::Error::from).and_then(|()| self.place(&new));
        if placed.is_err() {
            let _ = unlinkat(&self.folder, &new, AtFlags::empty());
        }
        placed.map(|replaced| Listening { socket, replaced })
    }

    /// Removes it, if it is there and still the same.
    pub fn remove(&mut self) {
        let Some(ours) = self.identity.take() else { return };
        // Nothing is left to do where this fails: who starts next sees that the process is dead.
        if self.there().is_ok_and(|file| identity(&file) == ours) {
            let _ = unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }

    /// Moves the socket `new` to its place, and takes note of what it is. Whether a dead one was there.
    fn place(&mut self, new: &OsStr) -> io::Result<bool> {
        let ours = identity(&statat(&self.folder, new, AtFlags::SYMLINK_NOFOLLOW)?);
        let rename = || renameat_with(&self.folder, new, &self.folder, &self.name, RenameFlags::NOREPLACE);
        let replaced = match rename() {
            Err(Errno::EXIST) => {
                self.remove_dead()?;
                // Whoever was faster has it.
                rename()?;
                true
            }
            other => other.map(|()| false)?,
        };
        self.identity = Some(ours);
        Ok(replaced)
    }

    /// Removes a dead process's socket, if one is there.
    ///
    /// # Errors
    /// As for [`SocketFile::check`].
    pub fn remove_dead(&self) -> io::Result<()> {
        let Some(dead) = self.dead()? else { return Ok(()) };
        if identity(&self.there()?) != dead {
            return Err(Errno::EXIST.into());
        }
        Ok(unlinkat(&self.folder, &self.name, AtFlags::empty())?)
    }

    /// The dead process's socket that is there.
    fn dead(&self) -> io::Result<Option<(u64, u64)>> {
        let there = match self.there() {
            Err(Errno::NOENT) => return Ok(None),
            other => other?,
        };
        if FileType::from_raw_mode(there.st_mode) != FileType::Socket {
            return Err(Errno::NOTSOCK.into());
        }
        match connect_to(&self.address(&self.name)?) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(Some(identity(&there))),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            // Accepted, or its queue is full, or it is another user's: what cannot be asked counts as alive.
            _ => Err(Errno::EXIST.into()),
        }
    }

    fn there(&self) -> rustix::io::Result<Stat> {
        statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// By the folder's descriptor, so that the way is short whatever the path is, and leads to this folder.
    fn address(&self, name: &OsStr) -> io::Result<SocketAddrUnix> {
        let folder = format!("/proc/self/fd/{}", self.folder.as_raw_fd());
        Ok(SocketAddrUnix::new(Path::new(&folder).join(name))?)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

impl AsRawFd for SocketFile {
    /// The folder's descriptor.
    fn as_raw_fd(&self) -> RawFd {
        self.folder.as_raw_fd()
    }
}

/// Connects without waiting, by the one kind of socket that the sandbox allows.
///
/// # Errors
/// Nobody listens there, or its queue is full.
pub fn connect_now(path: &Path) -> io::Result<OwnedFd> {
    connect_to(&SocketAddrUnix::new(path)?)
}

fn connect_to(address: &SocketAddrUnix) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, address)?;
    Ok(socket)
}

fn identity(file: &Stat) -> (u64, u64) {
    (file.st_dev, file.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::fs::{OFlags, open};

    use super::*;

    const HOW: Listen = Listen { backlog: 1, mode: None };

    fn at(folder: &Path) -> SocketFile {
        let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        SocketFile::new(folder, OsStr::new("v"))
    }

    fn errno(error: &io::Error) -> Option<Errno> {
        Errno::from_io_error(error)
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        drop(UnixListener::bind(&path).unwrap());
        let mut file = at(dir.path());
        file.check().unwrap();
        let listening = file.listen(HOW).unwrap();
        assert!(listening.replaced);
        UnixStream::connect(&path).unwrap();
        assert_eq!(errno(&at(dir.path()).check().unwrap_err()), Some(Errno::EXIST));
        assert_eq!(errno(&at(dir.path()).listen(HOW).unwrap_err()), Some(Errno::EXIST));
        drop((listening, file));
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        assert_eq!(errno(&at(dir.path()).check().unwrap_err()), Some(Errno::NOTSOCK));
        assert_eq!(errno(&at(dir.path()).listen(HOW).unwrap_err()), Some(Errno::NOTSOCK));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something is left behind");
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = at(dir.path());
        let _listening = file.listen(HOW).unwrap();
        let path = dir.path().join("v");
        let _waiting: Vec<_> = std::iter::from_fn(|| connect_now(&path).ok()).take(10_000).collect();
        assert_eq!(errno(&at(dir.path()).listen(HOW).unwrap_err()), Some(Errno::EXIST));
    }

    #[test]
    fn anothers_socket_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let mut file = at(dir.path());
        let listening = file.listen(HOW).unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop((listening, file));
        assert!(path.exists());
    }

    #[test]
    fn a_link_is_no_socket() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        drop(UnixListener::bind(&target).unwrap());
        std::os::unix::fs::symlink(&target, dir.path().join("v")).unwrap();
        assert_eq!(errno(&at(dir.path()).listen(HOW).unwrap_err()), Some(Errno::NOTSOCK));
        assert!(target.exists());
    }
}
