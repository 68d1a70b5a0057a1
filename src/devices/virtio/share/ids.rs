//! Who owns what in the guest.
//!
//! Whatever the guest makes belongs to the user who runs this process: it has no right to give anything away. So the
//! guest sees one owner for what is that user's, whom `uid=N` and `gid=N` choose, and nobody for all else, as in a
//! user name space.

use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

/// Linux's `overflowuid`, "nobody".
const NOBODY: u32 = 65534;

/// What is one of ours, and what the guest sees for it.
#[derive(Clone, Copy, Debug)]
pub struct Id {
    pub host: u32,
    pub guest: u32,
}

impl Id {
    /// What the guest sees for this id of the host's.
    pub fn to_guest(self, host: u32) -> u32 {
        if host == self.host { self.guest } else { NOBODY }
    }

    /// The guest wants this id in place of that of the host's: only what it sees already can be had.
    pub fn change(self, host: u32, wanted: u32) -> Result<(), Errno> {
        if self.to_guest(host) == wanted { Ok(()) } else { Err(Errno::PERM) }
    }
}

/// User and group.
#[derive(Clone, Copy, Debug)]
pub struct Ids {
    pub user: Id,
    pub group: Id,
}

impl Ids {
    /// What this process's user and group are in the guest.
    pub fn new(uid: u32, gid: u32) -> Self {
        let user = Id { host: geteuid().as_raw(), guest: uid };
        Self { user, group: Id { host: getegid().as_raw(), guest: gid } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_theirs_and_all_else_nobodys() {
        let id = Id { host: 1000, guest: 999 };
        assert_eq!((id.to_guest(1000), id.to_guest(0), id.to_guest(999)), (999, NOBODY, NOBODY));
        assert_eq!(id.change(1000, 999), Ok(()));
        for wanted in [0, 1000, NOBODY] {
            assert_eq!(id.change(1000, wanted), Err(Errno::PERM));
        }
    }
}
