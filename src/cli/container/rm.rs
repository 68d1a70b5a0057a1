//! `microvm rm` and `microvm prune`.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use serde_json::json;

use crate::config::Size;
use crate::container::{Container, ContainerError, Containers, State, forget_dead_vms, forget_vm};

use super::super::CliError;
use super::super::table::Format;
use super::for_each;
use super::stop::close;

const RM_HELP: &str = "Exit status:
  0  all have gone
  1  one is not there, or runs
  2  wrong usage

Examples:
  microvm rm job
  microvm rm --force web";

/// Flags of `microvm rm`.
#[derive(Args)]
#[command(after_help = RM_HELP)]
pub struct RmArgs {
    /// Kill one that runs
    #[arg(short, long)]
    force: bool,
    /// Containers: a name, an id or the first digits of it
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

const PRUNE_HELP: &str = "Exit status:
  0  done, also where there was nothing to remove
  1  one cannot be removed
  2  wrong usage

Examples:
  microvm prune --force
  microvm prune --force --format json | jq .freed";

/// Flags of `microvm prune`.
#[derive(Args)]
#[command(after_help = PRUNE_HELP)]
pub struct PruneArgs {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// How it is told
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

pub fn run_rm(args: &RmArgs) -> Result<u8, CliError> {
    let all = Containers::of_user()?;
    Ok(for_each(&args.containers, |name| {
        let container = all.find(name)?;
        if args.force && matches!(container.state()?, State::Running(_)) {
            close(&container)?;
        }
        match remove(&all, &container) {
            // With its end.
            Err(ContainerError::NotFound(_)) if container.record.rm => {}
            removed => drop(removed?),
        }
        writeln!(io::stdout(), "{name}")?;
        Ok(())
    }))
}

fn remove(all: &Containers, container: &Container) -> Result<u64, ContainerError> {
    let bytes = all.remove(container)?;
    forget_vm(container);
    Ok(bytes)
}

pub fn run_prune(args: &PruneArgs) -> Result<u8, CliError> {
    let all = Containers::of_user()?;
    let ended: Vec<_> =
        all.list()?.into_iter().filter(|c| matches!(c.state(), Ok(State::Ended(_)))).collect();
    if !args.force && !ended.is_empty() && io::stdin().is_terminal() && !confirmed(ended.len())? {
        return Ok(0);
    }
    let (mut removed, mut freed, mut status) = (Vec::new(), 0, 0);
    for container in &ended {
        match remove(&all, container) {
            Ok(bytes) => {
                freed += bytes;
                removed.push(container.record.name.as_str());
            }
            // Somebody else did.
            Err(ContainerError::NotFound(_)) => {}
            Err(e) => {
                super::say(&super::chain(&e));
                status = 1;
            }
        }
    }
    all.clean()?;
    let dead = forget_dead_vms()?;
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => {
            let told = json!({ "containers": removed, "dead_vms": dead, "freed": freed });
            writeln!(out, "{told}")?;
        }
        Format::Table => {
            removed.iter().try_for_each(|name| writeln!(out, "{name}"))?;
            let count = removed.len();
            writeln!(out, "{count} containers and {dead} dead VMs removed, {} freed", Size(freed))?;
        }
    }
    Ok(status)
}

fn confirmed(count: usize) -> io::Result<bool> {
    eprint!("Remove {count} ended containers? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
