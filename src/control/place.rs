//! Where a VM's control socket is, and who may have it there.
//!
//! Each VM has a folder of its own in the user's run-time folder. A lock on that folder, which the kernel takes back
//! from a dead process, makes a name belong to one VM at a time; the socket of a dead VM is replaced.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, Stat, flock, fstat, mkdir, open, openat, statat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::SocketAddrUnix;
use rustix::process::geteuid;
use thiserror::Error;

use crate::config::Control;
use crate::sandbox::{Folder, Kept};
use crate::sys::socket_file::{Listen, SocketFile};

/// The socket in a VM's folder.
const SOCKET: &str = "control.sock";
/// For this user alone. As many clients as are served at once may wait besides.
const LISTEN: Listen =
    Listen { backlog: super::server::MAX_CONNECTIONS as i32, mode: Some(Mode::from_raw_mode(0o600)) };
/// Names that are made up for one process: `vm-PID`, `vm-PID-2`…
const MADE_UP_NAMES: u32 = 9;

/// The control socket cannot be where it should.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// The name is another VM's.
    #[error("--name {0}: a VM of this name runs already; see microvm ps, and stop it or choose another name")]
    NameTaken(String),
    /// A folder that cannot be made or opened.
    #[error("the folder {path} of the control socket cannot be used; --control PATH puts it elsewhere")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Somebody else could change what is in the folder.
    #[error(
        "{0} is a link, another user's, or open to others: remove it, or put the socket elsewhere with --control PATH"
    )]
    NotOurs(PathBuf),
    /// `sun_path` has 108 bytes with its NUL (unix(7)).
    #[error("the control socket's path {0} is longer than 107 bytes: give a shorter one with --control PATH")]
    TooLong(PathBuf),
    /// A living process has it.
    #[error("--control {0}: a process listens there already; give another path")]
    InUse(PathBuf),
    /// Something that is not a socket.
    #[error("--control {0} is there already and is no socket: give another path")]
    NotASocket(PathBuf),
    /// The socket.
    #[error("the control socket {path} cannot be made")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// A place for one VM's socket. It is given back when this is dropped.
pub struct Place {
    name: String,
    path: PathBuf,
    /// In its folder, which is open since before the VM was confined.
    socket: SocketFile,
    /// The folder above a folder that is the VM's own, and goes with it.
    base: Option<OwnedFd>,
}

impl Place {
    /// Claims the place that `control` names. `None`: the VM is not to be controlled.
    ///
    /// # Errors
    /// The name or the path is taken, or a folder cannot be used.
    pub fn claim(name: Option<&str>, control: &Control) -> Result<Option<Self>, PlaceError> {
        match control {
            Control::None => Ok(None),
            Control::Path(path) => Self::at_path(name, path).map(Some),
            Control::Auto => match name {
                Some(name) => Self::named(name)?.map(Some).ok_or_else(|| PlaceError::NameTaken(name.into())),
                None => Self::made_up(),
            },
        }
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts its descriptors on the list of those that stay open, and says where it removes what when it is dropped: the
    /// socket, and the folder where that is the VM's own.
    pub(super) fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        kept.add("the control socket's folder", &self.socket);
        let own = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut folders = vec![Folder::Files(own.into())];
        if let Some(base) = &self.base {
            kept.add("the folder of all control sockets", base);
            folders.extend(own.parent().map(|base| Folder::Folders(base.into())));
        }
        folders
    }

    fn made_up() -> Result<Option<Self>, PlaceError> {
        let first = default_name();
        let names = (1..=MADE_UP_NAMES).map(|n| if n == 1 { first.clone() } else { format!("{first}-{n}") });
        for name in names {
            if let Some(place) = Self::named(&name)? {
                return Ok(Some(place));
            }
        }
        Err(PlaceError::NameTaken(first))
    }

    /// The folder of `name`, made and locked. `None`: a living VM has it.
    fn named(name: &str) -> Result<Option<Self>, PlaceError> {
        let base = own_folder(&base_path())?;
        // Who forgets a dead VM has its lock as a living one would.
        lock(&base, FlockOperation::LockShared)?;
        let place = Self::in_base(base, name)?;
        if let Some(base) = place.as_ref().and_then(|place| place.base.as_ref()) {
            lock(base, FlockOperation::Unlock)?;
        }
        Ok(place)
    }

