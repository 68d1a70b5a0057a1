//! The counters of a VM in a file, written when it has ended: whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, open, openat, renameat, unlinkat};

use super::snapshot::Snapshot;

/// A file that gets its contents at the end. All that could fail for want of a right is done when it is made, before
/// the VM is confined: the folder is open, and so is a file in it of a name for the time being.
pub struct MetricsFile {
    file: File,
    place: Option<Place>,
}

/// Where the file is, and where it will be.
struct Place {
    folder: OwnedFd,
    temporary: OsString,
    name: OsString,
}

impl MetricsFile {
    /// Prepares `path`. What is there stays until [`MetricsFile::write`]. What is no ordinary file (`/dev/stdout`, a
    /// FIFO) is written to in place.
    ///
    /// # Errors
    /// The path is a folder, or may not be written to.
    pub fn create(path: &Path) -> io::Result<Self> {
        // The file that a link leads to is replaced, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(metadata) if !metadata.is_file() => {
                // Without O_NONBLOCK a FIFO would wait for its reader.
                let file = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
                Ok(Self { file, place: None })
            }
            _ => Self::beside(&path),
        }
    }

    fn beside(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = open(parent, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let temporary = temporary_name(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o666);
        // One of this name can only be a dead process's.
        let _ = unlinkat(&folder, &temporary, AtFlags::empty());
        let file = openat(&folder, &temporary, flags, mode)?.into();
        Ok(Self { file, place: Some(Place { folder, temporary, name: name.into() }) })
    }

    /// Writes the schema `microvm.metrics/1` and puts the file in its place.
    ///
    /// # Errors
    /// The disk is full, or the folder is gone. A file that was there before stays as it was.
    pub fn write(mut self, snapshot: &Snapshot) -> io::Result<()> {
        self.file.write_all((snapshot.to_json() + "\n").as_bytes())?;
        if let Some(place) = &self.place {
            renameat(&place.folder, &place.temporary, &place.folder, &place.name)?;
            self.place = None;
        }
        Ok(())
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            // The VM did not come to its end.
            let _ = unlinkat(&place.folder, &place.temporary, AtFlags::empty());
        }
    }
}

fn temporary_name(name: &OsStr) -> OsString {
    let pid = std::process::id();
    PathBuf::from(format!(".microvm-metrics-{pid}-{}", name.len())).into_os_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect()
    }

    #[test]
    fn the_old_file_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.json");
        fs::write(&path, "old").unwrap();
        let file = MetricsFile::create(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        file.write(&Snapshot::default()).unwrap();
        assert!(fs::read_to_string(&path).unwrap().starts_with("{\"schema\":\"microvm.metrics/1\""));
        assert_eq!(names(folder.path()), ["metrics.json"]);
    }

    #[test]
    fn nothing_is_left_of_one_that_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        drop(MetricsFile::create(&folder.path().join("metrics.json")).unwrap());
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_link_is_followed_and_a_device_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        MetricsFile::create(&link).unwrap().write(&Snapshot::default()).unwrap();
        assert!(fs::read_link(&link).is_ok() && fs::metadata(&target).unwrap().len() > 0);
        MetricsFile::create(Path::new("/dev/null")).unwrap().write(&Snapshot::default()).unwrap();
        assert!(MetricsFile::create(folder.path()).is_err());
        assert!(MetricsFile::create(&folder.path().join("no/file")).is_err());
    }
}
