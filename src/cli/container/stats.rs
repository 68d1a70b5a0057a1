//! `microvm stats`: what running VMs use of the host.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use crate::config::Size;
use crate::container::{Container, ContainerError, Containers, Isolation, Record};
use crate::control::{self, Client};

use super::super::CliError;
use super::super::table::{self, Format};

const AFTER_HELP: &str = "CPU is the share of one processor since the last line, or since the VM's start at first; MEM what the VM's process has in
memory, guest memory included, of what the guest may have. NET and DISK are bytes in and out since the start.

Exit status:
  0  done
  1  a VM is not there
  2  wrong usage

Examples:
  microvm stats
  microvm stats --no-stream --format json web";

/// Flags of `microvm stats`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct StatsArgs {
    /// Once, not again and again
    #[arg(long)]
    no_stream: bool,
    /// How the list is written
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// VMs or containers by name [default: all that run]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// As Docker.
const PERIOD: Duration = Duration::from_secs(1);

pub fn run(args: &StatsArgs) -> Result<u8, CliError> {
    let mut before: Vec<Sample> = Vec::new();
    let once = args.no_stream || !io::stdout().is_terminal();
    loop {
        let samples = samples(&args.names)?;
        let mut out = io::stdout().lock();
        if !once {
            // To the upper left, and away with what was there.
            write!(out, "\x1b[H\x1b[J")?;
        }
        let rows = samples.iter().map(|now| now.describe(before.iter().find(|b| b.name == now.name)));
        match args.format {
            Format::Json => writeln!(out, "{}", Value::from(rows.collect::<Vec<_>>()))?,
            Format::Table => write_table(rows, &mut out)?,
        }
        if once {
            return Ok(0);
        }
        out.flush()?;
        before = samples;
        thread::sleep(PERIOD);
    }
}

struct Sample {
    name: String,
    taken: Instant,
    /// Of the process, user and system.
    cpu: Duration,
    uptime: Duration,
    resident: u64,
    memory: u64,
    net: [u64; 2],
    disk: [u64; 2],
}

fn samples(names: &[String]) -> Result<Vec<Sample>, CliError> {
    if names.is_empty() {
        // Those that do not answer are not running.
        return Ok(control::names()?.iter().filter_map(|name| sample(name).ok()).collect());
    }
    let containers = Containers::of_user()?;
    let in_vm = |name: &String| match containers.find(name) {
        Ok(Container { record: Record { name, isolation, .. }, .. }) if isolation != Isolation::Vm => {
            Err(ContainerError::OnHost { name, isolation }.into())
        }
        _ => sample(name),
    };
    names.iter().map(in_vm).collect()
}

fn sample(name: &str) -> Result<Sample, CliError> {
    let ask = |path| {
        let vm = Client::connect(name, control::socket_path(name)?)?;
        let text = vm.ask("GET", path, None, "application/json")?;
        Ok::<Value, CliError>(serde_json::from_str(&text).unwrap_or_default())
    };
    let (vm, metrics) = (ask("/vm")?, ask("/metrics")?);
    let families = metrics["metrics"].as_array().map(Vec::as_slice).unwrap_or_default();
    let sum = |metric: &str| {
        let samples = families.iter().filter(|family| family["name"] == metric);
        let samples = samples.flat_map(|family| family["samples"].as_array().into_iter().flatten());
        samples.filter_map(|sample| sample["value"].as_u64()).sum()
    };
    let (cpu, resident) = process(vm["pid"].as_u64().unwrap_or(0)).unwrap_or_default();
    Ok(Sample {
        name: name.into(),
        taken: Instant::now(),
        cpu,
        uptime: Duration::from_secs_f64(vm["uptime_seconds"].as_f64().unwrap_or(0.0).max(0.0)),
        resident,
        memory: vm["memory_bytes"].as_u64().unwrap_or(0),
        net: [sum("microvm_net_rx_bytes_total"), sum("microvm_net_tx_bytes_total")],
        disk: [sum("microvm_disk_read_bytes_total"), sum("microvm_disk_written_bytes_total")],
    })
}

/// Processor time and resident bytes of a process (proc_pid_stat(5)).
fn process(pid: u64) -> Option<(Duration, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let ticks = number(11)? + number(12)?;
    let cpu = Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64);
    Some((cpu, number(21)? * rustix::param::page_size() as u64))
}

impl Sample {
    fn describe(&self, before: Option<&Self>) -> Value {
        let (cpu, time) = match before {
            Some(before) => (self.cpu.saturating_sub(before.cpu), self.taken - before.taken),
            None => (self.cpu, self.uptime),
        };
        let percent = 100.0 * cpu.as_secs_f64() / time.as_secs_f64().max(0.001);
        json!({
            "name": self.name,
            "cpu_percent": (percent * 100.0).round() / 100.0,
            "resident_bytes": self.resident,
            "memory_bytes": self.memory,
            "net_received_bytes": self.net[0],
            "net_sent_bytes": self.net[1],
            "disk_read_bytes": self.disk[0],
            "disk_written_bytes": self.disk[1],
        })
    }
}

fn write_table(rows: impl Iterator<Item = Value>, out: &mut dyn Write) -> io::Result<()> {
    let row = |vm: Value| {
        let bytes = |field: &str| Size(vm[field].as_u64().unwrap_or(0)).to_string();
        [
            vm["name"].as_str().unwrap_or("-").into(),
            format!("{:.2}%", vm["cpu_percent"].as_f64().unwrap_or(0.0)),
            format!("{} / {}", bytes("resident_bytes"), bytes("memory_bytes")),
            format!("{} / {}", bytes("net_received_bytes"), bytes("net_sent_bytes")),
            format!("{} / {}", bytes("disk_read_bytes"), bytes("disk_written_bytes")),
        ]
    };
    let head = ["NAME", "CPU", "MEM", "NET", "DISK"].map(String::from);
    table::write(std::iter::once(head).chain(rows.map(row)), out)
}
