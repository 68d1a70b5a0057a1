//! `microvm completions`: what a shell needs to complete our flags.

use std::io::{self, Write};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, CliError};

const AFTER_HELP: &str = "Examples:
  microvm completions bash > ~/.local/share/bash-completion/completions/microvm
  microvm completions fish > ~/.config/fish/completions/microvm.fish";

/// Flags of `microvm completions`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<u8, CliError> {
    // Into memory first: clap_complete panics where its output fails.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "microvm", &mut text);
    io::stdout().write_all(&text)?;
    Ok(0)
}
