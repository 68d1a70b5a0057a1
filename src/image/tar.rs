//! Reads tar archives that anybody may have made: one pass, bounded memory, nothing touched on disk.
//!
//! The `tar` crate reads a header's fields; its own walk over the entries reads long names and pax records of any size
//! into memory, so the walk is ours.

mod sparse;

use std::io::{self, Read};

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};
use thiserror::Error;

use sparse::{Filled, Map, Part, Records};

const RECORD: usize = 512;

/// The most bytes of a long name or of one entry's pax records. Attributes of 64 KiB and paths of 4 KiB fit.
const MAX_EXTENSION: u64 = 1 << 20;

/// How many extensions one entry may have: a path, a link and pax records are three.
const MAX_EXTENSIONS: usize = 8;

/// An archive that cannot be read.
#[derive(Debug, Error)]
pub enum TarError {
    /// Reading fails, or the data behind it is broken.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// It ends within an entry.
    #[error("it is cut off")]
    Truncated,
    /// It is no tar archive, or a broken one.
    #[error("it is no tar archive, or a broken one: {0}")]
    Format(&'static str),
}

/// What a tar header and its extensions say.
#[derive(Debug, Default)]
pub struct Entry {
    /// As written: not to be trusted.
    pub path: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// The type: `b'0'` file, `b'1'` hard link, `b'2'` symbolic link, `b'3'` and `b'4'` devices, `b'5'` folder, `b'6'` pipe.
    pub kind: u8,
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Whether the file has holes, so that the archive has less of it.
    pub has_holes: bool,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds.
    pub mtime_nsec: u32,
    /// Of a device.
    pub major: u32,
    /// Of a device.
    pub minor: u32,
    /// Extended attributes, in the order of the archive.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads an archive to its end, so that it is known that nothing in it wants too much memory, and counts its folders.
///
/// # Errors
/// The archive is broken or cannot be read.
pub fn count_folders(archive: impl Read) -> Result<usize, TarError> {
    let (mut entries, mut folders) = (TarReader::new(archive), 0);
    while let Some(entry) = entries.next_entry()? {
        folders += usize::from(entry.kind == b'5');
    }
    Ok(folders)
}

/// An archive that is being read.
pub struct TarReader<R> {
    inner: R,
    /// Of the current entry's data.
    left: u64,
    padding: u64,
    /// Where the current entry has holes.
    holes: Option<Filled>,
    ended: bool,
}

impl<R: Read> TarReader<R> {
    /// Reads an archive from its start.
    pub fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0, holes: None, ended: false }
    }

    /// Whether the end was marked by a block of zeros, rather than by the end of the file.
    #[must_use]
    pub fn was_ended(&self) -> bool {
        self.ended
    }

    /// What the archive is read from.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// What the archive is read from, to be moved behind what [`TarReader::forget_rest`] gives.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// What the next call of [`TarReader::next`] would skip, in bytes; it no longer will.
    pub fn forget_rest(&mut self) -> u64 {
        let rest = self.left + self.padding;
        (self.left, self.padding, self.holes) = (0, 0, None);
        rest
    }

