//! What an image has at a volume's place, copied into a new volume.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, chmodat, chownat, fchmod, fchown, fstat, mkdirat, openat,
    readlinkat, statat, symlinkat,
};
use rustix::process::{Gid, Uid};

/// Permissions, with set-user-ID and the like, of a `st_mode`.
const PERMISSIONS: u32 = 0o7777;

/// Copies what is in the folder `from` to the empty folder `to`, which gets its mode and, where that may be, its owner.
/// Devices, sockets and pipes are left out. No link is followed.
///
/// # Errors
/// A file cannot be read or made.
pub fn copy_contents(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let open = |flags| openat(from, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(to, name, flags, Mode::empty())?;
                copy_contents(open(OFlags::RDONLY | OFlags::DIRECTORY)?.as_fd(), made.as_fd())?;
                continue;
            }
            FileType::RegularFile => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut made = File::from(openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
                io::copy(&mut File::from(open(OFlags::RDONLY)?), &mut made)?;
            }
            FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?, to, name)?,
            _ => continue,
        }
        // A share's owner is the one that it was given.
        let _ = chownat(to, name, owner(&stat), group(&stat), AtFlags::SYMLINK_NOFOLLOW);
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            chmodat(to, name, Mode::from_raw_mode(stat.st_mode & PERMISSIONS), AtFlags::empty())?;
        }
    }
    let stat = fstat(from)?;
    let _ = fchown(to, owner(&stat), group(&stat));
    Ok(fchmod(to, Mode::from_raw_mode(stat.st_mode & PERMISSIONS))?)
}

fn owner(stat: &Stat) -> Option<Uid> {
    Some(Uid::from_raw(stat.st_uid))
}

fn group(stat: &Stat) -> Option<Gid> {
    Some(Gid::from_raw(stat.st_gid))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_tree_is_copied_with_its_modes_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(from.path().join("sub")).unwrap();
        fs::write(from.path().join("sub/file"), "text").unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        symlink(outside.path(), from.path().join("out")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, from.path().join("pipe"), Mode::RWXU).unwrap();
        let mode = |path: &str, mode| {
            fs::set_permissions(from.path().join(path), fs::Permissions::from_mode(mode)).unwrap();
        };
        mode("sub/file", 0o4751);
        mode("sub", 0o511);
        mode("", 0o750);
        let open = |path| File::open(path).unwrap();
        copy_contents(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        let of =
            |path: &str| fs::symlink_metadata(to.path().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((of("sub/file"), of("sub"), of("")), (0o4751, 0o511, 0o750));
        assert_eq!(fs::read(to.path().join("sub/file")).unwrap(), b"text");
        assert_eq!(fs::read_link(to.path().join("out")).unwrap(), outside.path());
        assert!(!to.path().join("pipe").exists());
        mode("sub", 0o700);
    }
}
