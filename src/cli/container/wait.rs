//! `microvm wait`: until containers end.

use std::io::{self, Write};

use clap::Args;

use crate::container::Containers;

use super::super::CliError;
use super::for_each;

const AFTER_HELP: &str = "The exit status of each is printed on a line.

Exit status:
  0  all have ended
  1  one is not there
  2  wrong usage

Examples:
  status=$(microvm wait job)";

/// Flags of `microvm wait`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct WaitArgs {
    /// Containers: a name, an id or the first digits of it
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

pub fn run(args: &WaitArgs) -> Result<u8, CliError> {
    let all = Containers::of_user()?;
    Ok(for_each(&args.containers, |name| {
        let status = all.find(name)?.wait()?.status;
        writeln!(io::stdout(), "{status}")?;
        Ok(())
    }))
}
