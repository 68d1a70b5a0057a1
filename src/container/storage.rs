//! A disk for what a container writes, as `--storage` has it: a sparse file with an ext4 file system.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::config::{DiskConfig, Size};

use super::ContainerError;

/// In the container's folder.
pub const FILE: &str = "storage";
/// What the guest finds it by.
pub const ID: &str = "storage";
/// ext4 has no smaller one that is of use.
const LEAST: Size = Size(16 << 20);

/// Makes the disk in a container's folder.
///
/// # Errors
/// It is too small, the disk is full, or there is no `mkfs.ext4`.
pub fn make(folder: &Path, size: Size) -> Result<DiskConfig, ContainerError> {
    if size < LEAST {
        return Err(ContainerError::StorageSize(size, LEAST));
    }
    let path = folder.join(FILE);
    let failed = |source| ContainerError::Store { path: path.clone(), source };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    file.and_then(|file| file.set_len(size.0)).map_err(failed)?;
    // No journal: it goes with its container. Nothing is written that is zero, so that the file stays sparse.
    let mut command = Command::new("mkfs.ext4");
    command
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"])
        .arg(&path);
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => ContainerError::NoMkfs,
        _ => failed(e),
    })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let line = words.lines().find(|line| !line.trim().is_empty());
        let line = line.map_or_else(|| output.status.to_string(), String::from);
        return Err(failed(io::Error::other(format!("mkfs.ext4: {line}"))));
    }
    Ok(DiskConfig { id: Some(ID.into()), ..DiskConfig::new(path) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_disk_is_sparse_and_has_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(make(dir.path(), Size(1 << 20)), Err(ContainerError::StorageSize(..))));
        let disk = make(dir.path(), Size(1 << 30)).unwrap();
        let meta = disk.path.metadata().unwrap();
        assert!(meta.len() == 1 << 30 && meta.blocks() * 512 < 32 << 20, "{} blocks", meta.blocks());
        // ext4's magic number.
        let bytes = std::fs::read(&disk.path).unwrap();
        assert_eq!(bytes[0x438..0x43a], [0x53, 0xef]);
        // One that is there is not made again.
        assert!(make(dir.path(), Size(1 << 30)).is_err());
    }
}
