//! The comparison as data: JSON of schema `microvm.compare/1`.

use serde::Serialize;

use crate::container::{Isolation, seccomp_profile};

use super::Plan;
use super::host::Fingerprint;
use super::sample::Sample;
use super::stages::{Stage, stages};
use super::stats::{Ratio, Summary};

/// A comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The version of this JSON.
    pub schema: &'static str,
    /// What is measured.
    pub image: String,
    /// The command; empty: the image's own.
    pub command: Vec<String>,
    /// Samples of each isolation, without the warm-up.
    pub runs: usize,
    /// Where.
    pub host: Fingerprint,
    /// Each isolation, in the order of its turns. Ratios are to the first.
    pub series: Vec<Series>,
    /// What the figures lack.
    pub remarks: Vec<String>,
}

/// One isolation.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// Which.
    pub isolation: Isolation,
    /// What was measured, in one order for all.
    pub measures: Vec<Measure>,
    /// Where the time went: medians.
    pub stages: Vec<Stage>,
    /// All samples that count, in order.
    pub samples: Vec<Sample>,
}

/// One figure of an isolation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measure {
    /// Its name.
    pub name: &'static str,
    /// `ms`, `MiB`, or nothing where things are counted.
    pub unit: &'static str,
    /// Absent where a sample lacks it.
    pub summary: Option<Summary>,
    /// To the first isolation; absent for that one itself.
    pub ratio: Option<Ratio>,
}

/// A figure's name, unit, and value in a sample.
type Figure = (&'static str, &'static str, fn(&Sample) -> Option<f64>);

const FIGURES: [Figure; 6] = [
    ("exec to program's start", "ms", |sample| sample.start_ns.map(ms)),
    ("exec to exit", "ms", |sample| Some(ms(sample.total_ns))),
    ("peak memory", "MiB", |sample| sample.memory_bytes.map(mib)),
    ("guest memory touched", "MiB", |sample| Some(mib(sample.vm_memory?.guest_bytes))),
    ("microvm's own memory (PSS)", "MiB", |sample| Some(mib(sample.vm_memory?.microvm_bytes))),
    ("VM exits", "", |sample| sample.exits.map(|exits| exits as f64)),
];

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Report {
    /// Puts the samples together. `samples` has a list for each of the plan's isolations.
    #[must_use]
    pub fn new(plan: &Plan, samples: Vec<Vec<Sample>>, host: Fingerprint) -> Self {
        let values = |samples: &[Sample], figure: &Figure| -> Vec<f64> {
            // Of some samples alone it would be another series.
            samples.iter().map(figure.2).collect::<Option<Vec<_>>>().unwrap_or_default()
        };
        let first = samples.first().map_or(&[][..], Vec::as_slice);
        let base = FIGURES.map(|figure| values(first, &figure));
        let measure = |number: usize, samples: &[Sample], (figure, base): (&Figure, &Vec<f64>)| {
            let own = values(samples, figure);
            Measure {
                name: figure.0,
                unit: figure.1,
                summary: Summary::of(&own),
                ratio: (number > 0).then(|| Ratio::of(&own, base)).flatten(),
            }
        };
        let series =
            plan.isolations.iter().zip(samples).enumerate().map(|(number, (isolation, samples))| Series {
                isolation: *isolation,
                measures: FIGURES.iter().zip(&base).map(|figure| measure(number, &samples, figure)).collect(),
                stages: stages(*isolation, &samples),
                samples,
            });
        let series: Vec<_> = series.collect();
        Self {
            schema: "microvm.compare/1",
            image: plan.image.clone(),
            command: plan.command.clone(),
            runs: plan.runs,
            remarks: remarks(plan, &series, &host),
            host,
            series,
        }
    }

    /// The isolation that ratios are to.
    #[must_use]
    pub fn base(&self) -> &'static str {
        self.series.first().map_or("", |series| series.isolation.name())
    }
}

