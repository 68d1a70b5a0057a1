//! Files and folders of the container as tar archives, for `microvm cp`.

use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use microvm::guest::archive::append;
use microvm::guest::wire::{Kind, MAX_FRAME, read_frame, write_frame};

use super::vsock;

/// Sends the file or folder at `path`, under its own name; a link as a link. An empty frame is the end.
pub fn send(path: &str, stream: &mut vsock::Stream) -> io::Result<()> {
    let path = Path::new(path);
    // Of "/" and of "..", all there is.
    let name = path.file_name().map_or_else(|| Path::new(".").into(), Path::new);
    let mut archive = tar::Builder::new(BufWriter::with_capacity(MAX_FRAME, Frames(stream)));
    append(&mut archive, name, path).map_err(|e| named(path, &e))?;
    archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    write_frame(stream, Kind::Output, &[])
}

/// Unpacks what comes into the folder at `path`.
pub fn receive(path: &str, stream: &mut vsock::Stream) -> io::Result<()> {
    let mut input = Input { stream, bytes: Vec::new(), at: 0, at_end: false };
    let unpacked = unpack(Path::new(path), &mut input);
    // All of it, so that what follows is the next request.
    io::copy(&mut input, &mut io::sink())?;
    unpacked
}

fn unpack(path: &Path, input: &mut Input<'_>) -> io::Result<()> {
    if !path.is_dir() {
        return Err(named(path, &io::ErrorKind::NotADirectory.into()));
    }
    let mut archive = tar::Archive::new(input);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.unpack(path).map_err(|e| named(path, &e))
}

fn named(path: &Path, e: &io::Error) -> io::Error {
    io::Error::other(format!("{}: {e}", path.display()))
}

struct Frames<'a>(&'a mut vsock::Stream);

impl Write for Frames<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(MAX_FRAME);
        // An empty one would be the end.
        if len > 0 {
            write_frame(self.0, Kind::Output, &bytes[..len])?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Frames of input up to their end.
struct Input<'a> {
    stream: &'a mut vsock::Stream,
    bytes: Vec<u8>,
    at: usize,
    at_end: bool,
}

impl Read for Input<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.at == self.bytes.len() && !self.at_end {
            self.at = 0;
            match read_frame(self.stream, &mut self.bytes)? {
                Some(Kind::Input) => {}
                Some(Kind::InputEnd) => self.at_end = true,
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let len = (&self.bytes[self.at..]).read(to)?;
        self.at += len;
        Ok(len)
    }
}
