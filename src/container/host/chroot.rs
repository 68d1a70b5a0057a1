//! The floor: the program in a plain chroot, with the mounts that every program expects.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use rustix::fs::{
    CWD, FileType, Mode, OFlags, ResolveFlags, makedev, mkdirat, mknodat, open, openat, openat2,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};
use rustix::process::{Gid, Uid, chdir, chroot, fchdir};
use rustix::thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::guest::ProcessSpec;
use crate::guest::status::{NOT_STARTED, of_error};
use crate::guest::users::User;
use crate::sys::fork::unshare;

use super::super::volume::Placed;
use super::NotRun;
use super::rootfs::RootFs;

/// Minor numbers of the devices of major number 1 that every program expects, and of the terminal, which is of 5.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// What is to be run, and where.
pub struct Chroot<'a> {
    pub root: &'a RootFs,
    pub process: &'a ProcessSpec,
    pub user: &'a User,
    pub hostname: &'a str,
    pub read_only: bool,
    /// `/run` is a tmpfs: the image has nothing there.
    pub run: bool,
    /// Folders and files of the host's in it, those that lie in others behind these.
    pub volumes: &'a [Placed],
    /// The control group that it enters first.
    pub entrance: Option<File>,
}

impl Chroot<'_> {
    /// Becomes the program. Returns only where that cannot be.
    pub fn become_it(&self) -> NotRun {
        if let Err(e) = self.enter() {
            let message = format!("--isolation process: the root file system cannot be entered: {e}");
            return NotRun { status: NOT_STARTED, message };
        }
        exec(self.process, self.user)
    }

    fn enter(&self) -> io::Result<()> {
        if let Some(mut entrance) = self.entrance.as_ref() {
            io::Write::write_all(&mut entrance, b"0")?;
        }
        unshare(UnshareFlags::NEWNS | UnshareFlags::NEWUTS)?;
        rustix::system::sethostname(self.hostname.as_bytes())?;
        let sources = self.root.files.iter().map(|path| Ok((*path, File::open(self.root.source_of(path))?)));
        let sources = sources.collect::<io::Result<Vec<_>>>()?;
        let volumes = self.volumes.iter().map(|volume| Ok((volume, open_volume(volume)?)));
        let volumes = volumes.collect::<io::Result<Vec<_>>>()?;
        let root = self.root.path();
        if self.read_only {
            mount_bind(&root, &root)?;
        }
        chdir(&root)?;
        chroot(".")?;
        chdir("/")?;
        // From here on a link in the image leads to a place inside.
        mount_surroundings(self.run)?;
        for (path, file) in &sources {
            mount_bind(format!("/proc/self/fd/{}", file.as_raw_fd()), *path)?;
        }
        for (volume, source) in &volumes {
            mount_volume(volume, source).map_err(|e| failed(volume, &e))?;
        }
        // Not by its path: that may lead out by way of /proc, where this process may still go.
        fchdir(make_place(&self.process.cwd, false)?)?;
        if self.read_only {
            mount_remount("/", MountFlags::BIND | MountFlags::NODEV | MountFlags::RDONLY, c"")?;
        }
        Ok(())
    }
}

/// Becomes the program of `process`, as this user, in the current folder. Returns only where that cannot be.
pub fn exec(process: &ProcessSpec, user: &User) -> NotRun {
    let e = try_exec(process, user);
    let name = process.args.first().map_or("no program", String::as_str);
    NotRun { status: of_error(&e), message: format!("{name} cannot be run: {e}") }
}

fn try_exec(process: &ProcessSpec, user: &User) -> io::Error {
    let Some((program, arguments)) = process.args.split_first() else {
        return io::ErrorKind::NotFound.into();
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("HOME", &user.home);
    command.envs(process.env.iter().filter_map(|word| word.split_once('=')));
    let groups: Vec<_> = user.groups.iter().copied().map(Gid::from_raw).collect();
    let (gid, uid) = (Gid::from_raw(user.gid), Uid::from_raw(user.uid));
    let become_user = move || {
        // As a container: nothing but the three streams is handed down.
        close_at_exec()?;
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: only system calls are made.
    unsafe { command.pre_exec(become_user) };
    command.exec()
}

fn open_volume(volume: &Placed) -> io::Result<OwnedFd> {
    let opened = open(&volume.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|e| failed(volume, &e.into()))
}

fn mount_volume(volume: &Placed, source: &OwnedFd) -> io::Result<()> {
    let place = make_place(&volume.target, volume.is_file)?;
    let place_path = own_path(&place);
    mount_bind(own_path(source), &place_path)?;
    // What is mounted there now is another file than the one that is held.
    let mounted = make_place(&volume.target, volume.is_file)?;
    let read_only = if volume.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    Ok(mount_remount(own_path(&mounted), MountFlags::BIND | MountFlags::NODEV | read_only, c"")?)
}

fn own_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Opens a folder or a file of the container's, which is made where there is none. A link in the image leads to a place
/// inside, also one that goes by way of /proc (RESOLVE_IN_ROOT in openat2(2)).
fn make_place(path: &str, is_file: bool) -> io::Result<OwnedFd> {
    let root = open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let find = |way: &Path| {
        openat2(&root, way, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    let (mut here, mut way) = (find(Path::new("."))?, PathBuf::from("."));
    let mut names = Path::new(path).components().filter(|c| *c != Component::RootDir).peekable();
    while let Some(name) = names.next() {
        way.push(name);
        here = match find(&way) {
            Err(Errno::NOENT) if is_file && names.peek().is_none() => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                drop(openat(&here, name.as_os_str(), flags, Mode::from_raw_mode(0o644))?);
                find(&way)?
            }
            Err(Errno::NOENT) => {
                mkdirat(&here, name.as_os_str(), Mode::from_raw_mode(0o755))?;
                find(&way)?
            }
            found => found?,
        };
    }
    Ok(here)
}

fn failed(volume: &Placed, e: &io::Error) -> io::Error {
    io::Error::other(format!("the volume at {}: {e}", volume.target))
}

fn mount_surroundings(run: bool) -> io::Result<()> {
    let nothing = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    let mut mounts = vec![
        ("proc", "/proc", nothing, ""),
        ("sysfs", "/sys", nothing | MountFlags::RDONLY, ""),
        ("tmpfs", "/dev", MountFlags::NOSUID, "mode=755,size=65536k"),
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "newinstance,ptmxmode=0666,mode=0620,gid=5",
        ),
        ("tmpfs", "/dev/shm", nothing, "mode=1777,size=65536k"),
        ("mqueue", "/dev/mqueue", nothing, ""),
    ];
    if run {
        mounts.push(("tmpfs", "/run", plain, "mode=755"));
    }
    for (kind, target, flags, options) in mounts {
        match fs::create_dir(target) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        mount(kind, target, kind, flags, Some(CString::new(options)?.as_c_str()))?;
    }
    for (name, major, minor) in DEVICES {
        let path = Path::new("/dev").join(name);
        mknodat(CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(major, minor))?;
        // What the mask took away.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    }
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ] {
        symlink(target, Path::new("/dev").join(name))?;
    }
    Ok(())
}

fn close_at_exec() -> io::Result<()> {
    // SAFETY: passes numbers; descriptors are marked, and none is closed before the program has taken this one's place.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
