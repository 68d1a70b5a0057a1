//! `microvm doctor`: what this host offers.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::doctor::{examine, write_table};

use super::CliError;

const AFTER_HELP: &str = "Exit status:
  0  `microvm boot` of a real kernel will work here
  1  it will not; the lines marked fatal say why
  2  wrong usage

Examples:
  microvm doctor
  microvm doctor --json | jq '.checks[] | select(.state != \"ok\")'";

/// Flags of `microvm doctor`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct DoctorArgs {
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// How the report is written
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// The KVM device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm_device: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

pub(super) fn run(args: &DoctorArgs) -> Result<u8, CliError> {
    let report = examine(&args.kvm_device);
    let mut out = io::stdout().lock();
    if args.json || args.format == Format::Json {
        serde_json::to_writer_pretty(&mut out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        let colours = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
        write_table(&report, colours, &mut out)?;
    }
    Ok(if report.boot { 0 } else { 1 })
}
