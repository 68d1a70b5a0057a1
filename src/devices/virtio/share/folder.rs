//! The folder or file that is shared: opened, checked, and how its files are opened.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, accessat, fstat, fstatfs, open, openat};
use rustix::io::Errno;
use thiserror::Error;

use crate::config::ShareConfig;
use crate::sandbox::Kept;

use super::inodes::Inode;

/// This process's own descriptors, through which the file that a descriptor names is opened: no name is looked up, so
/// nobody can put another file in its place.
const DESCRIPTORS: &str = "/proc/self/fd";

/// `PROC_SUPER_MAGIC`, where the memory of processes is, and others by which the host's kernel is controlled: sysfs,
/// cgroup, cgroup2, debugfs, tracefs, securityfs, configfs, bpf, efivarfs (Linux, `include/uapi/linux/magic.h`).
const OF_THE_KERNEL: [u32; 10] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0xcafe_4a11,
    0xde5e_81e4,
];

/// A folder that cannot be shared. Each message names the flag and the path.
#[derive(Debug, Error)]
pub enum ShareError {
    /// It is not there, or the way to it is closed.
    #[error("--share {path}")]
    Open {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A device, a pipe, a socket.
    #[error("--share {0} is neither a folder nor a file: share one of these")]
    NeitherFolderNorFile(PathBuf),
    /// Its files are the kernel's.
    #[error("--share {0} is a folder of the host's kernel, by whose files it is controlled: share another")]
    OfTheKernel(PathBuf),
    /// Its files cannot be seen.
    #[error("--share {0} cannot be read by this user: change its mode or owner, or share another")]
    NotReadable(PathBuf),
    /// Nothing can be made in it.
    #[error("--share {0} cannot be written to by this user: make it writable, or add ,readonly")]
    NotWritable(PathBuf),
    /// Files are opened through it.
    #[error("--share needs /proc: mount it")]
    NoProc(#[source] io::Error),
    /// The host has no descriptor left.
    #[error("--share {path}: no descriptor is left: raise the limit (ulimit -n)")]
    Host {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// The shared folder.
pub struct SharedFolder {
    /// It can do nothing but name the folder, or the file.
    root: Arc<OwnedFd>,
    /// The file's name, where it is one.
    pub file: Option<CString>,
    descriptors: OwnedFd,
    /// Nothing in it can be changed by the guest.
    pub readonly: bool,
}

impl SharedFolder {
    /// Opens the folder or file of `config`. Links in the path are followed: its user chose it.
    ///
    /// # Errors
    /// It is neither, or not for us.
    pub fn open(config: &ShareConfig) -> Result<Self, ShareError> {
        let path = || config.path.clone();
        let failed = |e: Errno| ShareError::Open { path: path(), source: e.into() };
        // Without a wait for somebody at a pipe's other end.
        let root = open(&config.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let kind = FileType::from_raw_mode(fstat(&root).map_err(failed)?.st_mode);
        let file = match kind {
            FileType::Directory => None,
            FileType::RegularFile => {
                let name = config.path.file_name().and_then(|name| CString::new(name.as_bytes()).ok());
                Some(name.ok_or_else(|| ShareError::NeitherFolderNorFile(path()))?)
            }
            _ => return Err(ShareError::NeitherFolderNorFile(path())),
        };
        let system = fstatfs(&root).map_err(failed)?.f_type;
        if OF_THE_KERNEL.iter().any(|magic| i64::from(*magic) == system) {
            return Err(ShareError::OfTheKernel(path()));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = open(Path::new(DESCRIPTORS), flags, Mode::empty());
        let descriptors = descriptors.map_err(|e| ShareError::NoProc(e.into()))?;
        let own = root.as_raw_fd().to_string();
        let may = |access| accessat(&descriptors, &*own, access, AtFlags::EACCESS).is_ok();
        let look = if file.is_none() { Access::EXEC_OK } else { Access::empty() };
        if !may(Access::READ_OK | look) {
            return Err(ShareError::NotReadable(path()));
        }
        if !config.readonly && !may(Access::WRITE_OK) {
            return Err(ShareError::NotWritable(path()));
        }
        Ok(Self { root: Arc::new(root), file, descriptors, readonly: config.readonly })
    }

    /// The descriptor that names it, for the rules about it.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        self.root.clone()
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// None is left.
    pub fn root(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    /// The same from the descriptor's own name, for who may not copy one.
    pub fn again(&self) -> Result<OwnedFd, Errno> {
        openat(&self.descriptors, self.name(&*self.root), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    }

    /// Names the descriptors that stay open when the VM confines itself.
    pub fn keep(&self, kept: &mut Kept) {
        kept.add("a shared folder", &*self.root);
        kept.add("the descriptors of this process, for a shared folder", &self.descriptors);
    }

    /// Opens a file or a folder, and nothing else: what waits for somebody at its other end, or is a device, is refused.
    /// `flags` say what for.
    pub fn open_inode(&self, inode: &Inode, flags: OFlags) -> Result<File, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let opened = match inode.kind {
            FileType::RegularFile => openat(&self.descriptors, self.name(&inode.fd), flags, Mode::empty()),
            FileType::Directory => openat(&inode.fd, ".", flags | OFlags::DIRECTORY, Mode::empty()),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::ACCESS),
        };
        opened.map(File::from)
    }

    /// What an open file is, without the right to do anything with it.
    pub fn path_of(&self, file: &File) -> Result<OwnedFd, Errno> {
        openat(&self.descriptors, self.name(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    }

    /// Where calls that take a folder and a name find what `fd` names: in this folder, under this name, a link that is
    /// to be followed.
    pub fn place(&self, fd: &OwnedFd) -> (&OwnedFd, String) {
        (&self.descriptors, self.name(fd))
    }

    #[expect(clippy::unused_self, reason = "the name means nothing without the folder of descriptors")]
    fn name(&self, fd: &impl AsRawFd) -> String {
        fd.as_raw_fd().to_string()
    }
}
