//! Folders of the host in a container, as `--volume` has them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

use crate::config::{ShareConfig, is_name};
use crate::guest::MountSpec;
use crate::sys::data::data_folder;

use super::ContainerError;

/// A folder of the host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// A path with a slash in it, or a name: a folder that is kept for this user.
    source: String,
    /// An absolute path in the container.
    target: String,
    read_only: bool,
    /// Who owns in the container what is this user's.
    uid: u32,
    gid: u32,
}

/// A `--volume` that cannot be read.
#[derive(Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no volume: write HOST:CONTAINER[:ro][,uid=N][,gid=N] with an absolute path in the container, and on the \
     host a path with a slash in it or a name"
)]
pub struct ParseVolumeError(String);

impl FromStr for Volume {
    type Err = ParseVolumeError;

    fn from_str(text: &str) -> Result<Self, ParseVolumeError> {
        let bad = || ParseVolumeError(text.into());
        let mut parts = text.splitn(3, ':');
        let (source, target) = parts.next().zip(parts.next()).ok_or_else(bad)?;
        let is_source = source.contains('/') || source == "." || is_name(source);
        if !is_source || !target.starts_with('/') {
            return Err(bad());
        }
        let mut volume =
            Self { source: source.into(), target: target.into(), read_only: false, uid: 0, gid: 0 };
        for option in parts.next().iter().flat_map(|options| options.split(',')) {
            match option.split_once('=') {
                None if option == "ro" => volume.read_only = true,
                None if option == "rw" => volume.read_only = false,
                Some(("uid", number)) => volume.uid = number.parse().map_err(|_| bad())?,
                Some(("gid", number)) => volume.gid = number.parse().map_err(|_| bad())?,
                _ => return Err(bad()),
            }
        }
        Ok(volume)
    }
}

impl Volume {
    /// The folder that is shared, and where it is mounted, as the one of this number.
    ///
    /// # Errors
    /// There is no such folder on the host.
    pub fn place(&self, number: usize) -> Result<(ShareConfig, MountSpec), ContainerError> {
        let path = self.folder()?;
        let failed = |source| ContainerError::Volume { path: path.clone(), source };
        if !fs::metadata(&path).map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        let tag = format!("volume{number}");
        let share = ShareConfig {
            readonly: self.read_only,
            uid: self.uid,
            gid: self.gid,
            ..ShareConfig::new(path, tag.clone())
        };
        Ok((share, MountSpec { tag, path: self.target.clone(), read_only: self.read_only }))
    }

    /// One with a name is made where it is not there.
    fn folder(&self) -> Result<PathBuf, ContainerError> {
        if self.source.contains('/') || self.source == "." {
            let path = Path::new(&self.source);
            return std::path::absolute(path)
                .map_err(|source| ContainerError::Volume { path: path.into(), source });
        }
        let path = data_folder().ok_or(ContainerError::NoPlace)?.join("volumes").join(&self.source);
        fs::create_dir_all(&path).map_err(|source| ContainerError::Store { path: path.clone(), source })?;
        Ok(path)
    }
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = if self.read_only { "ro" } else { "rw" };
        write!(f, "{}:{}:{mode}", self.source, self.target)?;
        if (self.uid, self.gid) != (0, 0) {
            write!(f, ",uid={},gid={}", self.uid, self.gid)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read() {
        let volume: Volume = "./src:/src:ro".parse().unwrap();
        assert!(volume.read_only && volume.source == "./src" && volume.target == "/src");
        let volume: Volume = "data:/var/lib:uid=5,gid=6".parse().unwrap();
        assert_eq!(
            (volume.uid, volume.gid, volume.to_string().as_str()),
            (5, 6, "data:/var/lib:rw,uid=5,gid=6")
        );
        for wrong in ["/a", "/a:b", ":/b", "a b:/c", "/a:/b:x", "/a:/b:uid=x", "/a:/b:ro:ro", ""] {
            assert!(wrong.parse::<Volume>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_folder_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let place = |path: &Path| format!("{}:/x:ro", path.display()).parse::<Volume>().unwrap().place(1);
        let (share, mount) = place(dir.path()).unwrap();
        assert!(share.readonly && mount.read_only && share.tag == mount.tag && share.path == dir.path());
        let file = dir.path().join("file");
        assert!(matches!(place(&file), Err(ContainerError::Volume { .. })));
        fs::write(&file, "").unwrap();
        assert!(matches!(place(&file), Err(ContainerError::Volume { .. })));
    }
}
