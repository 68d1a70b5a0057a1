//! What a container's program has printed, kept for `microvm logs`.
//!
//! Two files take turns: when one is full the other is emptied and goes on, so a guest can fill no disk, and the newest
//! output, at least one file full, is there. A record is the time in nanoseconds since 1970 (eight bytes), a frame's
//! kind (one byte), the length (four bytes) and the bytes; numbers have the lowest byte first.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guest::wire::{Kind, MAX_FRAME};
use crate::sandbox::Kept;

/// Of each file.
const MAX_BYTES: u64 = 16 << 20;
const HEAD: usize = 13;
/// The files of a container's folder.
pub const FILES: [&str; 2] = ["log.0", "log.1"];

/// Writes the log.
pub struct LogWriter {
    files: [File; 2],
    current: usize,
    written: u64,
}

impl LogWriter {
    /// Makes the log in a folder that has none.
    ///
    /// # Errors
    /// A file cannot be made.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let create =
            |name: &str| OpenOptions::new().append(true).create_new(true).mode(0o600).open(folder.join(name));
        Ok(Self { files: [create(FILES[0])?, create(FILES[1])?], current: 0, written: 0 })
    }

    /// Puts the files on the list of those that stay open.
    pub fn keep(&self, kept: &mut Kept) {
        self.files.iter().for_each(|file| kept.add("the container's log", file));
    }

    /// Adds a record.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn add(&mut self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        let len = (HEAD + bytes.len()) as u64;
        if self.written + len > MAX_BYTES {
            self.current ^= 1;
            self.files[self.current].set_len(0)?;
            self.written = 0;
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut record = Vec::with_capacity(HEAD + bytes.len());
        record.extend_from_slice(&u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).to_le_bytes());
        record.push(kind as u8);
        record.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        record.extend_from_slice(bytes);
        let mut file = &self.files[self.current];
        file.write_all(&record).inspect_err(|_| {
            // What came of it would be in the way of all that follows.
            let _ = file.set_len(self.written);
        })?;
        self.written += len;
        Ok(())
    }
}

/// A record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// When it came.
    pub time: SystemTime,
    /// On standard error, not output.
    pub is_error: bool,
    /// What was printed.
    pub bytes: Vec<u8>,
}

/// Reads the log from its beginning, and on as it grows. What is written over before it is read is left out.
pub struct LogReader {
    paths: [PathBuf; 2],
    current: usize,
    file: BufReader<File>,
    /// The time of the first record of what is read from `file`: it is another one where that was emptied since.
    began: Option<u64>,
    /// Bytes of a record that is not whole yet.
    partial: Vec<u8>,
}

impl LogReader {
    /// Opens the log in a container's folder.
    ///
    /// # Errors
    /// There is none.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let paths = FILES.map(|name| folder.join(name));
        let (current, file) = older(&paths)?;
        Ok(Self { paths, current, file, began: None, partial: Vec::new() })
    }

    /// The files, for who waits for more.
    #[must_use]
    pub fn paths(&self) -> &[PathBuf; 2] {
        &self.paths
    }

    /// The next record. `None`: there is no more for now.
    ///
    /// # Errors
    /// The disk fails.
    pub fn next_record(&mut self) -> io::Result<Option<LogRecord>> {
        loop {
            let record = self.next_here();
            // Asked behind the reading: only now is what was read known to be of one piece.
            let here = first_time(self.file.get_ref());
            if self.began.is_some() && self.began != here {
                // All that both have is newer than what was read.
                let (current, file) = older(&self.paths)?;
                self.go_on_in(current, file);
                continue;
            }
            if let Some(record) = record? {
                return Ok(Some(record));
            }
            // At the end of this file the other one goes on, where it is newer.
            let other = File::open(&self.paths[self.current ^ 1])?;
            let is_newer = match (here, first_time(&other)) {
                (Some(here), Some(there)) => there > here,
                (None, there) => there.is_some(),
                (Some(_), None) => false,
            };
            if !is_newer || !self.partial.is_empty() {
                return Ok(None);
            }
            self.go_on_in(self.current ^ 1, BufReader::new(other));
        }
    }

    fn go_on_in(&mut self, current: usize, file: BufReader<File>) {
        (self.current, self.file, self.began) = (current, file, None);
        self.partial.clear();
    }

    fn next_here(&mut self) -> io::Result<Option<LogRecord>> {
        if !self.fill(HEAD)? {
            return Ok(None);
        }
        let time = self.partial.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        self.began.get_or_insert(time);
        let len = u32::from_le_bytes([self.partial[9], self.partial[10], self.partial[11], self.partial[12]]);
        if len as usize > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the log is damaged"));
        }
        if !self.fill(HEAD + len as usize)? {
            return Ok(None);
        }
        let record = std::mem::take(&mut self.partial);
        Ok(Some(LogRecord {
            time: UNIX_EPOCH + Duration::from_nanos(time),
            is_error: record[8] == Kind::Error as u8,
            bytes: record[HEAD..].to_vec(),
        }))
    }

    /// Has `len` bytes in `partial`. `false`: the file has not.
    fn fill(&mut self, len: usize) -> io::Result<bool> {
        let missing = len.saturating_sub(self.partial.len()) as u64;
        (&mut self.file).take(missing).read_to_end(&mut self.partial)?;
        Ok(self.partial.len() >= len)
    }
}

