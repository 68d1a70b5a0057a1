//! Waiting for files to change, with inotify(7).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;

/// Files that are watched.
pub struct Watch {
    changes: OwnedFd,
    end: OwnedFd,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// A file was written to.
    Change,
    /// The other end of the pipe was closed.
    End,
}

impl Watch {
    /// Watches files for writes, and a pipe for its end.
    ///
    /// # Errors
    /// A file is not there, or the user watches too many.
    pub fn new(paths: &[impl AsRef<Path>], end: OwnedFd) -> io::Result<Self> {
        let changes = inotify::init(CreateFlags::CLOEXEC)?;
        for path in paths {
            inotify::add_watch(&changes, path.as_ref(), WatchFlags::MODIFY)?;
        }
        Ok(Self { changes, end })
    }

    /// Waits until something has happened since the last time, or since the beginning. Changes come before the end.
    ///
    /// # Errors
    /// The descriptors fail.
    pub fn wait(&mut self) -> io::Result<Happened> {
        let mut fds = [PollFd::new(&self.changes, PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
        while let Err(e) = poll(&mut fds, None) {
            if e != Errno::INTR {
                return Err(e.into());
            }
        }
        if fds[0].revents().is_empty() {
            return Ok(Happened::End);
        }
        // What fits no more is a further change.
        Reader::new(&self.changes, &mut [MaybeUninit::uninit(); 4096]).next()?;
        Ok(Happened::Change)
    }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn changes_are_seen_and_then_the_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (end, to_end) = pipe().unwrap();
        let mut watch = Watch::new(&[file.path()], end).unwrap();
        std::fs::write(file.path(), "x").unwrap();
        drop(to_end);
        let mut happened = vec![watch.wait().unwrap()];
        // Emptied and written may be two.
        while happened.last() == Some(&Happened::Change) {
            happened.push(watch.wait().unwrap());
        }
        assert!((2..=3).contains(&happened.len()), "{happened:?}");
    }
}
