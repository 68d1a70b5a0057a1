//! One sample: a run of `microvm run --isolation …` as a process of its own, measured from outside.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::container::Cgroup;

use super::{CompareError, Isolation, Plan};

/// A program that prints more is no benchmark.
const MAX_OUTPUT: u64 = 64 << 20;

/// What one run gave.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Exec of `microvm` to the start of the program, in nanoseconds, as its own timeline has it.
    pub start_ns: Option<u64>,
    /// Exec of `microvm` to its exit, in nanoseconds, as its parent has it.
    pub total_ns: u64,
    /// The most memory that was charged to its control group, in bytes.
    pub memory_bytes: Option<u64>,
    /// What the VM takes, in a run of its own.
    pub vm_memory: Option<VmMemory>,
    /// VM exits.
    pub exits: Option<u64>,
    /// The timeline.
    pub phases: Vec<Phase>,
    /// What the program printed.
    #[serde(skip)]
    pub printed: Printed,
}

/// What a VM has taken of the host's memory when its guest has ended, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct VmMemory {
    /// Guest memory that was touched.
    pub guest_bytes: u64,
    /// microvm's own; of shared pages its share (PSS).
    pub microvm_bytes: u64,
}

impl VmMemory {
    /// Out of schema `microvm.metrics/1`.
    fn of(metrics: &[u8]) -> Option<Self> {
        let metrics: serde_json::Value = serde_json::from_slice(metrics).ok()?;
        let families = metrics["metrics"].as_array()?;
        let value = |name: &str| {
            let family = families.iter().find(|family| family["name"] == name)?;
            family["samples"][0]["value"].as_u64()
        };
        let guest_bytes = value("microvm_memory_touched_bytes")?;
        Some(Self { guest_bytes, microvm_bytes: value("microvm_memory_vmm_bytes")? })
    }
}

/// A program's two streams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Printed {
    /// Standard output.
    pub output: Vec<u8>,
    /// Standard error.
    pub errors: Vec<u8>,
}

/// A phase of the timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name in docs/timeline.md.
    pub name: String,
    /// When it began, in nanoseconds since exec.
    pub start_ns: u64,
    /// How long it took.
    pub duration_ns: u64,
}

/// What is read of schema `microvm.timeline/1`.
#[derive(Deserialize)]
struct Timeline {
    exits: Exits,
    phases: Vec<Phase>,
}

#[derive(Deserialize)]
struct Exits {
    total: Option<u64>,
}

/// How the JSON timeline begins. It is the last line of standard error.
const TIMELINE: &[u8] = br#"{"schema":"microvm.timeline/1""#;

/// Runs the plan's program once; in a VM once more, to see what memory that takes, which costs time.
///
/// # Errors
/// The run failed, in its own words; or it cannot be measured.
pub(super) fn take(plan: &Plan, isolation: Isolation, round: usize) -> Result<Sample, CompareError> {
    let failed = |reason: String| CompareError::Sample { isolation, round, reason };
    let group = plan.measures_memory.then(|| Group::make(isolation, round)).transpose();
    let group = group.map_err(|e| failed(format!("a control group cannot be made: {e}")))?;
    let Checked { time, printed, timeline } =
        checked(plan, isolation, group.as_ref(), None).map_err(failed)?;
    let memory_bytes = group.as_ref().and_then(|group| group.all.peak());
    drop(group);
    let vm_memory = (isolation == Isolation::Vm).then(|| vm_memory(plan, &printed)).transpose();
    let setup = timeline.phases.iter().find(|phase| phase.name == "workload-setup");
    Ok(Sample {
        start_ns: setup.map(|phase| phase.start_ns + phase.duration_ns),
        total_ns: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
        memory_bytes,
        vm_memory: vm_memory.map_err(failed)?,
        exits: timeline.exits.total,
        phases: timeline.phases,
        printed,
    })
}

/// Runs a VM and asks what memory it takes. It must print what it printed before.
fn vm_memory(plan: &Plan, expected: &Printed) -> Result<VmMemory, String> {
    let metrics = memory_file("metrics").map_err(|e| format!("its memory cannot be measured: {e}"))?;
    let printed = checked(plan, Isolation::Vm, None, Some(&metrics))?.printed;
    if printed != *expected {
        return Err("it printed something else when it was run once more, to measure memory".into());
    }
    let metrics = contents(metrics).map_err(|e| e.to_string())?;
    VmMemory::of(&metrics).ok_or_else(|| "it gave no memory figures: is /proc there?".into())
}

/// A run that ended as it should.
struct Checked {
    time: Duration,
    printed: Printed,
    timeline: Timeline,
}

fn checked(
    plan: &Plan,
    isolation: Isolation,
    group: Option<&Group>,
    metrics: Option<&File>,
) -> Result<Checked, String> {
    let run = run(plan, isolation, group, metrics).map_err(|e| format!("it cannot be run: {e}"))?;
    let (printed, timeline) = divide(run.output, run.errors);
    if run.status != Some(0) {
        let status = run.status.map_or("by a signal".into(), |status| format!("with status {status}"));
        let words = String::from_utf8_lossy(&printed.errors).lines().last().map(str::to_owned);
        return Err(format!("it ended {status}: {}", words.unwrap_or_else(|| "it said nothing".into())));
    }
    let timeline = timeline.ok_or("it gave no timeline")?;
    Ok(Checked { time: run.time, printed, timeline })
}

