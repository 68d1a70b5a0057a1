//! Folders and files of the host in a container, as `--volume` has them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;
use thiserror::Error;

use crate::config::{ShareConfig, is_name};
use crate::guest::MountSpec;
use crate::sys::data::data_folder;

use super::ContainerError;

/// In a container's folder: its volumes without a name, by their numbers.
pub const FOLDER: &str = "volumes";

/// A folder or a file of the host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    source: Source,
    /// An absolute path in the container.
    target: String,
    read_only: bool,
    /// Who owns in the container what is this user's; root where nobody says.
    uid: Option<u32>,
    gid: Option<u32>,
}

/// Where its files are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// A folder or a file of the host's.
    Path(String),
    /// A folder that is kept for this user.
    Named(String),
    /// A folder that goes with the container.
    Anonymous,
}

/// A `--volume` that cannot be read.
#[derive(Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no volume: write HOST:CONTAINER[:ro][,uid=N][,gid=N] with an absolute path in the container, and on the \
     host a path with a slash in it or a name; or CONTAINER alone"
)]
pub struct ParseVolumeError(String);

impl FromStr for Volume {
    type Err = ParseVolumeError;

    fn from_str(text: &str) -> Result<Self, ParseVolumeError> {
        let bad = || ParseVolumeError(text.into());
        let mut parts = text.splitn(3, ':');
        let (source, target) = match (parts.next().unwrap_or_default(), parts.next()) {
            (target, None) => (Source::Anonymous, target),
            (path, Some(target)) if path.contains('/') || path == "." => (Source::Path(path.into()), target),
            (name, Some(target)) if is_name(name) => (Source::Named(name.into()), target),
            _ => return Err(bad()),
        };
        // Over the root itself nothing can lie.
        if !target.starts_with('/') || Path::new(target).components().nth(1).is_none() {
            return Err(bad());
        }
        let mut volume = Self { source, target: target.into(), read_only: false, uid: None, gid: None };
        for option in parts.next().iter().flat_map(|options| options.split(',')) {
            match option.split_once('=') {
                None if option == "ro" => volume.read_only = true,
                None if option == "rw" => volume.read_only = false,
                Some(("uid", number)) => volume.uid = Some(number.parse().map_err(|_| bad())?),
                Some(("gid", number)) => volume.gid = Some(number.parse().map_err(|_| bad())?),
                _ => return Err(bad()),
            }
        }
        Ok(volume)
    }
}

/// A volume as it is on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its folder or file.
    pub source: PathBuf,
    /// An absolute path in the container.
    pub target: String,
    /// Nothing in it can be changed.
    pub read_only: bool,
    /// It is one file.
    pub is_file: bool,
    /// It is new: it gets what the image has at its place.
    pub fill: bool,
}

impl Volume {
    /// Makes its folder in that of its container, if it has no name, as the one of this number.
    ///
    /// # Errors
    /// The disk fails.
    pub fn make(&self, number: usize, container: &Path) -> Result<(), ContainerError> {
        if self.source != Source::Anonymous {
            return Ok(());
        }
        let path = anonymous(number, container);
        fs::create_dir_all(&path).map_err(|source| ContainerError::Store { path, source })
    }

    /// Finds it, as the one of this number of the container with that folder. One with a name is made where it is not there;
    /// one without need not be there yet.
    ///
    /// # Errors
    /// There is no such file or folder on the host.
    pub fn place(&self, number: usize, container: &Path) -> Result<Placed, ContainerError> {
        let (target, read_only) = (self.target.clone(), self.read_only);
        let source = match &self.source {
            Source::Path(text) => {
                let path = Path::new(text);
                let failed = |source| ContainerError::Volume { path: path.into(), source };
                std::path::absolute(path).map_err(failed)?
            }
            Source::Named(name) => named(name)?,
            Source::Anonymous => {
                let source = anonymous(number, container);
                return Ok(Placed { source, target, read_only, is_file: false, fill: true });
            }
        };
        let failed = |e| ContainerError::Volume { path: source.clone(), source: e };
        let kind = fs::metadata(&source).map_err(failed)?;
        if !kind.is_dir() && !kind.is_file() {
            return Err(failed(io::Error::other("it is neither a folder nor a file")));
        }
        let is_named = matches!(self.source, Source::Named(_));
        let fill = is_named && !read_only && is_empty(&source).map_err(failed)?;
        Ok(Placed { target, read_only, is_file: kind.is_file(), fill, source })
    }

    /// It as a VM has it, by what [`Volume::place`] has found.
    #[must_use]
    pub fn share(&self, number: usize, placed: Placed) -> (ShareConfig, MountSpec) {
        let tag = format!("volume{number}");
        let name = placed.source.file_name().map(|name| name.to_string_lossy().into_owned());
        let mount = MountSpec {
            tag: tag.clone(),
            path: placed.target,
            read_only: placed.read_only,
            file: name.filter(|_| placed.is_file),
            fill: placed.fill,
        };
        let share = ShareConfig {
            readonly: self.read_only,
            uid: self.uid.unwrap_or(0),
            gid: self.gid.unwrap_or(0),
            ..ShareConfig::new(placed.source, tag)
        };
        (share, mount)
    }

    /// Its place in the container.
    #[must_use]
    pub fn target(&self) -> &str {
        self.target.trim_end_matches('/')
    }

    /// Whether it goes with its container.
    #[must_use]
    pub fn is_anonymous(&self) -> bool {
        self.source == Source::Anonymous
    }

    /// Whether it says who owns its files in the container.
    #[must_use]
    pub fn has_owner(&self) -> bool {
        self.uid.or(self.gid).is_some()
    }
}

