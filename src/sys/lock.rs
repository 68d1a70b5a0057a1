//! Whether a file is somebody's own.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Whether somebody has a lock on a file (`flock(2)`), as each VM has on the images of its disks. To be asked before a
/// file is emptied that a user has named.
#[must_use]
pub fn is_locked(file: &File) -> bool {
    let taken = flock(file, FlockOperation::NonBlockingLockExclusive);
    if taken.is_ok() {
        // Only asked for.
        let _ = flock(file, FlockOperation::Unlock);
    }
    taken == Err(Errno::WOULDBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_seen_and_none_is_left() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (one, other) = (named.reopen().unwrap(), named.reopen().unwrap());
        assert!(!is_locked(&one) && !is_locked(&other));
        flock(&one, FlockOperation::LockShared).unwrap();
        assert!(is_locked(&other));
        drop(one);
        assert!(!is_locked(&other));
    }
}
