//! The store: what is in it whole, and how it gets there.
//!
//! ```text
//! images/HEX.json   an image, by the digest of its manifest: written last, so what it names is there
//! names/HEX.json    a name, by the digest of its text
//! blobs/sha256/HEX  manifests, configurations, layers as they came
//! layers/HEX.erofs  layers as file systems, by the digest of the plain archive
//! partial/HEX       blobs whose download is not at its end, by the digest they are to have
//! tmp/              what is not whole yet
//! lock              shared by who adds, exclusive for who removes
//! ```
//!
//! A file comes into its place by `rename` after `fsync`, so a name is never of a half thing, whatever is killed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::sys::data::data_folder;

use super::digest::Digest;
use super::error::ImageError;

/// The store of this user.
pub struct Store {
    path: PathBuf,
}

/// A hold on the store; it ends with the process, however that ends.
pub struct Guard {
    _lock: File,
}

impl Store {
    /// Opens the store, and makes it where there is none.
    ///
    /// # Errors
    /// There is no place for it, or it cannot be made.
    pub fn open() -> Result<Self, ImageError> {
        Self::at(data_folder().ok_or(ImageError::NoPlace)?.join("images"))
    }

    /// Opens the store in a folder, and makes it where there is none.
    ///
    /// # Errors
    /// It cannot be made, or is not this user's.
    pub fn at(path: PathBuf) -> Result<Self, ImageError> {
        let store = Self { path };
        for folder in ["", "images", "names", "blobs/sha256", "layers", "partial", "tmp"] {
            let path = store.path.join(folder);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|source| ImageError::Store { path, source })?;
        }
        let meta = fs::symlink_metadata(&store.path);
        let meta = meta.map_err(|source| ImageError::Store { path: store.path.clone(), source })?;
        // What others may write is no longer what was verified.
        if !meta.is_dir() || meta.uid() != geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            return Err(ImageError::NotOurs(store.path));
        }
        Ok(store)
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To add: others may add at the same time, and nobody removes.
    ///
    /// # Errors
    /// The lock cannot be had.
    pub fn to_add(&self) -> Result<Guard, ImageError> {
        let (lock, path) = self.lock_file()?;
        let failed = |e: Errno| ImageError::Store { path: path.clone(), source: e.into() };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // Alone here: whatever is in there is of somebody who was killed.
            self.clean()?;
        }
        flock(&lock, FlockOperation::LockShared).map_err(failed)?;
        Ok(Guard { _lock: lock })
    }

    /// To remove: waits until nobody adds. `waiting` is called first if that takes time.
    ///
    /// # Errors
    /// The lock cannot be had.
    pub fn to_remove(&self, waiting: impl FnOnce()) -> Result<Guard, ImageError> {
        let (lock, path) = self.lock_file()?;
        let failed = |e: Errno| ImageError::Store { path: path.clone(), source: e.into() };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            flock(&lock, FlockOperation::LockExclusive).map_err(failed)?;
        }
        self.clean()?;
        Ok(Guard { _lock: lock })
    }

    fn lock_file(&self) -> Result<(File, PathBuf), ImageError> {
        let path = self.path.join("lock");
        let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        Ok((open.map_err(|source| ImageError::Store { path: path.clone(), source })?, path))
    }

    fn clean(&self) -> Result<(), ImageError> {
        for path in self.files("tmp")? {
            fs::remove_file(&path).map_err(|source| ImageError::Store { path, source })?;
        }
        Ok(())
    }

    /// The files of one of the store's folders.
    pub(super) fn files(&self, folder: &str) -> Result<Vec<PathBuf>, ImageError> {
        let path = self.path.join(folder);
        let read = || fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
        let mut files = read().map_err(|source| ImageError::Store { path: path.clone(), source })?;
        files.sort();
        Ok(files)
    }

    /// Where something is by its digest.
    #[must_use]
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }

    /// Where a layer's file system is by its key.
    #[must_use]
    pub fn layer(&self, key: &Digest) -> PathBuf {
        self.path.join("layers").join(format!("{}.erofs", key.hex()))
    }

    /// Where a blob is as long as it is being downloaded, by the digest it is to have.
    #[must_use]
    pub fn partial(&self, digest: &Digest) -> PathBuf {
        self.path.join("partial").join(digest.hex())
    }

    pub(super) fn image(&self, manifest: &Digest) -> PathBuf {
        self.path.join("images").join(format!("{}.json", manifest.hex()))
    }

    pub(super) fn name(&self, name: &str) -> PathBuf {
        // A name can be longer than a file's.
        self.path.join("names").join(format!("{}.json", Digest::of(name.as_bytes()).hex()))
    }

    /// A new file that goes away unless it is kept.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn temporary(&self) -> Result<Temporary, ImageError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = self.path.join("tmp").join(name);
            let open = OpenOptions::new().create_new(true).read(true).write(true).mode(0o600).open(&path);
            match open {
                Ok(file) => return Ok(Temporary { file, path, kept: false }),
                // Of somebody who was killed, or of the same number in another container.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(ImageError::Store { path, source }),
            }
        }
    }

    /// Writes a whole file in its place.
    pub(super) fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
        let mut temporary = self.temporary()?;
        let written = temporary.file.write_all(bytes);
        written.map_err(|source| ImageError::Store { path: temporary.path.clone(), source })?;
        temporary.keep(path)
    }
}

/// Puts a file that is whole in its place, and on the disk.
///
/// # Errors
/// The disk is full or fails.
pub fn keep(file: &File, path: &Path, place: &Path) -> Result<(), ImageError> {
    let folder = place.parent().unwrap_or(Path::new("/"));
    let kept = file.sync_all().and_then(|()| fs::rename(path, place));
    let synced = kept.and_then(|()| File::open(folder)?.sync_all());
    synced.map_err(|source| ImageError::Store { path: place.into(), source })
}

/// A file that goes away unless it is kept.
pub struct Temporary {
    /// Open for reading and writing.
    pub file: File,
    path: PathBuf,
    kept: bool,
}

impl Temporary {
    /// Where it is now.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it in its place, whole and on the disk.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn keep(mut self, place: &Path) -> Result<(), ImageError> {
        keep(&self.file, &self.path, place)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_go_when_nobody_adds() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("images")).unwrap();
        std::mem::forget(store.temporary().unwrap());
        let first = store.to_add().unwrap();
        assert!(store.files("tmp").unwrap().is_empty());
        let ours = store.temporary().unwrap();
        let second = store.to_add().unwrap();
        assert!(ours.path().exists());
        drop((first, second, ours));
        store.to_remove(|| panic!("nobody is there")).unwrap();
    }

    #[test]
    fn a_folder_of_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(Store::at(dir.path().into()), Err(ImageError::NotOurs(_))));
    }
}
