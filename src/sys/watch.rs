//! Waiting for files to change, with inotify(7).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};

/// Files that are watched.
pub struct Watch(OwnedFd);

impl Watch {
    /// Watches files for writes, and for their writers' closing them.
    ///
    /// # Errors
    /// One is not there, or the user watches too many.
    pub fn of(paths: &[impl AsRef<Path>]) -> io::Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC)?;
        let flags = WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE;
        for path in paths {
            inotify::add_watch(&watch, path.as_ref(), flags)?;
        }
        Ok(Self(watch))
    }

    /// Waits until something has changed since the last time, or since the beginning.
    ///
    /// # Errors
    /// The descriptor fails.
    pub fn wait(&mut self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        loop {
            // More than fits is a further change.
            match Reader::new(&self.0, &mut buffer).next() {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other.map(drop)?),
            }
        }
    }
}
