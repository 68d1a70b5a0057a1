//! A container's root file system: its layers, each a partition of one disk that cannot be written, under one that can.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use microvm::guest::{GuestSpec, LAYERS_DISK};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::process::{chdir, chroot};

use super::{Failed, failed, partitions};

/// Everything is put together below this folder of the initramfs, whose short names leave room for many layers: all of
/// overlayfs' options must fit into a page.
const WORK: &str = "/c";
/// The writable layer, and below it the two folders that overlayfs wants.
const WRITABLE: &str = "/c/w";
/// The lowest layer: what is mounted over, for images that lack it.
const SKELETON: &str = "s";
/// The whole.
pub const ROOT: &str = "/c/root";

/// What Linux can read a layer as.
const LAYER_TYPES: [&str; 2] = ["erofs", "squashfs"];

/// Mounts the root file system of `spec` at [`ROOT`], with what every program expects in it.
pub fn mount_all(spec: &GuestSpec) -> Result<(), Failed> {
    fs::create_dir_all(ROOT).map_err(failed(ROOT))?;
    std::env::set_current_dir(WORK).map_err(failed(WORK))?;
    let disk = disk(LAYERS_DISK)?;
    partitions::make(&disk, &spec.layers).map_err(failed("the disk of layers cannot be divided"))?;
    for index in 0..spec.layers.len() {
        mount_layer(&format!("{}{}", disk.display(), index + 1), &index.to_string())?;
    }
    make_skeleton()?;
    let lower: Vec<_> = (0..spec.layers.len()).rev().map(|index| index.to_string()).collect();
    let lowers = format!("lowerdir={}:{SKELETON}", lower.join(":"));
    if spec.read_only {
        overlay(MountFlags::RDONLY, &lowers)?;
    } else {
        mount_writable(spec.storage.as_deref(), lower.first().map_or("", String::as_str))?;
        overlay(MountFlags::empty(), &format!("{lowers},upperdir=w/upper,workdir=w/work"))?;
    }
    mount_surroundings()
}

fn make_skeleton() -> Result<(), Failed> {
    for folder in ["proc", "sys", "dev", "run", "etc"] {
        fs::create_dir_all(Path::new(SKELETON).join(folder)).map_err(failed(folder))?;
    }
    for file in FILES {
        fs::write(format!("{SKELETON}{file}"), "").map_err(failed(file))?;
    }
    Ok(())
}

fn overlay(flags: MountFlags, options: &str) -> Result<(), Failed> {
    let options = std::ffi::CString::new(options).map_err(|e| failed("the root file system")(e.into()))?;
    let mounted = mount("overlay", ROOT, "overlay", flags, Some(options.as_c_str()));
    mounted.map_err(|e| failed("the root file system (overlayfs)")(e.into()))
}

/// The device of the disk with this id, which virtio calls its serial number.
fn disk(id: &str) -> Result<PathBuf, Failed> {
    let disks = fs::read_dir("/sys/block").map_err(failed("/sys/block"))?;
    let mut names = disks.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let has_id = |name: &String| {
        fs::read_to_string(format!("/sys/block/{name}/serial")).is_ok_and(|serial| serial.trim() == id)
    };
    let name = names.find(has_id).ok_or_else(|| Failed(format!("there is no disk {id}")))?;
    Ok(Path::new("/dev").join(name))
}

fn mount_layer(device: &str, target: &str) -> Result<(), Failed> {
    fs::create_dir_all(target).map_err(failed("a layer"))?;
    let mut errors = LAYER_TYPES.iter().map(|kind| mount(device, target, *kind, MountFlags::RDONLY, None));
    // The last one's error, where none of them does.
    let mounted = errors.by_ref().find(Result::is_ok).unwrap_or(Err(rustix::io::Errno::INVAL));
    mounted.map_err(|e| failed(&format!("layer {target} (erofs or squashfs)"))(e.into()))
}

