//! Counts of VM exits by reason.

use std::collections::BTreeMap;

use serde::Serialize;

/// VM exits by reason: those that KVM handled itself and those that reached this process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exits {
    /// All exits as KVM counts them; absent where the host's KVM has no statistics descriptor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// KVM's own counters by name, without the zero ones.
    pub kvm: BTreeMap<&'static str, u64>,
    /// Exits that came out to this process, by reason, without the zero ones.
    pub user: BTreeMap<&'static str, u64>,
}

impl Exits {
    /// Adds the counts of another vCPU.
    pub fn add(&mut self, other: &Self) {
        self.total = match (self.total, other.total) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
        for (mine, theirs) in [(&mut self.kvm, &other.kvm), (&mut self.user, &other.user)] {
            for (name, n) in theirs {
                *mine.entry(name).or_default() += n;
            }
        }
    }

    /// What has been added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let minus = |now: &BTreeMap<&'static str, u64>, before: &BTreeMap<&'static str, u64>| {
            now.iter()
                .map(|(name, n)| (*name, n.saturating_sub(before.get(name).copied().unwrap_or(0))))
                .filter(|(_, n)| *n != 0)
                .collect()
        };
        Self {
            total: self.total.map(|n| n.saturating_sub(earlier.total.unwrap_or(0))),
            kvm: minus(&self.kvm, &earlier.kvm),
            user: minus(&self.user, &earlier.user),
        }
    }
}

/// Something that counts exits: a vCPU.
pub trait ExitSource: Send + Sync {
    /// The counts so far.
    fn exits(&self) -> Exits;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(total: Option<u64>, io: u64) -> Exits {
        Exits { total, kvm: BTreeMap::from([("io", io)]), user: BTreeMap::new() }
    }

    #[test]
    fn a_difference_leaves_out_what_did_not_change() {
        let since = exits(Some(10), 3).since(&exits(Some(4), 3));
        assert_eq!(since.total, Some(6));
        assert!(since.kvm.is_empty());
    }

    #[test]
    fn vcpus_add_up() {
        let mut sum = Exits::default();
        sum.add(&exits(Some(10), 3));
        sum.add(&exits(Some(1), 1));
        assert_eq!(sum, exits(Some(11), 4));
    }
}
