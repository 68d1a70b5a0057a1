//! `microvm ps`: this user's VMs and containers.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use crate::config::Size;
use crate::container::{Container, Containers, Isolation, State};
use crate::control::{self, Client, ClientError};

use super::CliError;
use super::table::{self, Format};

const AFTER_HELP: &str =
    "States: running, pausing, paused, stopped; with --all also exited, dead (its process was killed) and \
silent (it does not answer).
VMs with --control PATH or --control none are not listed.

Exit status:
  0  done, also where there is no VM
  1  the folder of the control sockets or of the containers cannot be read
  2  wrong usage

Examples:
  microvm ps
  microvm ps --all --format json | jq -r '.[] | select(.state == \"dead\") | .name'
  microvm ps -q | xargs -I NAME microvm ctl NAME stop";

/// Flags of `microvm ps`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct PsArgs {
    /// Also show containers that have ended, and VMs that are dead or do not answer
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
    let mut vms = all()?;
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

/// VMs, and containers that have none any more.
fn all() -> Result<Vec<Value>, CliError> {
    let containers = Containers::of_user()?.list()?;
    let mut containers: BTreeMap<_, _> = containers.iter().map(|c| (c.record.name.as_str(), c)).collect();
    let mut vms = Vec::new();
    for name in control::names()? {
        let Some(mut vm) = look_at(&name) else { continue };
        let Some(container) = containers.get(name.as_str()) else {
            vms.push(vm);
            continue;
        };
        if container.record.isolation == Isolation::Vm && matches!(container.state(), Ok(State::Running(_))) {
            describe(container, &mut vm);
            vms.push(vm);
            containers.remove(name.as_str());
        } else {
            // The container's VM has left that, or ended just now; else it is another one of this name.
            vms.extend(look_at(&name).filter(|vm| vm["state"] != "dead"));
        }
    }
    vms.extend(
        containers.into_values().filter_map(|container| on_host(container).or_else(|| ended(container))),
    );
    Ok(vms)
}

/// A container that runs on the host's own kernel.
fn on_host(container: &Container) -> Option<Value> {
    let Ok(State::Running(pid)) = container.state() else { return None };
    // One without a number is about to run.
    if container.record.isolation == Isolation::Vm || pid == 0 {
        return None;
    }
    let created = humantime::parse_rfc3339(&container.record.created).ok()?;
    let uptime = created.elapsed().unwrap_or_default().as_secs_f64();
    let mut value = json!({ "name": container.record.name, "state": "running", "pid": pid,
        "uptime_seconds": uptime });
    describe(container, &mut value);
    Some(value)
}

/// A container without a VM. `None`: its VM is about to be there, or it has gone meanwhile.
fn ended(container: &Container) -> Option<Value> {
    let Ok(State::Ended(ended)) = container.state() else { return None };
    let state = if ended.time.is_some() { "exited" } else { "dead" };
    let mut value = json!({ "name": container.record.name, "state": state, "exit_status": ended.status,
        "ended": ended.time });
    describe(container, &mut value);
    Some(value)
}

fn describe(container: &Container, vm: &mut Value) {
    let record = &container.record;
    vm["id"] = record.id.clone().into();
    vm["image"] = record.image.clone().into();
    vm["command"] = record.process.args.join(" ").into();
    vm["created"] = record.created.clone().into();
    vm["ports"] = record.ports.clone().into();
    vm["isolation"] = record.isolation.name().into();
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

/// The longest command in a table; JSON has all of it.
const COMMAND: usize = 40;

fn write_table(vms: &[Value], out: &mut dyn Write) -> io::Result<()> {
    let row = |vm: &Value| {
        let memory = vm["memory_bytes"].as_u64().map_or("-".into(), |bytes| Size(bytes).to_string());
        let uptime = vm["uptime_seconds"].as_f64().map_or("-".into(), uptime);
        let field = |name| text(vm, name);
        let state = match vm["exit_status"].as_u64() {
            Some(status) => format!("{} ({status})", field("state")),
            None => field("state"),
        };
        // What runs: an image's program, or a kernel.
        let mut runs = field(if vm["command"].is_null() { "kernel" } else { "command" });
        if let Some((end, _)) = runs.char_indices().nth(COMMAND) {
            runs.replace_range(end.., "…");
        }
        let isolation = if vm["isolation"].is_null() { "vm".into() } else { field("isolation") };
        [field("name"), field("pid"), isolation, state, field("cpus"), memory, uptime, field("image"), runs]
    };
    let head = ["NAME", "PID", "ISOLATION", "STATE", "CPUS", "MEMORY", "UPTIME", "IMAGE", "COMMAND"]
        .map(String::from);
    table::write(std::iter::once(head).chain(vms.iter().map(row)), out)
}

/// To the second: less is noise in a list.
fn uptime(seconds: f64) -> String {
    humantime::format_duration(std::time::Duration::from_secs(seconds.max(0.0) as u64)).to_string()
}
