//! Removing a folder with all that is in it, whoever made that: a guest's tree may be deeper than a stack or a table of
//! descriptors, and its folders closed.

use std::ffi::{CStr, CString};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, chmodat, fstat, openat, statat, unlinkat};
use rustix::io::Errno;

const OPEN: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes the folder `path`, and returns the bytes of the disk that files in it had: of a sparse one those that were there,
/// and none of one that has another name. No link in it is followed, and no mount is there to be left out.
///
/// # Errors
/// Something in it cannot be removed.
pub fn remove_tree(path: &Path) -> io::Result<u64> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() {
        fs::remove_file(path)?;
        return Ok(freed(meta.nlink(), meta.blocks()));
    }
    fs::set_permissions(path, Permissions::from_mode(0o700))?;
    let bytes = empty(openat(CWD, path, OPEN, Mode::empty())?)?;
    fs::remove_dir(path)?;
    Ok(bytes)
}

/// Of a file with so many names and blocks of 512 bytes, whatever the file system's are.
fn freed(names: u64, blocks: u64) -> u64 {
    if names == 1 { blocks.saturating_mul(512) } else { 0 }
}

/// Removes all that is in a folder, and returns the same. Goes down and up with one descriptor.
///
/// # Errors
/// As for [`remove_tree`].
pub fn empty(mut here: OwnedFd) -> io::Result<u64> {
    let (mut way, mut bytes) = (Vec::new(), 0);
    loop {
        if let Some(name) = remove_entries(here.as_fd(), &mut bytes)? {
            chmodat(&here, &*name, Mode::RWXU, AtFlags::empty())?;
            let below = openat(&here, &*name, OPEN, Mode::empty())?;
            way.push((name, identity(&here)?));
            here = below;
            continue;
        }
        let Some((name, above)) = way.pop() else { return Ok(bytes) };
        here = openat(&here, c"..", OPEN, Mode::empty())?;
        if identity(&here)? != above {
            return Err(io::Error::other("somebody moves its folders"));
        }
        unlinkat(&here, &*name, AtFlags::REMOVEDIR)?;
    }
}

fn identity(folder: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(folder)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Removes what it can in this folder, adds what that had, and returns the first folder that has something in it.
fn remove_entries(folder: BorrowedFd<'_>, bytes: &mut u64) -> io::Result<Option<CString>> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            // Somebody else has removed it, who removes all of it, too.
            Err(Errno::NOENT) => continue,
            other => other?,
        };
        match remove(folder, name) {
            Err(Errno::NOENT) => continue,
            Ok(false) => return Ok(Some(name.into())),
            removed => removed?,
        };
        *bytes = bytes.saturating_add(freed(stat.st_nlink, stat.st_blocks.try_into().unwrap_or(0)));
    }
    Ok(None)
}

/// `false`: it is a folder that has something in it.
fn remove(folder: BorrowedFd<'_>, name: &CStr) -> Result<bool, Errno> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => match unlinkat(folder, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            removed => removed.map(|()| true),
        },
        removed => removed.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn what_was_freed_is_what_was_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tree");
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::File::create(path.join("sparse")).unwrap().set_len(1 << 30).unwrap();
        fs::write(path.join("a/b/file"), vec![1; 100 << 10]).unwrap();
        fs::write(dir.path().join("kept"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(dir.path().join("kept"), path.join("a/other")).unwrap();
        fs::File::open(path.join("a/b/file")).unwrap().sync_all().unwrap();
        let bytes = remove_tree(&path).unwrap();
        assert!((100 << 10..500 << 10).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_deep_tree_of_closed_folders_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (path, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir(&path).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "").unwrap();
        symlink(&outside, path.join("link")).unwrap();
        // More than a process has descriptors, or a path has bytes.
        let mut here = openat(CWD, &path, OPEN, Mode::empty()).unwrap();
        for level in 0..5000 {
            mkdirat(&here, c"down", Mode::RWXU).unwrap();
            mkdirat(&here, c"aside", Mode::empty()).unwrap();
            let below = openat(&here, c"down", OPEN, Mode::empty()).unwrap();
            if level % 2 == 0 {
                rustix::fs::fchmod(&here, Mode::empty()).unwrap();
            }
            here = below;
        }
        remove_tree(&path).unwrap();
        assert!(!path.exists() && outside.join("file").exists());
    }
}
