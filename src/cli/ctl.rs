//! `microvm ctl`: asks a running VM through its control socket.

use std::io::{self, Write};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use crate::control::{self, Client, wait_for_end};

use super::{CliError, say};

const AFTER_HELP: &str = "Exit status:
  0  done
  1  there is no such VM, or it refused
  2  wrong usage

Examples:
  microvm ctl web state
  microvm ctl web pause && microvm ctl web resume
  microvm ctl web metrics | grep exits
  microvm ctl web device balloon0 target=256M
  microvm ctl ./vm.sock stop            # a VM with --control ./vm.sock";

/// How long `stop` waits for the VM's process.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Flags of `microvm ctl`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CtlArgs {
    /// The VM's name as `microvm ps` shows it, or the path of its control socket, with a slash in it
    name: String,
    /// How the answer is written
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    format: Format,
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Action {
    /// Tell what the VM is and what it is doing
    #[command(visible_alias = "inspect")]
    State,
    /// Stop all vCPUs and devices, until resume
    Pause,
    /// Let a paused VM go on
    #[command(visible_alias = "unpause")]
    Resume,
    /// End the VM as SIGTERM does, and wait until it has ended; the guest is not asked
    Stop,
    /// Print all counters, as Prometheus text unless --format json
    #[command(visible_alias = "stats")]
    Metrics,
    /// List the devices
    Devices,
    /// Describe one device with its counters, or change what KEY=VALUE says
    Device {
        /// The device's id, as `devices` shows it
        id: String,
        /// What to change, as target=256M: a number, true, false, null, or text
        #[arg(value_name = "KEY=VALUE", value_parser = parse_change)]
        changes: Vec<(String, Value)>,
    },
}

/// What is numbers and words to JSON is that; all else is text, so that nobody has to quote twice.
fn parse_change(text: &str) -> Result<(String, Value), String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) = pair.ok_or("give KEY=VALUE, as target=256M")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((key.into(), value))
}

/// One request: method, path, body.
struct Ask {
    method: &'static str,
    path: String,
    body: Option<Value>,
}

pub(super) fn run(args: &CtlArgs) -> Result<u8, CliError> {
    let ask = request(&args.action)?;
    let vm = Client::connect(&args.name, control::socket_path(&args.name)?)?;
    let process = matches!(args.action, Action::Stop).then(|| vm.process()).flatten();
    let as_text = matches!(args.action, Action::Metrics) && args.format == Format::Text;
    let accept = if as_text { "text/plain" } else { "application/json" };
    let answer = vm.ask(ask.method, &ask.path, ask.body.as_ref(), accept)?;
    if process.is_some_and(|process| !wait_for_end(&process, STOP_LIMIT)) {
        say(&format!("VM {} has stopped, but its process is still there", args.name));
        return Ok(1);
    }
    let mut out = io::stdout().lock();
    match serde_json::from_str(&answer) {
        Ok(value) if args.format == Format::Text && !as_text => write_text(&value, &mut out)?,
        _ => out.write_all(answer.as_bytes())?,
    }
    Ok(0)
}

fn request(action: &Action) -> Result<Ask, CliError> {
    let get = |path: &str| Ask { method: "GET", path: path.into(), body: None };
    let state = |state| {
        let body = Some(json!({ "state": state }));
        Ask { method: "PUT", path: "/vm/state".into(), body }
    };
    Ok(match action {
        Action::State => get("/vm"),
        Action::Pause => state("paused"),
        Action::Resume => state("running"),
        Action::Stop => state("stopped"),
        Action::Metrics => get("/metrics"),
        Action::Devices => get("/devices"),
        Action::Device { id, .. } if !is_id(id) => {
            return Err(CliError::Usage(format!(
                "{id:?} is no device's id: microvm ctl NAME devices lists them"
            )));
        }
        Action::Device { id, changes } if changes.is_empty() => get(&format!("/devices/{id}")),
        Action::Device { id, changes } => {
            let body = Some(Value::Object(Map::from_iter(changes.iter().cloned())));
            Ask { method: "PUT", path: format!("/devices/{id}"), body }
        }
    })
}

/// What can stand in a path as it is.
fn is_id(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

/// A line for each value: `name  value`, with dots between names; a list has a line for each object in it.
fn write_text(value: &Value, out: &mut dyn Write) -> io::Result<()> {
    let mut rows = Vec::new();
    flatten("", value, &mut rows);
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().try_for_each(|(name, value)| writeln!(out, "{name:<width$}  {value}"))
}

fn flatten(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                flatten(&name, value, rows);
            }
        }
        // The devices: their id says more than their place in the list.
        Value::Array(items) => {
            for item in items {
                match (item["id"].as_str(), item["kind"].as_str()) {
                    (Some(id), Some(kind)) => rows.push((id.into(), kind.into())),
                    _ => rows.push((name.into(), item.to_string())),
                }
            }
        }
        Value::String(text) => {
            rows.push((name.into(), text.chars().filter(|c| !c.is_control()).collect()));
        }
        other => rows.push((name.into(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_json_where_it_is_and_text_elsewhere() {
        assert_eq!(parse_change("target=256M").unwrap(), ("target".into(), json!("256M")));
        assert_eq!(parse_change("target=5").unwrap(), ("target".into(), json!(5)));
        assert_eq!(parse_change("on=true").unwrap().1, json!(true));
        assert_eq!(parse_change("a=b=c").unwrap(), ("a".into(), json!("b=c")));
        assert_eq!(parse_change("a=").unwrap().1, json!(""));
        assert!(parse_change("target").is_err() && parse_change("=5").is_err());
    }

    #[test]
    fn text_has_a_line_for_each_value() {
        let mut out = Vec::new();
        let value = json!({ "id": "com1", "state": { "unwritten_bytes": 0, "text": "a\u{1b}[31m" } });
        write_text(&value, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "id                     com1\nstate.text             a[31m\nstate.unwritten_bytes  0\n"
        );
    }
}
