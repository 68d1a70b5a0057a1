//! The guest kernels of this user: what `microvm run` boots where nobody names a kernel.
//!
//! A kernel is a folder below `kernels/` in [`data_folder`]: the file `kernel`, and `initrd` where its drivers are
//! modules. The link `default` leads to one of them. A folder is made under another name and renamed when it is whole,
//! so that several processes, and one that is killed, leave nothing half behind.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

use crate::arch::x86_64::image::{self, ImageError, SizedFile};
use crate::config::is_name;
use crate::sys::data::data_folder;

const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const DEFAULT: &str = "default";
/// What a folder is called until it is whole. No kernel's name begins so.
const UNFINISHED: &str = ".new-";

/// A kernel cannot be had or kept.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Nowhere to keep it.
    #[error("there is no place for kernels: set MICROVM_DATA or HOME to the absolute path of a folder")]
    NoFolder,
    /// Files and folders.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The file is none.
    #[error("{path}")]
    NoKernel {
        /// Which.
        path: PathBuf,
        /// What it is.
        #[source]
        source: ImageError,
    },
    /// A name that none can have.
    #[error("{0:?} is no name for a kernel: letters, digits, '.', '_' and '-', not \"default\"")]
    Name(String),
    /// It is there.
    #[error(
        "a kernel {0} is there already: remove it first (microvm kernel rm {0}), or choose another --name"
    )]
    Taken(String),
    /// It is not there.
    #[error("there is no kernel {0}: see microvm kernel ls")]
    Missing(String),
    /// None is chosen.
    #[error("no kernel is chosen: microvm kernel import FILE, or microvm kernel default NAME")]
    NoDefault,
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> KernelError {
    move |source| KernelError::File { path: path.into(), source }
}

/// A kernel that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// An initramfs with its modules, which comes before any other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// `vmlinux` (ELF) or `bzImage`.
    pub format: &'static str,
    /// Length of the kernel's file, in bytes.
    pub bytes: u64,
    /// It is booted where no other is named.
    pub default: bool,
}

/// All kernels of this user.
pub struct KernelStore {
    folder: PathBuf,
}

impl KernelStore {
    /// This user's. It need not be there yet.
    ///
    /// # Errors
    /// The user has no home.
    pub fn of_user() -> Result<Self, KernelError> {
        let data = data_folder().ok_or(KernelError::NoFolder)?;
        Ok(Self { folder: data.join("kernels") })
    }

    /// By name.
    ///
    /// # Errors
    /// The folder is there and cannot be read.
    pub fn list(&self) -> Result<Vec<Kernel>, KernelError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(file_error(&self.folder))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| is_kernel_name(name)).collect();
        names.sort();
        // One that is being removed is no kernel.
        Ok(names.iter().filter_map(|name| self.get(name).ok()).collect())
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// There is none, or its file is none.
    pub fn get(&self, name: &str) -> Result<Kernel, KernelError> {
        let folder = self.folder_of(name)?;
        let path = folder.join(KERNEL);
        let (bytes, format) = match look_at(&path) {
            Err(KernelError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(KernelError::Missing(name.into()));
            }
            seen => seen?,
        };
        let initrd = Some(folder.join(INITRD)).filter(|path| path.exists());
        let default = self.default_name().as_deref() == Some(name);
        Ok(Kernel { name: name.into(), path, initrd, format, bytes, default })
    }

    /// The one that is booted where no other is named.
    ///
    /// # Errors
    /// None is chosen.
    pub fn default(&self) -> Result<Kernel, KernelError> {
        self.get(&self.default_name().ok_or(KernelError::NoDefault)?)
    }

    /// Keeps a copy of the kernel `file`, and of `initrd` with its modules. The first one is the default.
    ///
    /// # Errors
    /// The file is no kernel, the name is taken, or it cannot be copied. Nothing is left behind then.
    pub fn import(&self, name: &str, file: &Path, initrd: Option<&Path>) -> Result<Kernel, KernelError> {
        let target = self.folder_of(name)?;
        look_at(file)?;
        if target.exists() {
            return Err(KernelError::Taken(name.into()));
        }
        fs::create_dir_all(&self.folder).map_err(file_error(&self.folder))?;
        self.remove_unfinished();
        let folder = self.folder.join(format!("{UNFINISHED}{}", std::process::id()));
        let copied = copy_all(&folder, file, initrd).and_then(|()| match fs::rename(&folder, &target) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Err(KernelError::Taken(name.into())),
            renamed => renamed.map_err(file_error(&target)),
        });
        if let Err(e) = copied {
            let _ = fs::remove_dir_all(&folder);
            return Err(e);
        }
        if self.default_name().is_none() {
            self.set_default(name)?;
        }
        self.get(name)
    }

    /// Makes it the default.
    ///
    /// # Errors
    /// It is not there, or the link cannot be made.
    pub fn set_default(&self, name: &str) -> Result<(), KernelError> {
        self.get(name)?;
        let link = self.folder.join(DEFAULT);
        // A rename replaces the old link at once; no moment is without a default.
        let new = self.folder.join(format!("{UNFINISHED}{}", std::process::id()));
        let _ = fs::remove_file(&new);
        symlink(name, &new).and_then(|()| fs::rename(&new, &link)).map_err(file_error(&link))
    }

    /// Removes it. VMs that run it go on.
    ///
    /// # Errors
    /// It is not there, or may not be removed.
    pub fn remove(&self, name: &str) -> Result<(), KernelError> {
        let kernel = self.get(name)?;
        let folder = self.folder_of(name)?;
        if kernel.default {
            let link = self.folder.join(DEFAULT);
            fs::remove_file(&link).map_err(file_error(&link))?;
        }
        // Out of sight at once, then away.
        let gone = self.folder.join(format!("{UNFINISHED}{}", std::process::id()));
        fs::rename(&folder, &gone).and_then(|()| fs::remove_dir_all(&gone)).map_err(file_error(&folder))
    }

    fn default_name(&self) -> Option<String> {
        let target = fs::read_link(self.folder.join(DEFAULT)).ok()?;
        target.to_str().filter(|name| is_kernel_name(name)).map(str::to_string)
    }

    fn folder_of(&self, name: &str) -> Result<PathBuf, KernelError> {
        if is_kernel_name(name) { Ok(self.folder.join(name)) } else { Err(KernelError::Name(name.into())) }
    }

    /// What processes left behind that were killed.
    fn remove_unfinished(&self) {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(UNFINISHED)) else { continue };
            if !Path::new("/proc").join(pid).exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

