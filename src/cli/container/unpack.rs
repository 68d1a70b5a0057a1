//! Unpacks what comes out of a container: an archive that its guest made, and nobody vouches for.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tar::EntryType;

use crate::image::count_folders;

/// Folders of an archive. What is known of each stays in memory until its files are there.
const MAX_FOLDERS: usize = 1 << 17;

/// Unpacks `archive` into the folder `work`, and never outside: no devices, no owners, no set-user-ID bits.
///
/// # Errors
/// It is no archive, or one that wants more than any file needs; the disk is full.
pub fn unpack(mut archive: impl Read + Seek, work: &Path) -> io::Result<()> {
    archive.rewind()?;
    // The `tar` crate would read names of any length into memory.
    if count_folders(BufReader::new(&mut archive)).map_err(io::Error::other)? > MAX_FOLDERS {
        return Err(io::Error::other("the guest sends too many folders"));
    }
    archive.rewind()?;
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(false);
    archive.set_unpack_xattrs(false);
    let mut folders = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        match entry.header().entry_type() {
            EntryType::Directory => folders.push(entry),
            // `unpack_in` makes no link to a file that the archive did not bring.
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::GNUSparse
            | EntryType::Link
            | EntryType::Symlink => drop(entry.unpack_in(work)?),
            _ => {}
        }
    }
    // Last, and what is inside first: nothing could be made in one that is read-only.
    folders.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    folders.iter_mut().try_for_each(|folder| folder.unpack_in(work).map(drop))
}

/// Moves the one thing in `work` to `folder`, as `name`: how the guest calls it does not count.
///
/// # Errors
/// There is not one thing, or it cannot be moved.
pub fn take_out(work: &Path, folder: &Path, name: &OsStr) -> io::Result<()> {
    let mut entries = fs::read_dir(work)?;
    let (Some(entry), None) = (entries.next().transpose()?, entries.next()) else {
        return Err(io::Error::other("the guest did not send one file or folder"));
    };
    let (from, to) = (entry.path(), folder.join(name));
    if !entry.file_type()?.is_dir() {
        return fs::rename(from, to);
    }
    // One that is read-only cannot be moved, as it has its parent's name in it.
    let own = entry.metadata()?.permissions();
    fs::set_permissions(&from, Permissions::from_mode(own.mode() | 0o700))?;
    fs::rename(&from, &to)?;
    fs::set_permissions(&to, own)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Type, mode, name, link and data. The names are written as they are, where the crate would refuse them.
    fn archive(entries: &[(u8, u32, &str, &str, &[u8])]) -> File {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for (kind, mode, name, link, data) in entries {
            let mut header = tar::Header::new_gnu();
            let gnu = header.as_gnu_mut().unwrap();
            gnu.name[..name.len()].copy_from_slice(name.as_bytes());
            gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(EntryType::new(*kind));
            header.set_mode(*mode);
            header.set_device_major(1).and_then(|()| header.set_device_minor(3)).unwrap();
            header.set_mtime(1_000_000);
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_leaves_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let (work, outside) = (dir.path().join("work"), dir.path().join("outside"));
        fs::create_dir(&work).unwrap();
        fs::write(&outside, "mine").unwrap();
        let unpacked = |entries: &[(u8, u32, &str, &str, &[u8])]| {
            let result = unpack(archive(entries), &work);
            assert_eq!(names(dir.path()), ["outside", "work"]);
            assert_eq!(fs::read(&outside).unwrap(), b"mine");
            assert_eq!(outside.metadata().unwrap().nlink(), 1);
            result
        };
        unpacked(&[(b'0', 0o644, "../new", "", b"x"), (b'0', 0o644, "../outside", "", b"x")]).unwrap();
        assert!(unpacked(&[(b'2', 0, "up", "..", b""), (b'0', 0o644, "up/new", "", b"x")]).is_err());
        assert!(unpacked(&[(b'2', 0, "up2", "../outside", b""), (b'5', 0o700, "up2", "", b"")]).is_err());
        assert!(unpacked(&[(b'1', 0, "hard", "../outside", b"")]).is_err());
        unpacked(&[(b'2', 0, "s", "../outside", b""), (b'0', 0o644, "s", "", b"x")]).unwrap();
        assert_eq!(fs::read(work.join("s")).unwrap(), b"x");
        unpacked(&[(b'3', 0o666, "device", "", b""), (b'6', 0o666, "pipe", "", b"")]).unwrap();
        assert!(!work.join("device").exists() && !work.join("pipe").exists());
        unpacked(&[(b'0', 0o4777, "set-user", "", b"x")]).unwrap();
        assert_eq!(work.join("set-user").metadata().unwrap().mode() & 0o7000, 0);
    }

    #[test]
    fn folders_that_are_read_only_come_with_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let entries = [
            (b'5', 0o555, "a", "", &b""[..]),
            (b'5', 0o555, "a/b", "", b""),
            (b'0', 0o444, "a/b/c", "", b"x"),
        ];
        unpack(archive(&entries), dir.path()).unwrap();
        for folder in ["a", "a/b"] {
            let meta = dir.path().join(folder).metadata().unwrap();
            assert_eq!(meta.mode() & 0o777, 0o555, "{folder}");
        }
        let target = tempfile::tempdir_in(dir.path().parent().unwrap()).unwrap();
        take_out(dir.path(), target.path(), OsStr::new("z")).unwrap();
        assert_eq!(target.path().join("z").metadata().unwrap().mode() & 0o777, 0o555);
        assert_eq!(fs::read(target.path().join("z/b/c")).unwrap(), b"x");
    }

    #[test]
    fn a_file_with_holes_comes_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::create(dir.path().join("holes")).unwrap();
        file.set_len(8 << 20).unwrap();
        file.seek(io::SeekFrom::Start(4 << 20)).unwrap();
        file.write_all(b"middle").unwrap();
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        builder.append_path_with_name(dir.path().join("holes"), "holes").unwrap();
        let archive = builder.into_inner().unwrap();
        assert!(archive.metadata().unwrap().len() < 1 << 20, "the disk here has no holes");
        let work = tempfile::tempdir().unwrap();
        unpack(archive, work.path()).unwrap();
        assert!(fs::read(work.path().join("holes")).unwrap() == fs::read(dir.path().join("holes")).unwrap());
    }

    #[test]
    fn what_would_fill_the_memory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = vec![b'a'; 2 << 20];
        for kind in [b'L', b'K', b'x'] {
            let archive = archive(&[(kind, 0, "././@LongLink", "", &long), (b'0', 0o644, "f", "", b"")]);
            assert!(unpack(archive, dir.path()).is_err(), "{}", char::from(kind));
        }
        assert!(
            unpack(archive(&vec![(b'5', 0o700, "d", "", &b""[..]); MAX_FOLDERS + 1]), dir.path()).is_err()
        );
    }

    #[test]
    fn the_guest_does_not_choose_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        fs::create_dir(&work).unwrap();
        fs::write(dir.path().join(".profile"), "mine").unwrap();
        unpack(archive(&[(b'0', 0o644, ".profile", "", b"its")]), &work).unwrap();
        take_out(&work, dir.path(), OsStr::new("app.log")).unwrap();
        assert_eq!(fs::read(dir.path().join(".profile")).unwrap(), b"mine");
        assert_eq!(fs::read(dir.path().join("app.log")).unwrap(), b"its");
        assert!(take_out(&work, dir.path(), OsStr::new("x")).is_err());
    }
}
