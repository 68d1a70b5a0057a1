//! Files with holes, as GNU tar writes them: in its own format (`S`), and in pax records of versions 0.0, 0.1 and 1.0.

use super::{RECORD, TarError, number};

/// The most pieces of data of one file; they are in memory.
const MAX_PIECES: usize = 1 << 18;

/// The longest number of a map that stands in front of the data, with the end of its line.
const MAX_LINE: usize = 21;

/// Where the data of a file is in it.
#[derive(Debug, Default)]
pub(super) struct Map {
    /// First byte and length of each piece, in ascending order.
    pieces: Vec<(u64, u64)>,
    /// Bytes of the whole file.
    size: u64,
}

/// What pax records say of holes.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub name: Option<Vec<u8>>,
    major: u64,
    size: Option<u64>,
    map: Map,
}

/// A file whose holes are filled with zeros.
pub(super) struct Filled {
    map: Map,
    /// The piece that is next, or in which we are.
    next: usize,
    /// The byte that is next.
    at: u64,
}

/// What comes next of a file: at least one byte.
pub(super) enum Part {
    Data(u64),
    Hole(u64),
}

fn broken() -> TarError {
    TarError::Format("a map of a sparse file")
}

impl Records {
    /// Takes a record whose key begins with `GNU.sparse.`, without that.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let value_number = || number(value).ok_or_else(broken);
        match key {
            b"name" => self.name = Some(value.into()),
            b"major" => self.major = value_number()?,
            b"minor" | b"numblocks" => {}
            b"size" | b"realsize" => self.size = Some(value_number()?),
            b"offset" => self.map.push(value_number()?, 0)?,
            b"numbytes" => self.map.pieces.last_mut().ok_or_else(broken)?.1 = value_number()?,
            b"map" => {
                let numbers: Option<Vec<u64>> = value.split(|b| *b == b',').map(number).collect();
                let numbers = numbers.filter(|all| all.len() % 2 == 0).ok_or_else(broken)?;
                numbers.chunks_exact(2).try_for_each(|piece| self.map.push(piece[0], piece[1]))?;
            }
            _ => return Err(TarError::Format("a sparse file of a version that is not known")),
        }
        Ok(())
    }

    /// Whether the map stands in front of the data (version 1.0).
    pub fn is_with_data(&self) -> bool {
        self.major == 1
    }

    /// The map that the records are, for a file of `size` bytes where they do not say.
    pub fn into_map(self, size: u64) -> Map {
        Map { size: self.size.unwrap_or(size), ..self.map }
    }
}

impl Map {
    pub fn of_size(size: u64) -> Self {
        Self { pieces: Vec::new(), size }
    }

    pub fn push(&mut self, start: u64, length: u64) -> Result<(), TarError> {
        if self.pieces.len() == MAX_PIECES {
            return Err(TarError::Format("a sparse file of too many pieces"));
        }
        self.pieces.push((start, length));
        Ok(())
    }

    /// Reads the map in front of the data: decimal numbers, each on a line, in whole records, which `next` reads.
    pub fn read_lines(
        &mut self,
        mut next: impl FnMut(&mut [u8; RECORD]) -> Result<(), TarError>,
    ) -> Result<(), TarError> {
        let mut record = [0; RECORD];
        let mut at = RECORD;
        let mut line = || {
            let mut digits = Vec::new();
            loop {
                if at == RECORD {
                    next(&mut record)?;
                    at = 0;
                }
                let byte = record[at];
                at += 1;
                match byte {
                    b'\n' => return number::<u64>(&digits).ok_or_else(broken),
                    _ if digits.len() == MAX_LINE => return Err(broken()),
                    byte => digits.push(byte),
                }
            }
        };
        for _ in 0..line()? {
            let (start, length) = (line()?, line()?);
            self.push(start, length)?;
        }
        Ok(())
    }

    /// Checks that the pieces are one behind the other, in the file, and `data` bytes together.
    pub fn filled(self, data: u64) -> Result<Filled, TarError> {
        let (mut end, mut sum) = (0u64, 0u64);
        for &(start, length) in &self.pieces {
            if start < end {
                return Err(broken());
            }
            end = start.checked_add(length).ok_or_else(broken)?;
            // Less than `end`.
            sum += length;
        }
        if end > self.size || sum != data {
            return Err(broken());
        }
        Ok(Filled { map: self, next: 0, at: 0 })
    }
}

impl Filled {
    /// Bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.map.size
    }

    /// What is next. `None`: the end.
    pub fn part(&mut self) -> Option<Part> {
        while let Some(&(start, length)) = self.map.pieces.get(self.next) {
            if self.at < start {
                return Some(Part::Hole(start - self.at));
            }
            match start + length - self.at {
                0 => self.next += 1,
                left => return Some(Part::Data(left)),
            }
        }
        Some(self.map.size - self.at).filter(|left| *left > 0).map(Part::Hole)
    }

    /// So much of it has been taken.
    pub fn advance(&mut self, count: u64) {
        self.at += count;
    }
}
