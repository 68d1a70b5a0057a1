//! All values of a VM at one moment, as Prometheus text and as JSON.
//!
//! The text is the Prometheus exposition format 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>): the series of one metric stand together, under one
//! `# HELP` and one `# TYPE` line.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use serde::Serialize;

use super::registry::{Label, Metric, MetricKind};

/// The name and version of the JSON schema.
const SCHEMA: &str = "microvm.metrics/1";

/// All values at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    families: BTreeMap<&'static str, Family>,
}

/// One metric with its series.
#[derive(Debug)]
struct Family {
    metric: Metric,
    samples: Vec<(Vec<Label>, u64)>,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    version: &'static str,
    metrics: Vec<MetricRow<'a>>,
}

#[derive(Serialize)]
struct MetricRow<'a> {
    name: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    help: &'static str,
    samples: Vec<SampleRow<'a>>,
}

#[derive(Serialize)]
struct SampleRow<'a> {
    labels: BTreeMap<&'static str, &'a str>,
    value: u64,
}

impl Snapshot {
    /// Adds a value of `metric`.
    pub fn add(&mut self, metric: Metric, labels: Vec<Label>, value: u64) {
        let family = self.families.entry(metric.name).or_insert(Family { metric, samples: Vec::new() });
        family.samples.push((labels, value));
    }

    /// The value of one series.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<u64> {
        let same = |have: &[Label]| {
            have.len() == labels.len()
                && labels.iter().all(|l| have.iter().any(|h| (h.0, h.1.as_str()) == *l))
        };
        self.families.get(name)?.samples.iter().find(|(have, _)| same(have)).map(|(_, value)| *value)
    }

    /// The values of all series that have this label, by metric; series that other labels tell apart are added up.
    #[must_use]
    pub fn sums_of(&self, label: &str, value: &str) -> BTreeMap<&'static str, u64> {
        let has = |labels: &[Label]| labels.iter().any(|(name, text)| *name == label && text == value);
        let sum = |family: &Family| {
            let values = family.samples.iter().filter(|(labels, _)| has(labels)).map(|(_, value)| *value);
            values.reduce(u64::saturating_add)
        };
        self.families.iter().filter_map(|(name, family)| Some((*name, sum(family)?))).collect()
    }

    /// The schema `microvm.metrics/1` of docs/control.md, on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut metrics = Vec::new();
        for family in self.families.values() {
            let Metric { name, help, kind } = family.metric;
            let rows = family.samples.iter().map(|(labels, value)| SampleRow {
                labels: labels.iter().map(|(name, value)| (*name, value.as_str())).collect(),
                value: *value,
            });
            metrics.push(MetricRow { name, kind: kind_name(kind), help, samples: rows.collect() });
        }
        let document = Document { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), metrics };
        serde_json::to_string(&document).unwrap_or_default()
    }
}

/// Prometheus text, version 0.0.4.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, family) in &self.families {
            let Metric { help, kind, .. } = family.metric;
            writeln!(f, "# HELP {name} {}", Escaped(help, false))?;
            writeln!(f, "# TYPE {name} {}", kind_name(kind))?;
            for (labels, value) in &family.samples {
                write!(f, "{name}")?;
                for (i, (label, text)) in labels.iter().enumerate() {
                    let before = if i == 0 { '{' } else { ',' };
                    write!(f, "{before}{label}=\"{}\"", Escaped(text, true))?;
                }
                writeln!(f, "{} {value}", if labels.is_empty() { "" } else { "}" })?;
            }
        }
        Ok(())
    }
}

fn kind_name(kind: MetricKind) -> &'static str {
    match kind {
        MetricKind::Counter => "counter",
        MetricKind::Gauge => "gauge",
    }
}

/// Backslash and line feed are escaped everywhere, quotes in label values alone.
struct Escaped<'a>(&'a str, bool);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '\n' => f.write_str("\\n"),
            '"' if self.1 => f.write_str("\\\""),
            c => f.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READS: Metric = Metric::counter("test_reads_total", "Reads, \"done\"\\\n.");
    const SIZE: Metric = Metric::gauge("test_size_bytes", "Size.");

    fn snapshot() -> Snapshot {
        let mut snapshot = Snapshot::default();
        let device = |id: &str| vec![("device", id.to_string()), ("kind", "block".to_string())];
        snapshot.add(READS, device("a\"b\\c\nd"), 3);
        snapshot.add(SIZE, Vec::new(), u64::MAX);
        snapshot.add(READS, device("e"), 4);
        snapshot
    }

    #[test]
    fn text_keeps_a_metric_together_and_escapes() {
        let expected = r##"# HELP test_reads_total Reads, "done"\\\n.
# TYPE test_reads_total counter
test_reads_total{device="a\"b\\c\nd",kind="block"} 3
test_reads_total{device="e",kind="block"} 4
# HELP test_size_bytes Size.
# TYPE test_size_bytes gauge
test_size_bytes 18446744073709551615
"##;
        assert_eq!(snapshot().to_string(), expected);
    }

    #[test]
    fn json_has_the_same_values() {
        let json: serde_json::Value = serde_json::from_str(&snapshot().to_json()).unwrap();
        assert_eq!(json["schema"], "microvm.metrics/1");
        assert_eq!(json["metrics"][0]["type"], "counter");
        assert_eq!(json["metrics"][0]["samples"][0]["labels"]["device"], "a\"b\\c\nd");
        assert_eq!(json["metrics"][0]["samples"][1]["value"], 4);
        assert_eq!(json["metrics"][1]["samples"][0]["value"], u64::MAX);
    }

    #[test]
    fn the_values_of_one_device_are_found_and_its_queues_added_up() {
        let mut snapshot = snapshot();
        let queue = |n: &str| vec![("device", "e".to_string()), ("queue", n.to_string())];
        snapshot.add(READS, queue("0"), 10);
        snapshot.add(READS, queue("1"), 20);
        assert_eq!(snapshot.sums_of("device", "e"), BTreeMap::from([("test_reads_total", 34)]));
        assert!(snapshot.sums_of("device", "none").is_empty());
    }

    #[test]
    fn a_value_is_found_by_all_its_labels_in_any_order() {
        let snapshot = snapshot();
        assert_eq!(snapshot.value("test_reads_total", &[("kind", "block"), ("device", "e")]), Some(4));
        assert_eq!(snapshot.value("test_reads_total", &[("device", "e")]), None);
        assert_eq!(snapshot.value("test_size_bytes", &[]), Some(u64::MAX));
    }
}
