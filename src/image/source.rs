//! What is imported, as a set of named files: a folder, or an archive whose entries are found by their place.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::error::ImageError;
use super::tar::{TarError, TarReader};

/// The most entries of an image's archive: an image of 127 layers has about 500.
const MAX_ENTRIES: usize = 100_000;

/// The most bytes of JSON that are read into memory.
pub const MAX_JSON: u64 = 4 << 20;

/// A set of named files.
pub(super) enum Source {
    /// A folder.
    Folder(PathBuf),
    /// An archive.
    Archive(Archive),
}

/// A file of a source.
pub(super) struct Part {
    pub data: Box<dyn Read + Send>,
    pub size: u64,
}

/// An archive that is not compressed.
pub(super) struct Archive {
    path: PathBuf,
    file: Arc<File>,
    /// Place and length of each file.
    files: HashMap<String, (u64, u64)>,
    /// Links, as older Docker writes them for layers that are the same.
    links: HashMap<String, String>,
}

/// Reads a part of a file, without a place of its own in it.
struct Window {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..room], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Archive {
    /// Finds the entries of an archive.
    pub fn index(path: &Path, file: File) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Archive { path: path.into(), source };
        let file = Arc::new(file);
        let end = file.metadata().map_err(|e| failed(e.into()))?.len();
        let (mut files, mut links) = (HashMap::new(), HashMap::new());
        // Skips by reading: the page cache is about to be read anyhow, and only small parts are copied.
        let mut reader = TarReader::new(Seeker { file: file.clone(), at: 0 });
        while let Some(entry) = reader.next_entry().map_err(failed)? {
            let name = clean(&String::from_utf8_lossy(&entry.path));
            let at = reader.get_ref().at;
            let whole = at.checked_add(entry.size).is_some_and(|last| last <= end);
            match entry.kind {
                b'0' if entry.has_holes => return Err(failed(TarError::Format("a part with holes"))),
                b'0' if !whole => return Err(failed(TarError::Truncated)),
                b'0' => drop(files.insert(name, (at, entry.size))),
                b'1' => drop(links.insert(name, clean(&String::from_utf8_lossy(&entry.link)))),
                b'2' => {
                    let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
                    let target = clean(&format!("{folder}/{}", String::from_utf8_lossy(&entry.link)));
                    links.insert(name, target);
                }
                _ => {}
            }
            if files.len() + links.len() > MAX_ENTRIES {
                return Err(failed(TarError::Format("it has too many entries for an image")));
            }
            reader.seek_past();
        }
        Ok(Self { path: path.into(), file, files, links })
    }

    fn open(&self, name: &str) -> Option<Part> {
        let name = clean(name);
        let name = self.links.get(&name).unwrap_or(&name);
        let (at, size) = *self.files.get(name)?;
        Some(Part { data: Box::new(Window { file: self.file.clone(), at, end: at + size }), size })
    }
}

/// Reads a file from where it stands.
pub(super) struct Seeker {
    file: Arc<File>,
    at: u64,
}

impl Read for Seeker {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl TarReader<Seeker> {
    /// Goes to the next header without reading.
    fn seek_past(&mut self) {
        let rest = self.forget_rest();
        let seeker = self.get_mut();
        seeker.at = seeker.at.saturating_add(rest);
    }
}

/// A path in the archive without `.`, `..` and empty parts: a key, never a path on the host.
fn clean(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

impl Source {
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(path) => path,
            Self::Archive(archive) => &archive.path,
        }
    }

    /// Opens a file. `None`: there is none. `name` is one of ours, or stands in an archive.
    pub fn open(&self, name: &str) -> Result<Option<Part>, ImageError> {
        match self {
            Self::Archive(archive) => Ok(archive.open(name)),
            Self::Folder(folder) => {
                let path = folder.join(clean(name));
                let open = || -> io::Result<Part> {
                    // A pipe that nobody writes to would not open at all.
                    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
                    let meta = file.metadata()?;
                    if !meta.is_file() {
                        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
                    }
                    Ok(Part { size: meta.len(), data: Box::new(file) })
                };
                match open() {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    other => {
                        other.map(Some).map_err(|source| ImageError::Source { path: path.clone(), source })
                    }
                }
            }
        }
    }

    /// Reads a small file. `None`: there is none.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(part) = self.open(name)? else { return Ok(None) };
        let no_image = |reason: String| ImageError::NoImage { path: self.path().into(), reason };
        if part.size > MAX_JSON {
            return Err(no_image(format!("{name} has more than {MAX_JSON} bytes")));
        }
        let mut bytes = Vec::new();
        let read = part.data.take(MAX_JSON).read_to_end(&mut bytes);
        read.map_err(|source| ImageError::Source { path: self.path().into(), source })?;
        Ok(Some(bytes))
    }

    /// Reads JSON. `None`: there is none.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ImageError> {
        self.read(name)?.map(|bytes| parse(name, &bytes)).transpose()
    }
}

/// Reads the JSON of `name`.
pub(super) fn parse<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|source| ImageError::Json { name: name.into(), source })
}
