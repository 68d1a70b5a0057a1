//! The root file system on the host: the same layers that a guest stacks, in a mount name space that ends with this process.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

use crate::guest::copy::copy_contents;
use crate::guest::users::{self, User};
use crate::sys::fork::unshare;
use crate::sys::loop_device;
use crate::sys::remove_tree::empty;

use super::super::volume::Placed;
use super::{HostError, at};

/// What is mounted over, and may be missing in an image. A guest's lowest layer has the same.
const FOLDERS: [&str; 5] = ["proc", "sys", "dev", "run", "etc"];
/// Where what is written goes, in the current folder.
const WRITABLE: &str = "w";
/// Longer databases of users are nobody's.
const MAX_DATABASE: u64 = 16 << 20;

/// A mounted root file system.
pub struct RootFs {
    /// A tmpfs, which has everything of this container.
    pub work: PathBuf,
    /// The files of the container's that are laid over the image's: each one's path in the container.
    pub files: Vec<&'static str>,
}

impl RootFs {
    /// Enters a mount name space and stacks `layers`, the lowest first, under a writable tmpfs, or what is in the file
    /// `storage`. `work` is a folder that is covered meanwhile. Each of `files` is a path below `/etc` and its text.
    ///
    /// # Errors
    /// Something cannot be mounted: what, and why.
    pub fn mount(
        work: &Path,
        layers: &[PathBuf],
        files: &[(&'static str, String)],
        storage: Option<&Path>,
    ) -> Result<Self, HostError> {
        fs::create_dir_all(work).map_err(at(work))?;
        unshare(UnshareFlags::NEWNS).map_err(HostError::Namespace)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(|e| HostError::Namespace(e.into()))?;
        mount("tmpfs", work, "tmpfs", MountFlags::NODEV, Some(c"mode=755,size=100%"))
            .map_err(|e| at(work)(e.into()))?;
        // Short names leave room for many layers: overlayfs' options must fit into a page.
        std::env::set_current_dir(work).map_err(at(work))?;
        for (index, layer) in layers.iter().enumerate() {
            mount_layer(layer, Path::new(&index.to_string())).map_err(at(layer))?;
        }
        fs::create_dir(WRITABLE).map_err(at(work))?;
        storage.map_or(Ok(()), |file| mount_storage(file).map_err(at(file)))?;
        let top = layers.len().saturating_sub(1).to_string();
        stack(layers.len(), Path::new(&top)).map_err(HostError::Overlay)?;
        std::env::set_current_dir("/").map_err(at(Path::new("/")))?;
        let root = Self { work: work.into(), files: files.iter().map(|(path, _)| *path).collect() };
        for (path, text) in files {
            root.add_file(path, text).map_err(at(Path::new(path)))?;
        }
        Ok(root)
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.work.join("root")
    }

    /// Where the text is that lies over one of the container's files.
    pub fn source_of(&self, path: &str) -> PathBuf {
        self.work.join(path.rsplit('/').next().unwrap_or(path))
    }

    /// Writes the text, and sees to it that the container has a file at its place.
    fn add_file(&self, path: &str, text: &str) -> io::Result<()> {
        fs::write(self.source_of(path), text)?;
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let folder = self.open(folder, OFlags::PATH | OFlags::DIRECTORY)?;
        match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => return Ok(()),
            // As microvm-init: a link is replaced, not followed.
            Ok(_) => unlinkat(&folder, name, AtFlags::empty())?,
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&folder, name, flags, Mode::from_raw_mode(0o644))?;
        Ok(())
    }

    /// Opens what the container has at `path`: an image's link leads to a place inside.
    fn open(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(open_inside(&File::open(self.path())?, path, flags)?)
    }

    /// Copies what the container has at a new volume's place into it, which is claimed ([`super::super::volume::claim_new`]).
    /// What is no folder there is not looked at.
    ///
    /// # Errors
    /// A file cannot be copied.
    pub fn fill(&self, volume: &Placed) -> Result<(), HostError> {
        let Ok(from) = self.open(&volume.target, OFlags::RDONLY | OFlags::DIRECTORY) else { return Ok(()) };
        let copy = || {
            let to = File::open(&volume.source)?;
            copy_contents(from.as_fd(), to.as_fd()).inspect_err(|e| {
                // The next one would take half of it for a volume that is not new. What is there already is somebody else's.
                if e.kind() != io::ErrorKind::AlreadyExists {
                    let _ = empty(to.into());
                }
            })
        };
        copy().map_err(at(&volume.source))
    }

    /// The path in the container, without links, of what it has at `path`.
    pub fn real_path(&self, path: &Path) -> Option<PathBuf> {
        let opened = self.open(path.to_str()?, OFlags::PATH).ok()?;
        let real = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).ok()?;
        Some(Path::new("/").join(real.strip_prefix(self.path()).ok()?))
    }