    /// The next entry; what is left of the last one's data is skipped. `None`: the end.
    ///
    /// # Errors
    /// The archive is broken or cannot be read.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        for _ in 0..MAX_EXTENSIONS {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let header = Header::from_byte_slice(&header);
            let size = header.entry_size().map_err(|_| TarError::Format("a size"))?;
            match header.entry_type().as_byte() {
                b'L' => extensions.path = Some(trimmed(self.extension(size)?)),
                b'K' => extensions.link = Some(trimmed(self.extension(size)?)),
                b'x' | b'X' => extensions.read_pax(&self.extension(size)?)?,
                // A comment for the whole archive, as Git writes; a volume's label.
                b'g' | b'V' => self.start_data(size)?,
                kind => {
                    let mut entry = extensions.apply(header, kind, size)?;
                    let map = if kind == b'S' { Some(self.gnu_map(header)?) } else { None };
                    self.start_data(entry.size)?;
                    let map =
                        map.map_or_else(|| self.pax_map(&mut extensions, &mut entry), |map| Ok(Some(map)));
                    if let Some(map) = map? {
                        let filled = map.filled(self.left)?;
                        (entry.size, entry.has_holes) = (filled.size(), true);
                        self.holes = Some(filled);
                    }
                    return Ok(Some(entry));
                }
            }
        }
        Err(TarError::Format("an entry with too many headers"))
    }

    fn start_data(&mut self, size: u64) -> Result<(), TarError> {
        let whole = size.checked_next_multiple_of(RECORD as u64).ok_or(TarError::Format("a size"))?;
        (self.left, self.padding) = (size, whole - size);
        Ok(())
    }

    fn skip(&mut self) -> Result<(), TarError> {
        let (data, all) = (self.left, self.forget_rest());
        let skipped = io::copy(&mut self.inner.by_ref().take(all), &mut io::sink())?;
        // What fills the last record up may be missing at the end, as umoci 0.4 leaves it; Go's reader takes that, too.
        if skipped < data { Err(TarError::Truncated) } else { Ok(()) }
    }

    /// `None`: the end.
    fn header(&mut self) -> Result<Option<[u8; RECORD]>, TarError> {
        let mut header = [0; RECORD];
        let mut filled = 0;
        while filled < RECORD {
            match self.inner.read(&mut header[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        match filled {
            0 => return Ok(None),
            RECORD => {}
            _ => return Err(TarError::Truncated),
        }
        if header.iter().all(|b| *b == 0) {
            self.ended = true;
            return Ok(None);
        }
        // The sum over the header, with its own field as blanks.
        let sum = header
            .iter()
            .enumerate()
            .map(|(i, b)| if (148..156).contains(&i) { 0x20 } else { u32::from(*b) });
        let wanted = Header::from_byte_slice(&header).cksum().ok();
        if wanted != Some(sum.sum()) {
            return Err(TarError::Format("a header's checksum"));
        }
        Ok(Some(header))
    }

    /// The map of a sparse file in GNU's own format: in the header, and in further records behind it.
    fn gnu_map(&mut self, header: &Header) -> Result<Map, TarError> {
        let broken = |_| TarError::Format("a map of a sparse file");
        let gnu = header.as_gnu().ok_or(TarError::Format("a sparse file of another format"))?;
        let mut map = Map::of_size(gnu.real_size().map_err(broken)?);
        let add = |map: &mut Map, pieces: &[GnuSparseHeader]| {
            for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
                map.push(piece.offset().map_err(broken)?, piece.length().map_err(broken)?)?;
            }
            Ok::<_, TarError>(())
        };
        add(&mut map, &gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut record = GnuExtSparseHeader::new();
            exactly(&mut self.inner, record.as_mut_bytes())?;
            add(&mut map, record.sparse())?;
            more = record.is_extended();
        }
        Ok(map)
    }

    /// The map of a sparse file in pax records, and in front of the data. `None`: the file has no holes.
    fn pax_map(&mut self, extensions: &mut Extensions, entry: &mut Entry) -> Result<Option<Map>, TarError> {
        let Some(mut records) = extensions.sparse.take() else { return Ok(None) };
        if entry.kind != b'0' {
            return Err(TarError::Format("holes in what is no file"));
        }
        if let Some(name) = records.name.take() {
            entry.path = name;
        }
        let with_data = records.is_with_data();
        let mut map = records.into_map(entry.size);
        if with_data {
            map.read_lines(|record| exactly(self, record))?;
        }
        Ok(Some(map))
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION {
            return Err(TarError::Format("a name or attributes of more than 1 MiB"));
        }
        self.start_data(size)?;
        let mut bytes = vec![0; size as usize];
        exactly(self, &mut bytes)?;
        Ok(bytes)
    }

    /// Data as the archive has it.
    fn read_data(&mut self, buffer: &mut [u8], most: u64) -> io::Result<usize> {
        let most = most.min(self.left);
        let room = buffer.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        let count = self.inner.read(&mut buffer[..room])?;
        self.left -= count as u64;
        Ok(count)
    }
}

fn exactly(reader: &mut impl Read, bytes: &mut [u8]) -> Result<(), TarError> {
    reader.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => TarError::Truncated,
        _ => TarError::Read(e),
    })
}

/// The current entry's data, with its holes as zeros.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(holes) = &mut self.holes else { return self.read_data(buffer, u64::MAX) };
        let count = match holes.part() {
            None => 0,
            Some(Part::Hole(left)) => {
                let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                buffer[..room].fill(0);
                room
            }
            Some(Part::Data(left)) => self.read_data(buffer, left)?,
        };
        if let Some(holes) = &mut self.holes {
            holes.advance(count as u64);
        }
        Ok(count)
    }
}

fn trimmed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// What headers in front of an entry's own say.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Option<Records>,
}