/// A tmpfs or the disk `storage`, with the two folders. The upper one becomes the root folder, so it looks like the
/// uppermost layer's.
fn mount_writable(storage: Option<&str>, top: &str) -> Result<(), Failed> {
    fs::create_dir_all(WRITABLE).map_err(failed(WRITABLE))?;
    let mounted = match storage {
        Some(id) => mount(disk(id)?, WRITABLE, "ext4", MountFlags::NOATIME, None),
        None => mount("tmpfs", WRITABLE, "tmpfs", MountFlags::empty(), Some(c"mode=755,size=100%")),
    };
    mounted.map_err(|e| failed("the writable layer")(e.into()))?;
    let upper = Path::new(WRITABLE).join("upper");
    // A disk that was used before has it.
    if !upper.exists() {
        fs::create_dir(&upper).map_err(failed("the writable layer"))?;
        let like = fs::metadata(top).map_err(failed("the uppermost layer"))?;
        let mode = fs::Permissions::from_mode(like.mode() & 0o7777);
        let made = fs::set_permissions(&upper, mode)
            .and_then(|()| chown(&upper, Some(like.uid()), Some(like.gid())));
        made.map_err(failed("the writable layer"))?;
    }
    fs::create_dir_all(Path::new(WRITABLE).join("work")).map_err(failed("the writable layer"))
}

/// What Docker mounts in every container.
fn mount_surroundings() -> Result<(), Failed> {
    let nothing = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    for (kind, target, flags, options) in [
        ("proc", "proc", nothing, None),
        ("sysfs", "sys", nothing | MountFlags::RDONLY, None),
        ("cgroup2", "sys/fs/cgroup", nothing, None),
        ("devtmpfs", "dev", MountFlags::NOSUID | MountFlags::NOEXEC, None),
        (
            "devpts",
            "dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            Some(c"newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ),
        ("tmpfs", "dev/shm", nothing, Some(c"mode=1777,size=65536k")),
        ("mqueue", "dev/mqueue", nothing, None),
        ("tmpfs", "run", plain, Some(c"mode=755")),
    ] {
        // What an image has in /run stays there.
        let target = Path::new(ROOT).join(target);
        if kind == "tmpfs"
            && target.ends_with("run")
            && fs::read_dir(&target).is_ok_and(|mut d| d.next().is_some())
        {
            continue;
        }
        // Below another mount.
        let _ = fs::create_dir(&target);
        if let Err(e) = mount(kind, &target, kind, flags, options) {
            say!("{kind} cannot be mounted: {e}");
        }
    }
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        let _ = symlink(target, Path::new(ROOT).join("dev").join(name));
    }
    // The pseudo terminals of this container, and not of the whole machine, though they are the same here.
    let ptmx = Path::new(ROOT).join("dev/ptmx");
    let _ = fs::remove_file(&ptmx).and_then(|()| symlink("pts/ptmx", &ptmx));
    Ok(())
}

/// The container's files that say who and where it is.
pub const HOSTNAME: &str = "/etc/hostname";
pub const HOSTS: &str = "/etc/hosts";
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
const FILES: [&str; 3] = [HOSTNAME, HOSTS, RESOLV_CONF];

/// A file that is to lie over one of the container's.
pub struct Overlay {
    path: &'static str,
    file: File,
}

impl Overlay {
    /// Makes the file, outside of the container, with `text` for `path`.
    pub fn new(path: &'static str, text: &str) -> Result<Self, Failed> {
        let own = Path::new(WORK).join(path.rsplit('/').next().unwrap_or(path));
        fs::write(&own, text).map_err(failed(path))?;
        Ok(Self { path, file: File::open(own).map_err(failed(path))? })
    }

    /// Where it lies.
    pub fn path(&self) -> &'static str {
        self.path
    }

    /// Mounts it over the container's own, which stays as it is. Called inside, so that a link in the image leads to a
    /// place inside.
    pub fn put(&self) -> io::Result<()> {
        if fs::symlink_metadata(self.path).is_ok_and(|m| !m.is_file()) {
            fs::remove_file(self.path)?;
        }
        if !Path::new(self.path).exists() {
            fs::write(self.path, "")?;
        }
        Ok(mount_bind(format!("/proc/self/fd/{}", self.file.as_raw_fd()), self.path)?)
    }
}

/// Makes the container's root this process's.
pub fn enter() -> Result<(), Failed> {
    let entered =
        chdir(ROOT).and_then(|()| mount_move(".", "/")).and_then(|()| chroot(".")).and_then(|()| chdir("/"));
    entered.map_err(|e| failed("the container's root")(e.into()))
}