    /// Whether the container has anything in this folder.
    pub fn is_empty(&self, folder: &str) -> bool {
        let open = self.open(folder, OFlags::RDONLY | OFlags::DIRECTORY);
        let entries = open.and_then(|fd| Ok(rustix::fs::Dir::new(fd)?));
        entries.is_ok_and(|entries| {
            entries.flatten().all(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
        })
    }

    /// Looks a user up in the container's own databases.
    ///
    /// # Errors
    /// There is no such user or group.
    pub fn user(&self, user: &str) -> Result<User, HostError> {
        let root = File::open(self.path()).map_err(at(&self.path()))?;
        find_user(&root, user).map_err(HostError::User)
    }
}

/// Opens what there is at `path` below `root`: an image's link leads to a place inside, and none by way of /proc to any.
pub fn open_inside(root: &File, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = match path.trim_start_matches('/') {
        "" => ".",
        path => path,
    };
    openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
}

/// Looks a user up in the databases below `root`.
///
/// # Errors
/// There is no such user or group, in words.
pub fn find_user(root: &File, user: &str) -> Result<User, String> {
    users::find_in(user, |name| {
        // Without a wait for somebody at a pipe's other end.
        let opened = open_inside(root, &format!("/etc/{name}"), OFlags::RDONLY | OFlags::NONBLOCK).ok()?;
        Some(File::from(opened).take(MAX_DATABASE))
    })
}

/// Mounts the file itself (Linux 6.12), else by way of a loop device.
fn mount_layer(layer: &Path, target: &Path) -> io::Result<()> {
    fs::create_dir(target)?;
    match mount(layer, target, "erofs", MountFlags::RDONLY, None) {
        Err(Errno::NOTBLK) => {
            let (device, _open) = loop_device::attach(&File::open(layer)?, true)?;
            Ok(mount(&device, target, "erofs", MountFlags::RDONLY, None)?)
        }
        result => Ok(result?),
    }
}

/// Mounts a file with an ext4 file system for what is written.
fn mount_storage(file: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(file)?;
    let (device, _open) = loop_device::attach(&file, false)?;
    Ok(mount(&device, WRITABLE, "ext4", MountFlags::NOATIME, None)?)
}

/// Stacks layers `0` to `count - 1` of the current folder at `root`.
fn stack(count: usize, top: &Path) -> io::Result<()> {
    for folder in FOLDERS {
        fs::create_dir_all(Path::new("s").join(folder))?;
    }
    fs::create_dir("root")?;
    let [upper, work] = ["upper", "work"].map(|folder| Path::new(WRITABLE).join(folder));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    // It becomes the root folder, so it looks like the uppermost layer's.
    let like = fs::metadata(top)?;
    fs::set_permissions(&upper, Permissions::from_mode(like.mode() & 0o7777))?;
    chown(&upper, Some(like.uid()), Some(like.gid()))?;
    let lower: Vec<_> = (0..count).rev().map(|index| index.to_string()).collect();
    let options = format!("lowerdir={}:s,upperdir={WRITABLE}/upper,workdir={WRITABLE}/work", lower.join(":"));
    // A device in an image is anybody's disk: those that programs expect are in /dev, which lies over it.
    Ok(mount("overlay", "root", "overlay", MountFlags::NODEV, Some(CString::new(options)?.as_c_str()))?)
}
