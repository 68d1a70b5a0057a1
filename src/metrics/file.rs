//! The counters of a VM in a file, written when it has ended.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::sys::lock::is_locked;

use super::snapshot::Snapshot;

/// A file that gets its contents at the end, through a descriptor from before the VM was confined: by then no file can
/// be made, renamed or cut off.
pub struct MetricsFile {
    file: File,
    /// To be removed again where the VM does not start.
    new: Option<PathBuf>,
}

impl MetricsFile {
    /// Opens `path`, or makes it. What is in it stays until [`MetricsFile::empty`].
    ///
    /// # Errors
    /// The path is a folder, or may not be written to.
    pub fn create(path: &Path) -> io::Result<Self> {
        // Without O_NONBLOCK a FIFO would wait for its reader.
        let options = File::options().write(true).truncate(false).custom_flags(libc::O_NONBLOCK).to_owned();
        match options.clone().create_new(true).open(path) {
            Ok(file) => Ok(Self { file, new: Some(path.into()) }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let file = options.open(path).or_else(|e| match e.kind() {
                    // A link that leads nowhere yet.
                    io::ErrorKind::NotFound => options.clone().create(true).open(path),
                    _ => Err(e),
                });
                Ok(Self { file: file?, new: None })
            }
            Err(e) => Err(e),
        }
    }

    /// Empties it, where it is an ordinary file: the VM starts now.
    ///
    /// # Errors
    /// The file system refuses, or it is a disk: those of this VM are locked by now, as those of others are.
    pub fn empty(&mut self) -> io::Result<()> {
        self.new = None;
        let kind = self.file.metadata()?.file_type();
        if (kind.is_file() || kind.is_block_device()) && is_locked(&self.file) {
            return Err(io::Error::other("it is a running VM's disk, or another program has locked it"));
        }
        if kind.is_file() { self.file.set_len(0) } else { Ok(()) }
    }

    /// Writes the schema `microvm.metrics/1`.
    ///
    /// # Errors
    /// The disk is full, or nobody reads a FIFO any more.
    pub fn write(mut self, snapshot: &Snapshot) -> io::Result<()> {
        self.file.write_all((snapshot.to_json() + "\n").as_bytes())
    }
}

impl AsRawFd for MetricsFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        if let Some(path) = &self.new {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_contents_stay_until_the_vm_starts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.json");
        fs::write(&path, "x".repeat(10_000)).unwrap();
        drop(MetricsFile::create(&path).unwrap());
        let mut file = MetricsFile::create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 10_000);
        file.empty().unwrap();
        file.write(&Snapshot::default()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"schema\":\"microvm.metrics/1\"") && text.ends_with("}\n"), "{text}");
    }

    #[test]
    fn nothing_is_left_of_a_vm_that_does_not_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.json");
        drop(MetricsFile::create(&path).unwrap());
        assert!(!path.exists());
        let mut file = MetricsFile::create(&path).unwrap();
        file.empty().unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn a_link_is_followed_and_a_device_is_not_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for _ in 0..2 {
            let mut file = MetricsFile::create(&link).unwrap();
            file.empty().unwrap();
            file.write(&Snapshot::default()).unwrap();
            assert!(fs::read_link(&link).is_ok() && fs::metadata(&target).unwrap().len() > 0);
        }
        let mut file = MetricsFile::create(Path::new("/dev/null")).unwrap();
        file.empty().unwrap();
        file.write(&Snapshot::default()).unwrap();
        assert!(MetricsFile::create(folder.path()).is_err());
        assert!(MetricsFile::create(&folder.path().join("no/file")).is_err());
    }
}
