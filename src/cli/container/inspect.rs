//! `microvm inspect`: all that is known of containers.

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use crate::container::{Container, Containers, State};

use super::super::CliError;

const AFTER_HELP: &str = "Exit status:
  0  done
  1  one is not there
  2  wrong usage

Examples:
  microvm inspect web | jq -r '.[0].State.Status'";

/// Flags of `microvm inspect`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct InspectArgs {
    /// Containers: a name, an id or the first digits of it
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

pub fn run(args: &InspectArgs) -> Result<u8, CliError> {
    let all = Containers::of_user()?;
    let mut values = Vec::new();
    for name in &args.containers {
        values.push(describe(&all.find(name)?)?);
    }
    let text = serde_json::to_string_pretty(&values).map_err(io::Error::from)?;
    writeln!(io::stdout(), "{text}")?;
    Ok(0)
}

/// Docker's words, where it has them.
fn describe(container: &Container) -> Result<Value, CliError> {
    let record = &container.record;
    let state = match container.state()? {
        State::Running(pid) => json!({ "Status": "running", "Running": true, "Pid": pid }),
        State::Ended(ended) => json!({
            "Status": if ended.time.is_some() { "exited" } else { "dead" },
            "Running": false,
            "ExitCode": ended.status,
            "FinishedAt": ended.time,
        }),
    };
    let process = &record.process;
    Ok(json!({
        "Id": record.id,
        "Name": record.name,
        "Created": record.created,
        "State": state,
        "Image": record.image_id,
        "AutoRemove": record.rm,
        "Isolation": record.isolation,
        "Ports": record.ports,
        "Volumes": record.volumes,
        "Config": {
            "Image": record.image,
            "Cmd": process.args,
            "Env": process.env,
            "WorkingDir": process.cwd,
            "User": process.user,
            "Tty": process.terminal,
            "OpenStdin": process.input,
            "StopSignal": record.stop_signal,
        },
    }))
}
