//! `microvm man`: the man pages, made from the same text as `--help`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::{Cli, CliError};

const AFTER_HELP: &str = "Examples:
  microvm man ~/.local/share/man/man1";

/// Flags of `microvm man`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ManArgs {
    /// The folder, which must be there
    folder: PathBuf,
}

pub(super) fn run(args: &ManArgs) -> Result<u8, CliError> {
    clap_mangen::generate_to(Cli::command(), &args.folder)
        .map_err(|source| CliError::Folder { folder: args.folder.clone(), source })?;
    Ok(0)
}