fn remarks(plan: &Plan, series: &[Series], host: &Fingerprint) -> Vec<String> {
    let lacks = |name: &str| {
        let measures = series.iter().flat_map(|series| &series.measures);
        measures.filter(|measure| measure.name == name).any(|measure| measure.summary.is_none())
    };
    let mut remarks = Vec::new();
    if plan.runs < 10 {
        remarks.push(format!("{} runs are few: the intervals say little (--runs)", plan.runs));
    }
    if host.debug_build {
        remarks.push("microvm itself is a debug build, which is slow: measure a release build".into());
    }
    if !plan.measures_memory {
        remarks.push("no memory figures: they need control groups of version 2 at /sys/fs/cgroup".into());
    } else if lacks(FIGURES[2].0) {
        remarks.push("no memory figures: this kernel's control groups tell no peak (Linux 5.19)".into());
    }
    if lacks(FIGURES[0].0) {
        remarks.push("the program's start was not seen everywhere: on the host that needs fanotify".into());
    }
    if plan.isolations.contains(&Isolation::Container) {
        remarks.push(match seccomp_profile() {
            Some(path) => format!("the container has a seccomp profile, as ordinary ones have: {path}"),
            None => "the container has no seccomp profile, which ordinary ones have: none is installed \
                     (golang-github-containers-common)"
                .into(),
        });
    }
    remarks
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::sample::VmMemory;
    use super::*;
    use std::time::Duration;

    pub fn report() -> Report {
        let plan = Plan {
            image: "alpine".into(),
            command: vec!["echo".into(), "<b>&".into()],
            runs: 4,
            isolations: Isolation::ALL.to_vec(),
            memory: None,
            cpus: None,
            kernel: None,
            timeout: Duration::from_secs(1),
            measures_memory: true,
        };
        let sample = |ms: u64, exits: Option<u64>| Sample {
            start_ns: Some(ms * 500_000),
            total_ns: ms * 1_000_000,
            memory_bytes: Some(ms << 20),
            vm_memory: exits.map(|_| VmMemory { guest_bytes: 30 << 20, microvm_bytes: 2 << 20 }),
            exits,
            phases: Vec::new(),
            printed: Default::default(),
        };
        let samples = [(10, None), (20, None), (80, Some(700))]
            .map(|(ms, exits)| (0..4).map(|n| sample(ms + n, exits)).collect());
        Report::new(&plan, samples.into(), Fingerprint::of_host())
    }

    #[test]
    fn ratios_are_to_the_first() {
        let report = report();
        let [process, container, vm] = report.series.as_slice() else { panic!("three") };
        assert_eq!(report.base(), "process");
        let total = &vm.measures[1];
        assert_eq!(total.summary, Some(Summary { min: 80.0, median: 81.5, p95: 82.85 }));
        let ratio = total.ratio.unwrap();
        assert!(
            (ratio.value - 81.5 / 11.5).abs() < 1e-9 && ratio.low <= ratio.value && ratio.value <= ratio.high
        );
        assert_eq!(process.measures[1].ratio, None);
        assert_eq!(container.measures[2].summary.unwrap().min, 20.0);
        for (index, value) in [(3, 30.0), (4, 2.0), (5, 700.0)] {
            assert_eq!((vm.measures[index].summary.unwrap().median, vm.measures[index].ratio), (value, None));
            assert_eq!(container.measures[index].summary, None);
        }
        assert!(report.remarks.iter().any(|remark| remark.contains("seccomp profile")));
        assert!(
            report.remarks.iter().any(|remark| remark.contains("4 runs are few")),
            "{:?}",
            report.remarks
        );
    }

    #[test]
    fn json_has_the_samples_and_the_host() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["schema"], "microvm.compare/1");
        assert_eq!(json["series"][2]["isolation"], "vm");
        assert_eq!(json["series"][2]["samples"][1]["total_ns"], 81_000_000);
        assert!(json["host"]["tier"].is_string() && json["host"]["checks"].is_array());
    }
}
