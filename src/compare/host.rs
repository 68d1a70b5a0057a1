//! Which host the figures are of.

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::doctor::{Check, examine};
use crate::vm::host::Tier;

/// What a figure depends on.
#[derive(Clone, Debug, Serialize)]
pub struct Fingerprint {
    /// How guests run.
    pub tier: String,
    /// The processor's name.
    pub processor: String,
    /// How many of them there are.
    pub processors: usize,
    /// In bytes.
    pub memory_bytes: u64,
    /// The kernel's release.
    pub kernel: String,
    /// This program's version.
    pub microvm: &'static str,
    /// Built with debug assertions, so slow.
    pub debug_build: bool,
    /// What `microvm doctor` finds.
    pub checks: Vec<Check>,
}

impl Fingerprint {
    /// Looks at this host.
    #[must_use]
    pub fn of_host() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            tier: Tier::of_cpu().to_string(),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib(&field(&read("/proc/meminfo"), "MemTotal")),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            microvm: env!("CARGO_PKG_VERSION"),
            debug_build: cfg!(debug_assertions),
            checks: examine(Path::new("/dev/kvm")).checks,
        }
    }

    /// One line of it.
    #[must_use]
    pub fn line(&self) -> String {
        let gib = self.memory_bytes as f64 / (1u64 << 30) as f64;
        let build = if self.debug_build { ", debug build" } else { "" };
        format!(
            "{}; {} processors, {gib:.1} GiB; Linux {}; virtualization: {}; microvm {}{build}",
            self.processor, self.processors, self.kernel, self.tier, self.microvm
        )
    }
}

/// The value of the first line `NAME : VALUE`.
fn field(text: &str, name: &str) -> String {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    let mut values = fields.filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_string());
    values.next().unwrap_or_default()
}

/// `N kB` in bytes.
fn kib(text: &str) -> u64 {
    text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).map_or(0, |n| n << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let text = "processor\t: 0\nmodel name\t: A: B\nMemTotal:       2048 kB\n";
        assert_eq!(field(text, "model name"), "A: B");
        assert_eq!(kib(&field(text, "MemTotal")), 2 << 20);
        assert_eq!((field(text, "none"), kib("")), (String::new(), 0));
    }
}