/// Locks new volumes for the container that fills them, as long as what is returned lives: whoever else has found one new, or asks
/// whether it is, waits for that.
///
/// # Errors
/// One cannot be opened.
pub fn claim_new(volumes: &mut [Placed]) -> Result<Vec<File>, ContainerError> {
    let mut new: Vec<_> = volumes.iter_mut().filter(|volume| volume.fill).collect();
    // In one order for all, so that no two wait for each other.
    new.sort_by(|a, b| a.source.cmp(&b.source));
    let mut locks = Vec::new();
    let mut last = None;
    for volume in new {
        // One that the container has twice is filled from its first place.
        volume.fill = last != Some(&volume.source);
        if volume.fill {
            locks.extend(
                claim(volume)
                    .map_err(|source| ContainerError::Volume { path: volume.source.clone(), source })?,
            );
        }
        last = Some(&volume.source);
    }
    Ok(locks)
}

/// `None`: it is not there yet, as it goes with its container, or it is not new any more.
fn claim(volume: &mut Placed) -> io::Result<Option<File>> {
    let lock = match File::open(&volume.source) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))?;
    volume.fill = fs::read_dir(&volume.source)?.next().is_none();
    Ok(Some(lock).filter(|_| volume.fill))
}

fn named(name: &str) -> Result<PathBuf, ContainerError> {
    let path = data_folder().ok_or(ContainerError::NoPlace)?.join(FOLDER).join(name);
    fs::create_dir_all(&path).map_err(|source| ContainerError::Store { path: path.clone(), source })?;
    Ok(path)
}

/// Whether nothing is in a folder, once nobody fills it any more ([`claim_new`]).
fn is_empty(folder: &Path) -> io::Result<bool> {
    let lock = File::open(folder)?;
    retry_on_intr(|| flock(&lock, FlockOperation::LockShared))?;
    Ok(fs::read_dir(folder)?.next().is_none())
}

fn anonymous(number: usize, container: &Path) -> PathBuf {
    container.join(FOLDER).join(number.to_string())
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = if self.read_only { "ro" } else { "rw" };
        match &self.source {
            Source::Path(source) | Source::Named(source) => write!(f, "{source}:{}:{mode}", self.target)?,
            Source::Anonymous => write!(f, "{}", self.target)?,
        }
        if self.has_owner() {
            write!(f, ",uid={},gid={}", self.uid.unwrap_or(0), self.gid.unwrap_or(0))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_volume_is_filled_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let placed = |name: &str, fill| {
            let (source, target) = (dir.path().join(name), format!("/{name}"));
            Placed { source, target, read_only: false, is_file: false, fill }
        };
        for name in ["a", "b", "old"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("old/file"), "").unwrap();
        // `old` was filled since it was looked at; `own` is made later.
        let mut volumes =
            ["b", "a", "b", "old", "own", "kept"].map(|name| placed(name, name != "kept")).to_vec();
        let locks = claim_new(&mut volumes).unwrap();
        let filled: Vec<_> = volumes.iter().map(|volume| volume.fill).collect();
        assert_eq!((locks.len(), filled), (2, vec![true, true, false, false, true, false]));
        let is_free = |name: &str| {
            flock(File::open(dir.path().join(name)).unwrap(), FlockOperation::NonBlockingLockShared).is_ok()
        };
        assert_eq!(["a", "b", "old"].map(is_free), [false, false, true]);
        drop(locks);
        assert!(is_free("a") && is_free("b"));
    }

    #[test]
    fn volumes_are_read() {
        let volume: Volume = "./src:/src:ro".parse().unwrap();
        assert!(volume.read_only && volume.source == Source::Path("./src".into()) && volume.target == "/src");
        let volume: Volume = "data:/var/lib:uid=5,gid=6".parse().unwrap();
        assert_eq!(
            (volume.uid, volume.gid, volume.to_string().as_str()),
            (Some(5), Some(6), "data:/var/lib:rw,uid=5,gid=6")
        );
        let volume: Volume = "/cache".parse().unwrap();
        assert_eq!((&volume.source, volume.to_string().as_str()), (&Source::Anonymous, "/cache"));
        for wrong in ["a", "/a:b", ":/b", "a b:/c", "/a:/b:x", "/a:/b:uid=x", "/a:/b:ro:ro", "", "/", "/a://"]
        {
            assert!(wrong.parse::<Volume>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_path_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let place = |path: &Path| {
            let volume: Volume = format!("{}:/x:ro", path.display()).parse().unwrap();
            volume.place(1, Path::new("/nowhere")).map(|placed| volume.share(1, placed))
        };
        let (share, mount) = place(dir.path()).unwrap();
        assert!(share.readonly && mount.read_only && share.tag == mount.tag && share.path == dir.path());
        assert!(mount.file.is_none() && !mount.fill);
        let file = dir.path().join("file");
        assert!(matches!(place(&file), Err(ContainerError::Volume { .. })));
        fs::write(&file, "").unwrap();
        let (share, mount) = place(&file).unwrap();
        assert_eq!((share.path, mount.file.as_deref()), (file, Some("file")));
        assert!(matches!(place(Path::new("/dev/null")), Err(ContainerError::Volume { .. })));
    }

    #[test]
    fn one_without_a_name_is_in_its_containers_folder() {
        let dir = tempfile::tempdir().unwrap();
        let volume: Volume = "/cache".parse().unwrap();
        let placed = volume.place(3, dir.path()).unwrap();
        assert!(placed.source == dir.path().join("volumes/3") && placed.fill && !placed.source.exists());
        volume.make(3, dir.path()).unwrap();
        assert!(placed.source.is_dir());
    }
}
