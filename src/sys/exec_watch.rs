//! Sees the first program that is started from a file system (fanotify(7)), and holds it until that was taken note of.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Turns readable when a program is about to be started. When it is dropped, the program goes on.
pub struct ExecWatch(File);

impl ExecWatch {
    /// Watches the file system that is mounted at `path`, through whichever mount it is used.
    ///
    /// # Errors
    /// Not root, or a kernel without fanotify's permission events.
    pub fn new(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
        // SAFETY: takes numbers alone.
        let fd = unsafe { libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as u32) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open, new, and owned by nobody else.
        let watch = Self(unsafe { File::from_raw_fd(fd) });
        let what = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: `path` ends with a NUL and lives until the call has returned.
        let failed =
            unsafe { libc::fanotify_mark(fd, what, libc::FAN_OPEN_EXEC_PERM, libc::AT_FDCWD, path.as_ptr()) };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(watch)
    }

    /// Takes a program that was about to start, calls `seen`, and lets it go on. `false`: there was none.
    ///
    /// # Errors
    /// The descriptor fails.
    pub fn take(&mut self, seen: impl FnOnce()) -> io::Result<bool> {
        const LEN: usize = size_of::<libc::fanotify_event_metadata>();
        let mut event = [0; LEN];
        match self.0.read(&mut event) {
            Ok(LEN) => {}
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            _ => return Ok(false),
        }
        seen();
        // struct fanotify_event_metadata: its descriptor is the 32 bits at byte 16.
        let fd = RawFd::from_ne_bytes([event[16], event[17], event[18], event[19]]);
        if fd >= 0 {
            // SAFETY: the kernel has opened it for this event's reader, who closes it.
            let file = unsafe { OwnedFd::from_raw_fd(fd) };
            // struct fanotify_response.
            let answer = [fd.to_ne_bytes(), libc::FAN_ALLOW.to_ne_bytes()].concat();
            self.0.write_all(&answer)?;
            drop(file);
        }
        Ok(true)
    }
}

impl AsFd for ExecWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ExecWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
