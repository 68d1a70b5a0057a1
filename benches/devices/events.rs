//! What happens during a job (`--events`): where the instructions went, which exits, which system calls. Writing the
//! trace costs instructions itself, so that these figures tell shares, and the table's are taken without it.

use std::collections::BTreeMap;
use std::fs;

use crate::Result;

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 4] = ["kvm/kvm_entry", "kvm/kvm_exit", "raw_syscalls/sys_enter", "sched/sched_switch"];
/// Below the memory of the emulated host, and above what a job of `--quick` writes.
const BUFFER_KIB: &str = "131072";

/// A trace that is being written.
pub struct Trace(());

impl Trace {
    /// Begins one.
    pub fn start() -> Result<Self> {
        set("buffer_size_kb", BUFFER_KIB)?;
        set("trace_clock", "mono")?;
        set("trace", "")?;
        for event in EVENTS {
            set(&format!("events/{event}/enable"), "1")?;
        }
        set("tracing_on", "1")?;
        Ok(Self(()))
    }

    /// Ends it, and tells what was in it, per operation.
    pub fn tell(self, operations: usize) -> Result<()> {
        drop(self);
        let mut seen = Seen::default();
        fs::read_to_string(format!("{TRACING}/trace"))?.lines().for_each(|line| seen.line(line));
        seen.tell(operations as f64);
        Ok(())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = set("tracing_on", "0");
        for event in EVENTS {
            let _ = set(&format!("events/{event}/enable"), "0");
        }
    }
}

fn set(file: &str, value: &str) -> Result<()> {
    Ok(fs::write(format!("{TRACING}/{file}"), value)?)
}

#[derive(Default)]
struct Seen {
    /// By what happened.
    counts: BTreeMap<String, u64>,
    /// Microseconds, which are thousand instructions, by who ran.
    times: BTreeMap<String, f64>,
    /// Who runs, and since when.
    running: Option<(String, f64)>,
}

impl Seen {
    /// One line of the trace: `TASK-PID [CPU] FLAGS SECONDS: EVENT: WORDS`.
    fn line(&mut self, line: &str) {
        let Some((head, rest)) = line.split_once(": ").filter(|_| !line.starts_with('#')) else { return };
        let Some((event, words)) = rest.split_once(": ").or(rest.split_once(' ')) else { return };
        let task = head.split_once(" [").map_or("", |(task, _)| task.trim());
        let name = task.rsplit_once('-').map_or(task, |(name, _)| name);
        let time = head.rsplit(' ').next().and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0) * 1e6;
        let word = |key: &str| words.split_once(key).and_then(|(_, rest)| rest.split_whitespace().next());
        match event.trim_end_matches(':') {
            "kvm_entry" => self.run("(guest)", time),
            "kvm_exit" => {
                self.run(name, time);
                self.count(format!("exit {}", word("reason ").unwrap_or("?")));
            }
            "sys_enter" => {
                self.count(format!("{name}: system call {}", word("NR ").unwrap_or("?")));
            }
            "sched_switch" => {
                let next = words.split_once("next_comm=").and_then(|(_, r)| r.split_once(" next_pid="));
                let next = next.map_or("?", |(name, _)| name).to_owned();
                self.count(format!("switch to {next}"));
                self.run(&next, time);
            }
            _ => {}
        }
    }

    fn count(&mut self, what: String) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn run(&mut self, next: &str, time: f64) {
        if let Some((who, since)) = self.running.replace((next.into(), time)) {
            *self.times.entry(who).or_default() += time - since;
        }
    }

    fn tell(&self, operations: f64) {
        for (who, time) in self.times.iter().filter(|(_, t)| **t >= 0.1 * operations) {
            println!("    {:>9.1} thousand instructions: {who}", time / operations);
        }
        for (what, count) in self.counts.iter().filter(|(_, n)| **n as f64 >= 0.02 * operations) {
            println!("    {:>9.3} {what}", *count as f64 / operations);
        }
    }
}