/// Of the file's first record.
fn first_time(file: &File) -> Option<u64> {
    let mut time = [0; 8];
    file.read_exact_at(&mut time, 0).ok()?;
    Some(u64::from_le_bytes(time))
}

/// The file that comes first.
fn older(paths: &[PathBuf; 2]) -> io::Result<(usize, BufReader<File>)> {
    let [a, b] = [File::open(&paths[0])?, File::open(&paths[1])?];
    match (first_time(&a), first_time(&b)) {
        (Some(time_a), Some(time_b)) if time_b < time_a => Ok((1, BufReader::new(b))),
        (None, Some(_)) => Ok((1, BufReader::new(b))),
        _ => Ok((0, BufReader::new(a))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut LogReader) -> Vec<LogRecord> {
        std::iter::from_fn(|| reader.next_record().unwrap()).collect()
    }

    #[test]
    fn what_is_written_is_read_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(folder.path()).unwrap();
        let mut reader = LogReader::open(folder.path()).unwrap();
        assert!(all(&mut reader).is_empty());
        log.add(Kind::Output, b"a\n").unwrap();
        log.add(Kind::Error, b"\xff").unwrap();
        let records = all(&mut reader);
        let seen: Vec<_> = records.iter().map(|r| (r.is_error, r.bytes.as_slice())).collect();
        assert_eq!(seen, [(false, &b"a\n"[..]), (true, b"\xff")]);
        log.add(Kind::Output, b"b").unwrap();
        assert_eq!(all(&mut reader).len(), 1);
    }

    #[test]
    fn it_is_bounded_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(folder.path()).unwrap();
        let mut reader = LogReader::open(folder.path()).unwrap();
        let chunk = vec![0; MAX_FRAME];
        let per_file = MAX_BYTES as usize / (MAX_FRAME + HEAD);
        let mut followed = 0_usize;
        for number in 0..5 * per_file {
            let mut chunk = chunk.clone();
            chunk[..8].copy_from_slice(&number.to_le_bytes());
            log.add(Kind::Output, &chunk).unwrap();
            for record in all(&mut reader) {
                assert_eq!(record.bytes[..8], followed.to_le_bytes());
                followed += 1;
            }
        }
        assert_eq!(followed, 5 * per_file);
        let size: u64 = FILES.iter().map(|f| folder.path().join(f).metadata().unwrap().len()).sum();
        assert!(size <= 2 * MAX_BYTES);
        let kept = all(&mut LogReader::open(folder.path()).unwrap());
        assert!(kept.len() >= per_file, "{}", kept.len());
        assert_eq!(kept.last().unwrap().bytes[..8], (5 * per_file - 1).to_le_bytes());
        assert!(kept.is_sorted_by_key(|r| r.time));
    }

    #[test]
    fn a_reader_that_is_overtaken_goes_on_with_what_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(folder.path()).unwrap();
        // Of other lengths each time, so that where one began another has its middle.
        let lengths = [60_001, 50_003, 40_009, 30_011];
        let record = |number: usize| {
            let mut chunk = vec![0xff; lengths[number / 300 % lengths.len()]];
            chunk[..8].copy_from_slice(&number.to_le_bytes());
            chunk
        };
        (0..20).for_each(|number| log.add(Kind::Output, &record(number)).unwrap());
        let mut reader = LogReader::open(folder.path()).unwrap();
        for number in 0..10 {
            assert_eq!(reader.next_record().unwrap().unwrap().bytes, record(number));
        }
        let last = 4 * 300;
        (20..last).for_each(|number| log.add(Kind::Output, &record(number)).unwrap());
        let mut numbers = Vec::new();
        for read in all(&mut reader) {
            let number = usize::from_le_bytes(*read.bytes.first_chunk().unwrap());
            assert!(read.bytes == record(number), "{number}");
            numbers.push(number);
        }
        assert!(numbers.is_sorted() && numbers.last() == Some(&(last - 1)), "{numbers:?}");
        assert!(numbers.windows(2).filter(|pair| pair[1] != pair[0] + 1).count() <= 1, "{numbers:?}");
    }

    #[test]
    fn a_record_that_is_not_whole_is_none_yet() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(folder.path()).unwrap();
        log.add(Kind::Output, b"whole").unwrap();
        let path = folder.path().join(FILES[0]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
        let mut reader = LogReader::open(folder.path()).unwrap();
        assert!(all(&mut reader).is_empty());
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"le").unwrap();
        assert_eq!(all(&mut reader)[0].bytes, b"whole");
    }
}
