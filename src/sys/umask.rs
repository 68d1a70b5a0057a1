//! A thread's own umask.

use std::io;

/// Gives the calling thread a umask of its own, and an empty one: what it makes has the permissions that it asks for. Other
/// threads keep theirs, which the kernel has all threads of a process share (`unshare(2)`, `CLONE_FS`).
///
/// # Errors
/// The kernel is out of memory. Nothing has changed then.
pub fn own_umask() -> io::Result<()> {
    // SAFETY: with this flag alone the call touches no memory and no descriptor: the thread gets a copy of its root, its
    // working folder and its umask.
    if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call touches no memory, and the umask is this thread's alone by now.
    unsafe { libc::umask(0) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    use super::*;

    #[test]
    fn other_threads_keep_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let path = dir.path().join(name);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o666).open(path).unwrap();
            file.metadata().unwrap().permissions().mode() & 0o777
        };
        let before = mode("before");
        let inside = std::thread::scope(|scope| {
            scope.spawn(|| own_umask().map(|()| mode("inside")).unwrap()).join().unwrap()
        });
        assert_eq!((inside, mode("after")), (0o666, before));
    }
}
