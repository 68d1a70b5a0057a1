//! Compressed archives, told by their first bytes: media types and names of files are not always right.

use std::io::{self, BufReader, Cursor, Read};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use flate2::bufread::MultiGzDecoder;

/// Bytes of a piece that one thread hands to the next, and how many pieces may wait.
const PIECE: usize = 256 << 10;
const PIECES: usize = 8;

/// How an archive is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// What is behind a layer's media type.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        }
    }
}

/// Tells the packing, and gives the reader back as it was.
pub(super) fn sniff<R: Read>(mut reader: R) -> io::Result<(Packing, impl Read)> {
    let mut head = Vec::new();
    reader.by_ref().take(4).read_to_end(&mut head)?;
    let packing = match head.as_slice() {
        [0x1f, 0x8b, ..] => Packing::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd] => Packing::Zstd,
        _ => Packing::Plain,
    };
    Ok((packing, Cursor::new(head).chain(reader)))
}

/// Unpacks.
pub(super) fn unpacked<'a>(
    packing: Packing,
    reader: impl Read + Send + 'a,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    let buffered = BufReader::with_capacity(PIECE, reader);
    Ok(match packing {
        Packing::Plain => Box::new(buffered),
        Packing::Gzip => Box::new(MultiGzDecoder::new(buffered)),
        // Its window is at most 128 MiB, zstd's own limit.
        Packing::Zstd => Box::new(zstd::Decoder::with_buffer(buffered)?),
    })
}

/// What another thread reads.
pub(super) struct Ahead {
    pieces: Receiver<io::Result<Vec<u8>>>,
    piece: Cursor<Vec<u8>>,
}

/// Reads in a thread of its own, a few pieces ahead, so that unpacking and writing go on at once.
pub(super) fn ahead<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    reader: impl Read + Send + 'scope,
) -> Ahead {
    let (sender, pieces) = sync_channel(PIECES);
    scope.spawn(move || {
        let mut reader = reader;
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            let read = reader.by_ref().take(PIECE as u64).read_to_end(&mut piece);
            let last = !matches!(read, Ok(1..));
            // What came before an error is of use, too.
            let sent = match read {
                Err(e) => sender.send(Ok(piece)).and_then(|()| sender.send(Err(e))),
                Ok(_) => sender.send(Ok(piece)),
            };
            if last || sent.is_err() {
                return;
            }
        }
    });
    Ahead { pieces, piece: Cursor::default() }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.pieces.recv() {
                Ok(piece) => self.piece = Cursor::new(piece?),
                Err(_) => return Ok(0),
            }
        }
    }
}
