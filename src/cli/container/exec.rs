//! `microvm exec`: another program in a running container.

use std::io::{self, IsTerminal};

use clap::Args;

use crate::container::{ContainerError, Containers, HostError, Isolation, exec, exec_on_host, set_variable};
use crate::guest::TerminalSize;
use crate::guest::status::NOT_STARTED;

use super::super::run::variable;
use super::super::{CliError, chain, say};

const AFTER_HELP: &str =
    "It has the container's environment, folder and user unless flags say otherwise. Signals go to it.

Exit status: the program's, and
  125  the container does not run, or its guest does not answer
  126  the program may not be run
  127  the program is not there
  137  the container ended first

Examples:
  microvm exec web cat /etc/os-release
  microvm exec -it web sh
  tar c site | microvm exec -i web tar x -C /srv";

/// Flags of `microvm exec`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ExecArgs {
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Give the program this command's standard input
    #[arg(short, long)]
    interactive: bool,
    /// A variable of the program's environment; NAME alone takes its value from here; again for more
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The program's working folder
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// Who the program runs as, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The container: its name, its id or the first digits of it
    container: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub fn run(args: ExecArgs) -> Result<u8, CliError> {
    match start(args) {
        Err(error) => {
            say(&chain(&error));
            Ok(match error {
                CliError::Container(ContainerError::Refused { status, .. }) => status,
                _ => NOT_STARTED,
            })
        }
        status => status,
    }
}

fn start(args: ExecArgs) -> Result<u8, CliError> {
    if args.tty && !io::stdin().is_terminal() {
        return Err(CliError::Usage("-t: standard input is no terminal: leave the flag out".into()));
    }
    let container = Containers::of_user()?.find(&args.container)?;
    let mut process = container.record.process.clone();
    process.args = args.command;
    for word in &args.env {
        variable(word)?.into_iter().for_each(|word| set_variable(&mut process.env, &word));
    }
    process.cwd = args.workdir.unwrap_or(process.cwd);
    process.user = args.user.unwrap_or(process.user);
    process.terminal = args.tty;
    if args.tty {
        set_variable(&mut process.env, "TERM=xterm");
    }
    process.input = args.interactive;
    process.size = TerminalSize::here().filter(|_| args.tty);
    if container.record.isolation != Isolation::Vm {
        return match exec_on_host(&container, &process) {
            // The runtime has said why.
            Err(ContainerError::Host(HostError::Runtime { status, .. })) => Ok(status),
            result => Ok(result?),
        };
    }
    Ok(exec(&container, process)?)
}