impl Extensions {
    /// pax records: `LENGTH KEY=VALUE\n`, where the length is the whole record's.
    fn read_pax(&mut self, mut bytes: &[u8]) -> Result<(), TarError> {
        let broken = || TarError::Format("a pax record");
        while !bytes.is_empty() {
            let blank = bytes.iter().position(|b| *b == b' ').ok_or_else(broken)?;
            let length: usize = number(&bytes[..blank]).ok_or_else(broken)?;
            if length <= blank + 1 || length > bytes.len() {
                return Err(broken());
            }
            let (record, rest) = bytes.split_at(length);
            bytes = rest;
            let record = record[blank + 1..].strip_suffix(b"\n").ok_or_else(broken)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
            self.set(&record[..equals], &record[equals + 1..])?;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let broken = || TarError::Format("a number in a pax record");
        match key {
            // Without a value a record says that there is none: what the header has counts (POSIX, pax).
            b"path" | b"linkpath" | b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => {}
            b"path" => self.path = Some(value.into()),
            b"linkpath" => self.link = Some(value.into()),
            b"size" => self.size = Some(number(value).ok_or_else(broken)?),
            b"uid" => self.uid = Some(number(value).ok_or_else(broken)?),
            b"gid" => self.gid = Some(number(value).ok_or_else(broken)?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(broken)?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.get_or_insert_default().set(key, value)?;
                } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.into(), value.into()));
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, header: &Header, kind: u8, size: u64) -> Result<Entry, TarError> {
        let broken = |_| TarError::Format("a number in a header");
        let old = header.as_old();
        let path = self.path.take().unwrap_or_else(|| header.path_bytes().into_owned());
        let link = || header.link_name_bytes().map(|l| l.into_owned()).unwrap_or_default();
        let kind = match kind {
            // Before POSIX a folder was a file with a slash behind its name.
            0 | b'0' | b'7' if path.ends_with(b"/") => b'5',
            0 | b'0' | b'7' | b'S' => b'0',
            kind => kind,
        };
        let size = self.size.unwrap_or(size);
        let (mtime, mtime_nsec) = match self.mtime {
            Some(time) => time,
            None => (or_zero(&old.mtime, || header.mtime()).map_err(broken)? as i64, 0),
        };
        let is_device = matches!(kind, b'3' | b'4');
        let number = |field: io::Result<Option<u32>>| field.map(Option::unwrap_or_default).map_err(broken);
        Ok(Entry {
            path,
            link: self.link.take().unwrap_or_else(link),
            kind,
            // Some archives give the size of what is linked; no data follows.
            size: if matches!(kind, b'1'..=b'6') { 0 } else { size },
            mode: or_zero(&old.mode, || header.mode()).map_err(broken)?,
            uid: self.uid.map_or_else(|| or_zero(&old.uid, || header.uid()), Ok).map_err(broken)?,
            gid: self.gid.map_or_else(|| or_zero(&old.gid, || header.gid()), Ok).map_err(broken)?,
            mtime,
            mtime_nsec,
            major: if is_device { number(header.device_major())? } else { 0 },
            minor: if is_device { number(header.device_minor())? } else { 0 },
            xattrs: std::mem::take(&mut self.xattrs),
            has_holes: false,
        })
    }
}

/// Some writers leave fields empty.
fn or_zero<T: Default>(field: &[u8], read: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if field.iter().all(|b| matches!(b, 0 | b' ')) { Ok(T::default()) } else { read() }
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `-12.345678901`: seconds, rounded down, and nanoseconds.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9.9}").parse().ok()?;
    match (whole.starts_with('-'), nanos) {
        (true, 1..) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)),
        _ => Some((seconds, nanos)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_pax_writes_them() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"1.x"), None);
    }

    #[test]
    fn broken_archives_are_errors() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(1000);
        header.set_mode(0o644);
        archive.append_data(&mut header, "x".repeat(200), &[7; 1000][..]).unwrap();
        let good = archive.into_inner().unwrap();
        let read = |bytes: &[u8]| -> Result<usize, TarError> {
            let mut reader = TarReader::new(bytes);
            let mut count = 0;
            while let Some(entry) = reader.next_entry()? {
                assert_eq!(entry.path.len(), 200);
                count += 1;
            }
            Ok(count)
        };
        assert_eq!(read(&good).unwrap(), 1);
        // Whole but for what fills the last record up.
        assert_eq!(read(&good[..2536]).unwrap(), 1);
        for cut in [100, 512, 600, 1500, 2000, 2200, 2535] {
            assert!(read(&good[..cut]).is_err(), "{cut}");
        }
        for at in 0..512 {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(read(&bad).is_err(), "{at}");
        }
    }
}
