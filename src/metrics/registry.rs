//! The counters of a running VM: registered while it is built, counted by whoever does the work, read by anyone.
//!
//! Counting takes no lock: a device holds its [`Counter`]s and adds to them. The registry is locked only while a
//! counter is registered and while all are read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::snapshot::Snapshot;

/// Whether a value only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows, from 0 at the VM's start. By convention the name ends in `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// What is counted: a name, what it means, and whether it only grows. Make it a `const`, so that a bad name does not
/// compile.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: MetricKind,
}

impl Metric {
    /// A value that only grows.
    ///
    /// # Panics
    /// `name` is none that Prometheus takes: in a `const`, at compile time.
    #[must_use]
    pub const fn counter(name: &'static str, help: &'static str) -> Self {
        check_name(name);
        Self { name, help, kind: MetricKind::Counter }
    }

    /// A value that goes up and down.
    ///
    /// # Panics
    /// As [`Metric::counter`].
    #[must_use]
    pub const fn gauge(name: &'static str, help: &'static str) -> Self {
        check_name(name);
        Self { name, help, kind: MetricKind::Gauge }
    }
}

/// `[a-zA-Z_][a-zA-Z0-9_]*`, as the Prometheus data model asks; its colon is for rules, not for programs.
const fn check_name(name: &str) {
    let bytes = name.as_bytes();
    assert!(!bytes.is_empty() && !bytes[0].is_ascii_digit(), "a metric's name starts with a letter");
    let mut at = 0;
    while at < bytes.len() {
        assert!(bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_', "letters, digits and _ alone");
        at += 1;
    }
}

/// Tells the series of one metric apart, as in `device="disk0"`.
pub type Label = (&'static str, String);

/// A number that only grows. Copies count together.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Counts one more.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        // Nothing is decided by a counter, so nothing needs to be ordered with it.
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down. Copies are the same number.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicU64>);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// What it is.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Values that are not counted here but worked out when they are asked for.
pub trait Source: Send + Sync {
    /// Adds them to `snapshot`. The registry is locked meanwhile: nothing may be registered here.
    fn collect(&self, snapshot: &mut Snapshot);
}

/// All the counters of one VM. Cheap to share.
#[derive(Default)]
pub struct Registry {
    full: bool,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    series: Vec<Series>,
    sources: Vec<Arc<dyn Source>>,
}

struct Series {
    metric: Metric,
    labels: Vec<Label>,
    value: Arc<AtomicU64>,
}

impl Registry {
    /// An empty registry. `full`: the values are wanted at the end ([`Registry::finish`]), those that cost a VM's start
    /// something to count, too.
    #[must_use]
    pub fn new(full: bool) -> Self {
        Self { full, inner: Mutex::default() }
    }

    /// Whether to count what costs something to count: KVM's own counters take a descriptor for each vCPU.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Counters that share `labels`: those of one device.
    #[must_use]
    pub fn group(&self, labels: &[(&'static str, &str)]) -> Group<'_> {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_string())).collect();
        Group { registry: self, labels }
    }

    /// From now on `source` is asked whenever all values are read.
    pub fn add_source(&self, source: Arc<dyn Source>) {
        self.lock().sources.push(source);
    }

    /// All values as they are now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        let mut snapshot = Snapshot::default();
        for s in &inner.series {
            snapshot.add(s.metric, s.labels.clone(), s.value.load(Ordering::Relaxed));
        }
        inner.sources.iter().for_each(|s| s.collect(&mut snapshot));
        snapshot
    }

    /// The last snapshot, where the registry is full: else nobody has asked for one. Sources are let go, because closing
    /// what they look at must not wait for the registry.
    #[must_use]
    pub fn finish(&self) -> Option<Snapshot> {
        let snapshot = self.full.then(|| self.snapshot());
        self.lock().sources.clear();
        snapshot
    }

    /// A series that is there already is shared, so that no series is ever written twice.
    fn series(&self, metric: Metric, labels: &[Label]) -> Arc<AtomicU64> {
        let mut inner = self.lock();
        let there = inner.series.iter().find(|s| s.metric.name == metric.name && s.labels == labels);
        if let Some(there) = there {
            return there.value.clone();
        }
        let value = Arc::<AtomicU64>::default();
        inner.series.push(Series { metric, labels: labels.to_vec(), value: value.clone() });
        value
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counters of one device, or of one part of the VM.
pub struct Group<'a> {
    registry: &'a Registry,
    labels: Vec<Label>,
}

impl Group<'_> {
    /// Registers a counter of this group. It starts at 0 and is shown from now on.
    #[must_use]
    pub fn counter(&self, metric: Metric) -> Counter {
        debug_assert_eq!(metric.kind, MetricKind::Counter);
        Counter(self.registry.series(metric, &self.labels))
    }

    /// Registers a gauge of this group. It starts at 0 and is shown from now on.
    #[must_use]
    pub fn gauge(&self, metric: Metric) -> Gauge {
        debug_assert_eq!(metric.kind, MetricKind::Gauge);
        Gauge(self.registry.series(metric, &self.labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READS: Metric = Metric::counter("test_reads_total", "Reads.");
    const SIZE: Metric = Metric::gauge("test_size_bytes", "Size.");

    #[test]
    fn copies_of_a_counter_count_together() {
        let registry = Registry::default();
        let reads = registry.group(&[("device", "disk0")]).counter(READS);
        let copy = reads.clone();
        std::thread::spawn(move || copy.add(2)).join().unwrap();
        reads.increment();
        assert_eq!(registry.snapshot().value("test_reads_total", &[("device", "disk0")]), Some(3));
    }

    #[test]
    fn groups_count_apart_and_the_same_group_together() {
        let registry = Registry::default();
        let count = |device| registry.group(&[("device", device)]).counter(READS);
        count("a").add(1);
        count("b").add(10);
        count("a").add(1);
        let snapshot = registry.snapshot();
        assert_eq!(snapshot.value("test_reads_total", &[("device", "a")]), Some(2));
        assert_eq!(snapshot.value("test_reads_total", &[("device", "b")]), Some(10));
        assert_eq!(snapshot.value("test_reads_total", &[]), None);
    }

    #[test]
    fn sources_are_let_go_at_the_end() {
        struct Size;
        impl Source for Size {
            fn collect(&self, snapshot: &mut Snapshot) {
                snapshot.add(SIZE, Vec::new(), 7);
            }
        }
        let registry = Registry::new(true);
        let source = Arc::new(Size);
        registry.add_source(source.clone());
        assert_eq!(registry.finish().unwrap().value("test_size_bytes", &[]), Some(7));
        assert_eq!(Arc::strong_count(&source), 1);
        assert_eq!(registry.snapshot().value("test_size_bytes", &[]), None);
    }

    #[test]
    fn bad_names_are_refused() {
        for name in ["", "1reads", "reads-total", "reads total", "réads"] {
            assert!(std::panic::catch_unwind(|| Metric::counter(name, "")).is_err(), "{name}");
        }
    }
}