fn is_kernel_name(name: &str) -> bool {
    is_name(name) && !name.starts_with('.') && name != DEFAULT
}

/// Length and format of a kernel's file.
fn look_at(path: &Path) -> Result<(u64, &'static str), KernelError> {
    let file = File::open(path).map_err(file_error(path))?;
    let metadata = file.metadata().map_err(file_error(path))?;
    if !metadata.is_file() {
        return Err(file_error(path)(io::Error::other("not a file")));
    }
    let image = image::parse(&SizedFile { file: &file, len: metadata.len() });
    let image = image.map_err(|source| KernelError::NoKernel { path: path.into(), source })?;
    Ok((metadata.len(), if image.setup_header.is_some() { "bzImage" } else { "vmlinux" }))
}

fn copy_all(folder: &Path, kernel: &Path, initrd: Option<&Path>) -> Result<(), KernelError> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir(folder).map_err(file_error(folder))?;
    let files = [(KERNEL, Some(kernel)), (INITRD, initrd)];
    for (name, from) in files.into_iter().filter_map(|(name, from)| Some((name, from?))) {
        let to = folder.join(name);
        let copied = fs::copy(from, &to).and_then(|_| File::open(&to)?.sync_all());
        copied.map_err(file_error(from))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF kernel: a header and one segment, at its entry point.
    fn kernel(dir: &Path) -> PathBuf {
        let mut elf = vec![0; 0x1000];
        let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &[2, 0, 62, 0, 1]);
        put(24, &0x100_0000_u64.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(52, &[64, 0, 56, 0, 1]);
        put(64, &[1, 0, 0, 0, 5]);
        for (at, value) in [(8, 0x200_u64), (16, 0x100_0000), (24, 0x100_0000), (32, 0x100), (40, 0x100)] {
            put(64 + at, &value.to_le_bytes());
        }
        let path = dir.join("vmlinux");
        fs::write(&path, elf).unwrap();
        path
    }

    fn store() -> (tempfile::TempDir, KernelStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = KernelStore { folder: dir.path().join("kernels") };
        (dir, store)
    }

    fn names(store: &KernelStore) -> Vec<String> {
        store.list().unwrap().into_iter().map(|k| k.name).collect()
    }

    #[test]
    fn the_first_kernel_is_the_default_until_another_one_is() {
        let (dir, store) = store();
        assert!(matches!(store.default(), Err(KernelError::NoDefault)));
        let file = kernel(dir.path());
        assert!(store.import("one", &file, None).unwrap().default);
        let two = store.import("two", &file, Some(&file)).unwrap();
        assert!(!two.default && two.initrd.is_some());
        assert_eq!(
            (two.format, two.bytes, store.default().unwrap().name.as_str()),
            ("vmlinux", 0x1000, "one")
        );
        store.set_default("two").unwrap();
        assert_eq!(store.default().unwrap().name, "two");
        store.remove("two").unwrap();
        assert!(matches!(store.default(), Err(KernelError::NoDefault)));
        assert_eq!(names(&store), ["one"]);
        assert!(matches!(store.set_default("two"), Err(KernelError::Missing(_))));
        assert!(matches!(store.remove("two"), Err(KernelError::Missing(_))));
    }

    #[test]
    fn what_is_no_kernel_leaves_nothing_behind() {
        let (dir, store) = store();
        let text = dir.path().join("text");
        fs::write(&text, "no kernel").unwrap();
        assert!(matches!(store.import("a", &text, None), Err(KernelError::NoKernel { .. })));
        let file = kernel(dir.path());
        for bad in ["", "default", "..", ".new-1", "a/b"] {
            assert!(matches!(store.import(bad, &file, None), Err(KernelError::Name(_))), "{bad}");
        }
        let missing = dir.path().join("missing");
        assert!(matches!(store.import("a", &file, Some(&missing)), Err(KernelError::File { .. })));
        store.import("a", &file, None).unwrap();
        assert!(matches!(store.import("a", &file, None), Err(KernelError::Taken(_))));
        let mut all: Vec<_> = fs::read_dir(&store.folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        all.sort();
        assert_eq!(all, ["a", "default"]);
    }

    #[test]
    fn what_a_killed_process_left_goes_with_the_next_import() {
        let (dir, store) = store();
        let dead = store.folder.join(format!("{UNFINISHED}4194999"));
        fs::create_dir_all(&dead).unwrap();
        assert_eq!(names(&store), [""; 0]);
        store.import("a", &kernel(dir.path()), None).unwrap();
        assert!(!dead.exists());
    }
}