/// Where a sample's memory is charged: all of it, and in it `microvm` itself.
struct Group {
    // Removed first.
    front: Cgroup,
    all: Cgroup,
}

impl Group {
    fn make(isolation: Isolation, round: usize) -> io::Result<Self> {
        let all = Cgroup::make(None, &format!("compare-{round}-{}", isolation.name()))?;
        Ok(Self { front: all.child("microvm")?, all })
    }
}

struct Run {
    status: Option<i32>,
    time: Duration,
    output: Vec<u8>,
    errors: Vec<u8>,
}

fn run(plan: &Plan, isolation: Isolation, group: Option<&Group>, metrics: Option<&File>) -> io::Result<Run> {
    let program = std::env::current_exe()?;
    // Nobody has to read them while the clock runs.
    let (output, errors) = (memory_file("output")?, memory_file("errors")?);
    let mut command = Command::new(program);
    command.args(plan.arguments(isolation));
    if let (Isolation::Container, Some(group)) = (isolation, group) {
        command.arg("--cgroup-parent").arg(PathBuf::from(group.all.name()));
    }
    if let Some(file) = metrics {
        // This process has it open until the other has ended.
        command.arg("--metrics").arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    }
    command.arg(&plan.image).args(&plan.command);
    // What microvm warns of is not the program's.
    command.env("RUST_LOG", "error");
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(errors.try_clone()?);
    let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
    let entrance = group.map(|group| group.front.entrance()).transpose()?;
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            // A comparison that is broken off leaves nothing running.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if let Some(mut entrance) = entrance.as_ref() {
                entrance.write_all(b"0")?;
            }
            // The last thing before exec.
            let now = now().as_nanos().to_le_bytes();
            rustix::io::write(to.as_fd(), &now)?;
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let status = child.wait()?;
    let end = now();
    let mut start = [0; 16];
    File::from(from).read_exact(&mut start)?;
    let start = u64::try_from(u128::from_le_bytes(start)).map_err(io::Error::other)?;
    let time = end.saturating_sub(Duration::from_nanos(start));
    Ok(Run { status: status.code(), time, output: contents(output)?, errors: contents(errors)? })
}

fn now() -> Duration {
    // It does not run below zero.
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

fn memory_file(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

fn contents(mut file: File) -> io::Result<Vec<u8>> {
    if file.metadata()?.len() > MAX_OUTPUT {
        return Err(io::Error::other("it printed more than 64 MiB"));
    }
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The program's own output, and the timeline behind it.
fn divide(output: Vec<u8>, mut errors: Vec<u8>) -> (Printed, Option<Timeline>) {
    let start = errors.windows(TIMELINE.len()).rposition(|window| window == TIMELINE);
    let timeline = start.and_then(|start| {
        let timeline = serde_json::from_slice(&errors[start..]).ok()?;
        errors.truncate(start);
        Some(timeline)
    });
    (Printed { output, errors }, timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_memory_is_found_among_its_metrics() {
        let family = |name, value| {
            format!(
                r#"{{"name":"{name}","type":"gauge","help":"","samples":[{{"labels":{{}},"value":{value}}}]}}"#
            )
        };
        let document = |families: &[String]| format!(r#"{{"metrics":[{}]}}"#, families.join(","));
        let touched = family("microvm_memory_touched_bytes", 7);
        let all =
            document(&[family("microvm_vcpus", 1), touched.clone(), family("microvm_memory_vmm_bytes", 9)]);
        assert_eq!(VmMemory::of(all.as_bytes()), Some(VmMemory { guest_bytes: 7, microvm_bytes: 9 }));
        assert_eq!(VmMemory::of(document(&[touched]).as_bytes()), None);
        assert_eq!(VmMemory::of(b""), None);
    }

    #[test]
    fn the_timeline_is_not_the_programs() {
        let line = br#"{"schema":"microvm.timeline/1","clock":"c","version":"0","total_ns":9,"exits":{"total":3,"kvm":{},"user":{}},"phases":[{"name":"start","start_ns":0,"duration_ns":9,"exits":{}}]}"#;
        let (printed, timeline) = divide(b"out".to_vec(), [b"no end of line", &line[..], b"\n"].concat());
        assert_eq!(printed, Printed { output: b"out".to_vec(), errors: b"no end of line".to_vec() });
        let timeline = timeline.unwrap();
        assert_eq!((timeline.exits.total, timeline.phases.len()), (Some(3), 1));
        let (printed, timeline) = divide(Vec::new(), b"{\"schema\":\"microvm.timeline/1\" broken".to_vec());
        assert!(timeline.is_none() && printed.errors.ends_with(b"broken"));
    }
}
