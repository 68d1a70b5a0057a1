//! `microvm ps`: this user's VMs.

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use crate::config::Size;
use crate::control::{self, Client, ClientError};

use super::CliError;
use super::table::{self, Format};

const AFTER_HELP: &str =
    "States: running, pausing, paused, stopped; with --all also dead (its process was killed) and \
silent (it does not answer).
VMs with --control PATH or --control none are not listed.

Exit status:
  0  done, also where there is no VM
  1  the folder of the control sockets cannot be read
  2  wrong usage

Examples:
  microvm ps
  microvm ps --all --format json | jq -r '.[] | select(.state == \"dead\") | .name'
  microvm ps -q | xargs -I NAME microvm ctl NAME stop";

/// Flags of `microvm ps`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct PsArgs {
    /// Also show VMs that are dead or do not answer
    #[arg(short, long)]
    all: bool,
    /// Print names alone
    #[arg(short, long)]
    quiet: bool,
    /// How the list is written
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

pub(super) fn run(args: &PsArgs) -> Result<u8, CliError> {
    let mut vms: Vec<Value> = control::names()?.iter().filter_map(|name| look_at(name)).collect();
    if !args.all {
        vms.retain(|vm| vm.get("pid").is_some());
    }
    let mut out = io::stdout().lock();
    match (args.format, args.quiet) {
        (_, true) => vms.iter().try_for_each(|vm| writeln!(out, "{}", text(vm, "name")))?,
        (Format::Json, false) => writeln!(out, "{}", Value::from(vms))?,
        (Format::Table, false) => write_table(&vms, &mut out)?,
    }
    Ok(0)
}

/// What a VM says of itself, or what can be said of one that says nothing. `None`: it has gone meanwhile.
fn look_at(name: &str) -> Option<Value> {
    let answer = Client::connect(name, control::socket_path(name).ok()?)
        .and_then(|vm| vm.ask("GET", "/vm", None, "application/json"));
    match answer {
        Ok(text) => Some(serde_json::from_str(&text).unwrap_or_else(|_| silent(name))),
        Err(ClientError::NoVm(_)) => None,
        Err(ClientError::Dead { .. }) => Some(json!({ "name": name, "state": "dead" })),
        Err(_) => Some(silent(name)),
    }
}

fn silent(name: &str) -> Value {
    json!({ "name": name, "state": "silent" })
}

fn text(vm: &Value, field: &str) -> String {
    match &vm[field] {
        // What a VM says ends on a terminal: no control codes.
        Value::String(text) => text.chars().filter(|c| !c.is_control()).collect(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn write_table(vms: &[Value], out: &mut dyn Write) -> io::Result<()> {
    let row = |vm: &Value| {
        let memory = vm["memory_bytes"].as_u64().map_or("-".into(), |bytes| Size(bytes).to_string());
        let uptime = vm["uptime_seconds"].as_f64().map_or("-".into(), uptime);
        let field = |name| text(vm, name);
        [field("name"), field("pid"), field("state"), field("cpus"), memory, uptime, field("kernel")]
    };
    let head = ["NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME", "KERNEL"].map(String::from);
    table::write(std::iter::once(head).chain(vms.iter().map(row)), out)
}

/// To the second: less is noise in a list.
fn uptime(seconds: f64) -> String {
    humantime::format_duration(std::time::Duration::from_secs(seconds.max(0.0) as u64)).to_string()
}
