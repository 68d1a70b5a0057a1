//! A timeline for people and for programs.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::clock::Clock;
use super::exits::Exits;
use super::timeline::{Moment, Phase, Timeline};

/// How a timeline is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimelineFormat {
    /// A table with a bar for each phase.
    Human,
    /// The schema `microvm.timeline/1` of docs/timeline.md.
    Json,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    clock: &'static str,
    version: &'static str,
    total_ns: u128,
    exits: &'a Exits,
    phases: Vec<PhaseRow>,
}

#[derive(Serialize)]
struct PhaseRow {
    name: &'static str,
    start_ns: u128,
    duration_ns: u128,
    exits: Exits,
}

/// Writes the timeline.
///
/// # Errors
/// `out` cannot be written.
pub fn write_timeline(timeline: &Timeline, format: TimelineFormat, out: &mut dyn Write) -> io::Result<()> {
    let moments = timeline.moments();
    match format {
        TimelineFormat::Human => write_human(&moments, out),
        TimelineFormat::Json => write_json(&moments, out),
    }
}

/// Each moment with the one before it.
fn spans(moments: &[Moment]) -> impl Iterator<Item = (Phase, Duration, Duration, Exits)> {
    let mut start = Duration::ZERO;
    let mut before = Exits::default();
    moments.iter().map(move |m| {
        let span = (m.phase, start, m.at.saturating_sub(start), m.exits.since(&before));
        (start, before) = (m.at, m.exits.clone());
        span
    })
}

fn write_json(moments: &[Moment], out: &mut dyn Write) -> io::Result<()> {
    let nothing = Exits::default();
    let document = Document {
        schema: "microvm.timeline/1",
        clock: Clock::NAME,
        version: env!("CARGO_PKG_VERSION"),
        total_ns: moments.last().map_or(0, |m| m.at.as_nanos()),
        exits: moments.last().map_or(&nothing, |m| &m.exits),
        phases: spans(moments)
            .map(|(phase, start, duration, exits)| PhaseRow {
                name: phase.name(),
                start_ns: start.as_nanos(),
                duration_ns: duration.as_nanos(),
                exits,
            })
            .collect(),
    };
    serde_json::to_writer(&mut *out, &document)?;
    writeln!(out)
}

/// Width of the longest bar.
const BAR: u128 = 24;

fn write_human(moments: &[Moment], out: &mut dyn Write) -> io::Result<()> {
    let total = moments.last().map_or(0, |m| m.at.as_nanos()).max(1);
    writeln!(
        out,
        "{:<16} {:>10} {:>10}  {:<24}  {:>9}  exits by reason",
        "phase", "from ms", "ms", "", "VM exits"
    )?;
    for (phase, start, duration, exits) in spans(moments) {
        let bar = "█".repeat(((duration.as_nanos() * BAR).div_ceil(total)) as usize);
        let count = exits.total.map_or_else(|| "?".to_string(), |n| n.to_string());
        writeln!(
            out,
            "{:<16} {:>10.3} {:>10.3}  {bar:<24}  {count:>9}  {}",
            phase.name(),
            start.as_secs_f64() * 1e3,
            duration.as_secs_f64() * 1e3,
            reasons(&exits)
        )?;
    }
    let all = moments.last().and_then(|m| m.exits.total).map_or_else(|| "?".to_string(), |n| n.to_string());
    writeln!(out, "{:<16} {:>10} {:>10.3}  {:<24}  {all:>9}", "total", "", total as f64 / 1e6, "")
}

fn reasons(exits: &Exits) -> String {
    let list = |counts: &std::collections::BTreeMap<&str, u64>| {
        counts.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
    };
    match (exits.kvm.is_empty(), exits.user.is_empty()) {
        (true, true) => String::new(),
        (_, true) => list(&exits.kvm),
        (true, false) => format!("to microvm: {}", list(&exits.user)),
        (false, false) => format!("{}; to microvm: {}", list(&exits.kvm), list(&exits.user)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(phase: Phase, ms: u64, total: u64) -> Moment {
        let exits = Exits { total: Some(total), ..Exits::default() };
        Moment { phase, at: Duration::from_millis(ms), exits }
    }

    #[test]
    fn json_phases_add_up_to_the_total() {
        let moments = [moment(Phase::Start, 1, 0), moment(Phase::FirstRun, 3, 0), moment(Phase::End, 10, 42)];
        let mut out = Vec::new();
        write_json(&moments, &mut out).unwrap();
        let v: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let sum: u64 =
            v["phases"].as_array().unwrap().iter().map(|p| p["duration_ns"].as_u64().unwrap()).sum();
        assert_eq!(v["total_ns"].as_u64(), Some(10_000_000));
        assert_eq!(sum, 10_000_000);
        assert_eq!(v["phases"][2]["exits"]["total"], 42);
    }

    #[test]
    fn an_empty_timeline_can_be_written() {
        for format in [TimelineFormat::Human, TimelineFormat::Json] {
            let timeline = Timeline::new(Clock::start(), true);
            write_timeline(&timeline, format, &mut Vec::new()).unwrap();
        }
    }
}
