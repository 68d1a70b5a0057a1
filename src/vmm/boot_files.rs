//! Kernel and initramfs: from their paths into guest memory.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::arch::x86_64::image::{self, Image, ImageError, SizedFile};
use crate::arch::x86_64::layout::INITRD_MAX;
use crate::arch::x86_64::linux_boot::Initrd;
use crate::arch::x86_64::memory_map::low_end;
use crate::config::{DiskConfig, KernelConfig, Load, Size};
use crate::vm::host::has_transparent_huge_pages;
use crate::vm::{LoadError, Loaded, Memory};

/// A boot file that cannot be used. Each message names the flag and the path.
#[derive(Debug, Error)]
pub enum BootFileError {
    /// Opening failed.
    #[error("{flag} {path}")]
    Open {
        /// The flag.
        flag: &'static str,
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A directory, a device.
    #[error("{flag} {path} is not a file: give the path of one")]
    NotAFile {
        /// The flag.
        flag: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// No kernel.
    #[error("--kernel {path}")]
    Image {
        /// The path.
        path: PathBuf,
        /// What it is.
        #[source]
        source: ImageError,
    },
    /// Too little memory for it.
    #[error("{flag} {path} needs {needed} of guest memory, and --memory is {have}: give the guest more")]
    DoesNotFit {
        /// The flag.
        flag: &'static str,
        /// The path.
        path: PathBuf,
        /// At least this much.
        needed: Size,
        /// What the guest has.
        have: Size,
    },
    /// An empty initramfs.
    #[error("--initrd {0} is empty: leave the flag out, or give an initramfs")]
    EmptyInitrd(PathBuf),
    /// A disk that the guest would overwrite its kernel by.
    #[error("--disk {0} is the kernel or the initramfs: give another image, or add ,readonly")]
    IsDisk(PathBuf),
    /// Loading failed.
    #[error("{flag} {path}")]
    Load {
        /// The flag.
        flag: &'static str,
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: LoadError,
    },
}

const KERNEL: &str = "--kernel";
const INITRD: &str = "--initrd";

/// Kernel and initramfs, open and checked.
pub struct BootFiles<'a> {
    config: &'a KernelConfig,
    kernel: File,
    initrd: Option<(File, &'a Path, u64)>,
    /// What the kernel file says of itself.
    pub image: Image,
}

impl<'a> BootFiles<'a> {
    /// Opens both and reads the kernel's headers.
    ///
    /// # Errors
    /// A file is missing or is not what it should be.
    pub fn open(config: &'a KernelConfig) -> Result<Self, BootFileError> {
        let (kernel, len) = open(KERNEL, &config.path)?;
        let image = image::parse(&SizedFile { file: &kernel, len })
            .map_err(|source| BootFileError::Image { path: config.path.clone(), source })?;
        let initrd = match &config.initrd {
            None => None,
            Some(path) => match open(INITRD, path)? {
                (_, 0) => return Err(BootFileError::EmptyInitrd(path.clone())),
                (file, len) => Some((file, path.as_path(), len)),
            },
        };
        Ok(Self { config, kernel, initrd, image })
    }

    /// Whether the file of this metadata is one of them.
    pub fn contain(&self, metadata: &Metadata) -> bool {
        let id = |m: &Metadata| (m.dev(), m.ino());
        let files = [Some(&self.kernel), self.initrd.as_ref().map(|(file, ..)| file)];
        files.into_iter().flatten().any(|file| file.metadata().is_ok_and(|m| id(&m) == id(metadata)))
    }

    /// Checks that none of them is a disk that the guest writes: it is mapped into this VM's memory and into others'.
    ///
    /// # Errors
    /// One is.
    pub fn check_disks(&self, disks: &[DiskConfig]) -> Result<(), BootFileError> {
        let is_ours = |disk: &&DiskConfig| disk.path.metadata().is_ok_and(|m| self.contain(&m));
        match disks.iter().filter(|disk| !disk.readonly).find(is_ours) {
            Some(disk) => Err(BootFileError::IsDisk(disk.path.clone())),
            None => Ok(()),
        }
    }

    /// Puts both into guest memory, and says where the initramfs is.
    ///
    /// # Errors
    /// They do not fit, or a file fails.
    pub fn load(&self, memory: &Memory, size: Size) -> Result<Option<Initrd>, BootFileError> {
        let map = match self.config.load {
            Load::Map => true,
            Load::Copy => false,
            Load::Auto => !has_transparent_huge_pages(),
        };
        let low = low_end(size.0);
        if self.image.needs_memory_to > low {
            return Err(does_not_fit(KERNEL, &self.config.path, self.image.needs_memory_to, size));
        }
        for s in &self.image.segments {
            let loaded =
                memory.load(&self.kernel, s.file_offset, s.address, s.file_size, map).map_err(|source| {
                    BootFileError::Load { flag: KERNEL, path: self.config.path.clone(), source }
                })?;
            log_loaded("kernel", s.address, loaded);
        }
        let Some((file, path, len)) = &self.initrd else { return Ok(None) };
        let address = self.initrd_address(size, path, *len)?;
        let loaded = memory.load(file, 0, address, *len, map).map_err(|source| BootFileError::Load {
            flag: INITRD,
            path: path.into(),
            source,
        })?;
        log_loaded("initramfs", address, loaded);
        Ok(Some(Initrd { address, size: *len }))
    }

    /// At the end of low memory: the kernel unpacks and allocates from below.
    fn initrd_address(&self, size: Size, path: &Path, len: u64) -> Result<u64, BootFileError> {
        let end = low_end(size.0).min(INITRD_MAX);
        let address = end.checked_sub(len).map(|a| a & !0xfff).filter(|a| *a >= self.image.needs_memory_to);
        let needed = || self.image.needs_memory_to.saturating_add(len);
        address.ok_or_else(|| does_not_fit(INITRD, path, needed(), size))
    }
}

fn log_loaded(what: &str, address: u64, loaded: Loaded) {
    log::debug!("{what} at {address:#x}: {} bytes mapped, {} copied", loaded.mapped, loaded.copied);
}

fn does_not_fit(flag: &'static str, path: &Path, needed: u64, have: Size) -> BootFileError {
    let needed = Size(needed.checked_next_multiple_of(1 << 20).unwrap_or(u64::MAX));
    BootFileError::DoesNotFit { flag, path: path.into(), needed, have }
}

fn open(flag: &'static str, path: &Path) -> Result<(File, u64), BootFileError> {
    let failed = |source| BootFileError::Open { flag, path: path.into(), source };
    // Without O_NONBLOCK opening a FIFO would wait for a writer; on a file it does nothing.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(BootFileError::NotAFile { flag, path: path.into() });
    }
    Ok((file, metadata.len()))
}
