//! Tar archives of files that somebody may be writing to meanwhile, for `microvm cp`.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use tar::{Builder, Header};

/// Adds the file or folder at `path` with all that is in it, as `name`; a link as a link. Sockets are left out.
///
/// # Errors
/// A file cannot be read, or the archive not written.
pub fn append(archive: &mut Builder<impl Write>, name: &Path, path: &Path) -> io::Result<()> {
    archive.follow_symlinks(false);
    append_one(archive, name, path)?;
    let mut left = vec![(name.to_path_buf(), path.to_path_buf())];
    while let Some((name, path)) = left.pop() {
        // The one that was asked for may be a link to a folder, whose content is not asked for.
        if !fs::symlink_metadata(&path)?.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&path)? {
            let (entry, name) = entry.map(|entry| (entry.path(), name.join(entry.file_name())))?;
            match append_one(archive, &name, &entry) {
                Ok(true) => left.push((name, entry)),
                Ok(false) => {}
                // It was removed meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", entry.display()))),
            }
        }
    }
    Ok(())
}

/// Whether it is a folder.
fn append_one(archive: &mut Builder<impl Write>, name: &Path, path: &Path) -> io::Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    if meta.is_dir() {
        archive.append_dir(name, path)?;
    } else if meta.is_file() && !has_holes(&meta) {
        append_file(archive, name, &File::open(path)?)?;
    } else if !meta.file_type().is_socket() {
        archive.append_path_with_name(path, name)?;
    }
    Ok(meta.is_dir())
}

/// The crate knows how to leave holes out.
fn has_holes(meta: &Metadata) -> bool {
    meta.blocks() * 512 < meta.len()
}

/// As many bytes as the header says, whatever becomes of the file: else what follows in the archive is at a wrong place.
fn append_file(archive: &mut Builder<impl Write>, name: &Path, file: &File) -> io::Result<()> {
    let meta = file.metadata()?;
    let mut header = Header::new_gnu();
    header.set_metadata(&meta);
    archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(meta.len()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_is_in_a_folder_comes_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::create_dir_all(path.join("b")).unwrap();
        fs::write(path.join("b/file"), "text").unwrap();
        symlink("nowhere", path.join("link")).unwrap();
        let _socket = UnixListener::bind(path.join("socket")).unwrap();
        File::create(path.join("holes")).unwrap().set_len(1 << 20).unwrap();
        let mut archive = Builder::new(Vec::new());
        append(&mut archive, Path::new("x"), &path).unwrap();
        let archive = archive.into_inner().unwrap();
        let to = tempfile::tempdir().unwrap();
        tar::Archive::new(archive.as_slice()).unpack(to.path()).unwrap();
        let to = to.path().join("x");
        assert_eq!(fs::read(to.join("b/file")).unwrap(), b"text");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("nowhere"));
        assert_eq!(fs::read(to.join("holes")).unwrap(), vec![0; 1 << 20]);
        assert_eq!(fs::read_dir(&to).unwrap().count(), 3);
    }

    #[test]
    fn a_file_that_is_longer_than_it_says_spoils_nothing() {
        let mut archive = Builder::new(Vec::new());
        // The kernel makes it as it is read, and says that it is empty.
        append(&mut archive, Path::new("status"), Path::new("/proc/self/status")).unwrap();
        append(&mut archive, Path::new("next"), Path::new("/etc/passwd")).unwrap();
        let archive = archive.into_inner().unwrap();
        let mut archive = tar::Archive::new(archive.as_slice());
        let names = archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned());
        assert_eq!(names.collect::<Vec<_>>(), [Path::new("status"), Path::new("next")]);
    }

    #[test]
    fn one_that_is_not_there_is_an_error() {
        let mut archive = Builder::new(Vec::new());
        assert!(append(&mut archive, Path::new("x"), Path::new("/nowhere/at/all")).is_err());
    }
}