    fn in_base(base: OwnedFd, name: &str) -> Result<Option<Self>, PlaceError> {
        let path = base_path().join(name);
        let failed = |e: Errno| PlaceError::Folder { path: path.clone(), source: e.into() };
        loop {
            let folder = own_folder(&path)?;
            match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(e) => return Err(failed(e)),
            }
            // The VM that had it may have removed the folder after it was opened here.
            let ours = fstat(&folder).map_err(failed)?;
            if statat(&base, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|there| same_file(&there, &ours)) {
                let path = path.join(SOCKET);
                let socket = SocketFile::new(folder, OsStr::new(SOCKET));
                return Ok(Some(Self { name: name.into(), path, socket, base: Some(base) }));
            }
        }
    }

    /// Removes what a dead VM called `name` left: its folder, and the sockets in it that nobody listens on. Whether it is
    /// gone; that of a living one stays.
    ///
    /// # Errors
    /// The folder is not this user's, or cannot be read.
    pub fn forget(name: &str) -> Result<bool, PlaceError> {
        let path = base_path().join(name);
        if !path.exists() {
            return Ok(false);
        }
        let base = own_folder(&base_path())?;
        lock(&base, FlockOperation::LockExclusive)?;
        let Some(place) = Self::in_base(base, name)? else { return Ok(false) };
        let failed = |source| PlaceError::Folder { path: path.clone(), source };
        for entry in fs::read_dir(&path).map_err(failed)?.flatten() {
            let folder = place.socket.folder().try_clone().map_err(failed)?;
            // What is none, or has somebody who listens, keeps the folder.
            let _ = SocketFile::new(folder, &entry.file_name()).remove_dead();
        }
        // Dropping it removes the folder.
        drop(place);
        Ok(!path.exists())
    }

    fn at_path(name: Option<&str>, path: &Path) -> Result<Self, PlaceError> {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let failed = |source| PlaceError::Socket { path: path.into(), source };
        let file_name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(parent, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let socket = SocketFile::new(folder, file_name);
        // Found out now, so that a VM that cannot have its socket is not built first.
        socket.check().map_err(|e| refused(path, e))?;
        let name = name.map_or_else(default_name, str::to_string);
        Ok(Self { name, path: path.into(), socket, base: None })
    }

    /// Makes the socket, for this user alone, in place of a dead VM's.
    ///
    /// # Errors
    /// The path is too long, or taken by then.
    pub fn listen(&mut self) -> Result<OwnedFd, PlaceError> {
        let path = &self.path;
        // Clients come by the path.
        SocketAddrUnix::new(path.as_path()).map_err(|_| PlaceError::TooLong(path.clone()))?;
        Ok(self.socket.listen(LISTEN).map_err(|e| refused(path, e))?.socket)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // First, because a folder goes only when it is empty.
        self.socket.remove();
        if let Some(base) = &self.base {
            let _ = unlinkat(base, &self.name, AtFlags::REMOVEDIR);
        }
    }
}

/// Names what is wrong with the path.
fn refused(path: &Path, source: io::Error) -> PlaceError {
    match Errno::from_io_error(&source) {
        Some(Errno::EXIST) => PlaceError::InUse(path.into()),
        Some(Errno::NOTSOCK) => PlaceError::NotASocket(path.into()),
        _ => PlaceError::Socket { path: path.into(), source },
    }
}

/// The folder of this user's VMs, which need not be there.
#[must_use]
pub fn base_path() -> PathBuf {
    let uid = geteuid().as_raw();
    let from_environment = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    // The XDG base directory specification: a relative path is to be ignored. One of another user's comes with `su`.
    let usable =
        |path: &PathBuf| path.is_absolute() && fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == uid);
    let run = || Some(PathBuf::from(format!("/run/user/{uid}")));
    let base = from_environment.filter(usable).or_else(|| run().filter(usable));
    base.map_or_else(|| format!("/tmp/microvm-{uid}").into(), |base| base.join("microvm"))
}

/// The path of a VM's socket. A name with a slash in it is a path.
///
/// # Errors
/// The folder of this user's VMs is another's, who could answer in a VM's place.
pub fn socket_path(name: &str) -> Result<PathBuf, PlaceError> {
    if name.contains('/') {
        return Ok(name.into());
    }
    let base = base_path();
    if base.exists() {
        check_own(&base, &open_folder(&base)?)?;
    }
    Ok(base.join(name).join(SOCKET))
}

/// The names of VMs that have a socket, living or dead, in alphabetical order.
///
/// # Errors
/// The folder is there and cannot be read.
pub fn names() -> Result<Vec<String>, PlaceError> {
    let path = base_path();
    let mut names = folders()?;
    names.retain(|name| path.join(name).join(SOCKET).exists());
    names.sort();
    Ok(names)
}

/// The names of all folders of VMs: one that was killed as it began or ended has no socket there.
///
/// # Errors
/// As for [`names`].
pub fn folders() -> Result<Vec<String>, PlaceError> {
    let path = base_path();
    let failed = |source| PlaceError::Folder { path: path.clone(), source };
    let folder = match fs::read_dir(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    check_own(&path, &open_folder(&path)?)?;
    let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let entries = folder.flatten().filter(is_folder);
    Ok(entries.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// What a VM is called where its user does not say; a second one of a process gets a number behind it.
#[must_use]
pub fn default_name() -> String {
    format!("vm-{}", std::process::id())
}

/// Opens a folder that only this user can enter, and makes it where it is not there.
fn own_folder(path: &Path) -> Result<OwnedFd, PlaceError> {
    match mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(PlaceError::Folder { path: path.into(), source: e.into() }),
    }
    let folder = open_folder(path)?;
    check_own(path, &folder)?;
    Ok(folder)
}

/// Held by who claims a folder in it, alone by who removes one.
fn lock(base: &OwnedFd, operation: FlockOperation) -> Result<(), PlaceError> {
    let locked = retry_on_intr(|| flock(base, operation));
    locked.map_err(|e| PlaceError::Folder { path: base_path(), source: e.into() })
}

fn open_folder(path: &Path) -> Result<OwnedFd, PlaceError> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|e| match e {
        Errno::LOOP | Errno::NOTDIR => PlaceError::NotOurs(path.into()),
        e => PlaceError::Folder { path: path.into(), source: e.into() },
    })
}

fn check_own(path: &Path, folder: &OwnedFd) -> Result<(), PlaceError> {
    let stat =
        fstat(folder.as_fd()).map_err(|e| PlaceError::Folder { path: path.into(), source: e.into() })?;
    let others = Mode::from_raw_mode(stat.st_mode).intersects(Mode::RWXG | Mode::RWXO);
    if stat.st_uid != geteuid().as_raw() || others {
        return Err(PlaceError::NotOurs(path.into()));
    }
    Ok(())
}

fn same_file(a: &Stat, b: &Stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}
