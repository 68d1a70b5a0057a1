//! How much of the host a guest may hold through its shares.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most files that a guest may know of one share. Each costs a descriptor here, and about 1 KiB of the host's kernel.
const MAX_INODES: usize = 128 << 10;
/// The most that it may have open.
const MAX_HANDLES: usize = 16 << 10;
/// What the rest of a large VM has open, its socket device among it, and some to spare.
const OTHERS: usize = 4096;
/// With fewer, ordinary work in a tree of source code fails.
const FEW: usize = 8192;

/// What one share may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files that the guest knows.
    pub inodes: usize,
    /// Files that it has open.
    pub handles: usize,
}

impl Limits {
    /// Of each of `shares`. Raises this process's limit of descriptors as far as the user may: most systems begin with
    /// 1,024 and allow 524,288 and more.
    #[must_use]
    pub fn of(shares: usize) -> Self {
        let limit = getrlimit(Resource::Nofile);
        let wanted = (OTHERS + shares * (MAX_INODES + MAX_HANDLES)) as u64;
        let mut has = limit.current;
        if has.is_some_and(|has| has < wanted) {
            let current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
            match setrlimit(Resource::Nofile, Rlimit { current, ..limit }) {
                Ok(()) => has = current,
                Err(e) => log::debug!("the limit of descriptors stays as it is: {e}"),
            }
        }
        let limits = Self::within(has, shares);
        if shares > 0 && limits.inodes < FEW {
            log::warn!(
                "--share: the guest can use {} files at a time, and gets \"Too many open files\" beyond: raise the hard \
                 limit of descriptors (ulimit -Hn)",
                limits.inodes
            );
        }
        limits
    }

    /// What a process with so many descriptors has for each share.
    fn within(descriptors: Option<u64>, shares: usize) -> Self {
        let all = descriptors.map_or(usize::MAX, |all| usize::try_from(all).unwrap_or(usize::MAX));
        let own = (all - OTHERS.min(all / 2)) / shares.max(1);
        Self { inodes: MAX_INODES.min(own / 8 * 7), handles: MAX_HANDLES.min(own / 8) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_share_takes_what_others_need() {
        assert_eq!(Limits::within(None, 8), Limits { inodes: MAX_INODES, handles: MAX_HANDLES });
        for (descriptors, shares) in [(1024, 1), (1024, 8), (4096, 2), (524_288, 8), (0, 1)] {
            let each = Limits::within(Some(descriptors), shares);
            let all = shares * (each.inodes + each.handles);
            assert!(all as u64 <= descriptors - (OTHERS as u64).min(descriptors / 2), "{each:?}");
        }
        assert_eq!(Limits::within(Some(1024), 1), Limits { inodes: 448, handles: 64 });
    }
}
