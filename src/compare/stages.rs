//! A machine's start in the stages that people learn: which this program goes through, and which it leaves out.

use serde::Serialize;

use crate::container::Isolation;

use super::sample::{Phase, Sample};
use super::stats::median;

/// A stage. The sum of all is the time from exec to exit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// Median of its duration in milliseconds; absent where there is no such stage.
    pub ms: Option<f64>,
    /// What it is here, or why it is not.
    pub what: &'static str,
}

/// A stage of each isolation: its name, the phases of the timeline that it is made of, and what it is.
type Row = (&'static str, &'static [&'static str], &'static str);

const SET_UP: &[&str] =
    &["start", "open-kvm", "memory", "kernel-mapped", "vm-made", "tables", "vcpus-made", "first-run"];
const END: &[&str] = &["guest-end", "teardown"];

const VM: [Row; 9] = [
    ("microvm", SET_UP, "flags, image, VM and devices made, the process confined"),
    ("firmware", &[], "skipped: microvm starts the kernel itself"),
    ("boot record", &[], "skipped: no disk is booted from"),
    ("boot loader", &[], "skipped: the kernel is in memory already"),
    ("kernel", &["guest-kernel"], "first instruction to process 1"),
    ("init", &["guest-init"], "microvm-init mounts the layers and sets the guest up"),
    ("process", &["workload-setup"], "the host is connected, the program is started"),
    ("app", &["workload"], "the program"),
    ("end", END, "the guest's end, and microvm's"),
];

const CONTAINER: [Row; 9] = on_host(
    "layers mounted, the runtime makes name spaces and starts the program",
    "the program, and the runtime's end",
);

const PROCESS: [Row; 9] = on_host("layers mounted, chroot, the program is started", "the program");

/// The stages where the host's kernel runs the program: what makes its process, and what it is.
const fn on_host(process: &'static str, app: &'static str) -> [Row; 9] {
    [
        ("microvm", &["start"], "flags, image"),
        ("firmware", &[], "none: the host runs"),
        ("boot record", &[], "none: the host runs"),
        ("boot loader", &[], "none: the host runs"),
        ("kernel", &[], "none: the host's"),
        ("init", &[], "none"),
        ("process", &["workload-setup"], process),
        ("app", &["workload"], app),
        ("end", END, "unmounting, and microvm's end"),
    ]
}

/// The stages of a series: of each the median.
#[must_use]
pub fn stages(isolation: Isolation, samples: &[Sample]) -> Vec<Stage> {
    let rows = match isolation {
        Isolation::Vm => VM,
        Isolation::Container => CONTAINER,
        Isolation::Process => PROCESS,
    };
    let stage = |(name, phases, what): Row| {
        let times: Vec<_> = samples.iter().filter_map(|sample| time(sample, name, phases)).collect();
        Stage { name, ms: median(&times), what }
    };
    rows.map(stage).into()
}

/// Milliseconds of the phases in a sample, if it has any of them. What is behind the timeline's last moment is the end's.
fn time(sample: &Sample, name: &str, phases: &[&str]) -> Option<f64> {
    let of_stage = |phase: &&Phase| phases.contains(&phase.name.as_str());
    let mut found = sample.phases.iter().filter(of_stage).peekable();
    found.peek()?;
    let mut ns: u64 = found.map(|phase| phase.duration_ns).sum();
    if name == "end" {
        let told = sample.phases.last().map_or(0, |phase| phase.start_ns + phase.duration_ns);
        ns += sample.total_ns.saturating_sub(told);
    }
    Some(ns as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(phases: &[(&str, u64)], total_ms: u64) -> Sample {
        let mut start_ns = 0;
        let phases = phases.iter().map(|(name, ms)| {
            let phase = Phase { name: (*name).into(), start_ns, duration_ns: ms * 1_000_000 };
            start_ns += phase.duration_ns;
            phase
        });
        Sample {
            phases: phases.collect(),
            start_ns: None,
            total_ns: total_ms * 1_000_000,
            memory_bytes: None,
            vm_memory: None,
            exits: None,
            printed: Default::default(),
        }
    }

    #[test]
    fn stages_add_up_to_the_whole() {
        let phases = [
            ("start", 1),
            ("open-kvm", 2),
            ("first-run", 3),
            ("guest-kernel", 40),
            ("guest-init", 5),
            ("workload-setup", 6),
            ("workload", 7),
            ("guest-end", 8),
            ("teardown", 1),
        ];
        let stages = stages(Isolation::Vm, &[sample(&phases, 80)]);
        let find = |name: &str| stages.iter().find(|stage| stage.name == name).unwrap();
        assert_eq!((find("microvm").ms, find("kernel").ms), (Some(6.0), Some(40.0)));
        assert_eq!(find("end").ms, Some(16.0), "with 7 ms behind the timeline");
        assert_eq!(stages.iter().filter_map(|stage| stage.ms).sum::<f64>(), 80.0);
        let skipped: Vec<_> = stages.iter().filter(|s| s.ms.is_none()).map(|s| s.name).collect();
        assert_eq!(skipped, ["firmware", "boot record", "boot loader"]);
        assert!(find("firmware").what.contains("skipped"));
    }

    #[test]
    fn every_phase_is_of_one_stage() {
        let all = [SET_UP, &["guest-kernel", "guest-init", "workload-setup", "workload"], END].concat();
        for phase in all {
            assert_eq!(VM.iter().filter(|(_, phases, _)| phases.contains(&phase)).count(), 1, "{phase}");
        }
    }
}
