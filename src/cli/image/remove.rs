//! `microvm image rm` and `prune`.

use std::io::{self, Write};

use clap::Args;
use serde_json::json;

use crate::config::Size;
use crate::image::{self, Removed, Store};

use super::super::table::Format;
use super::super::{CliError, chain, say};

const REMOVE_HELP: &str = "An image goes with its last name. One that a running VM uses stays.

Examples:
  microvm image rm alpine
  microvm image rm --force 3f2a9c01b2d4
  microvm image ls -q | xargs microvm image rm --force";

/// Flags of `microvm image rm`.
#[derive(Args)]
#[command(after_help = REMOVE_HELP)]
pub(super) struct RemoveArgs {
    /// The images
    #[arg(required = true)]
    images: Vec<String>,
    /// With an id: remove the image with all its names
    #[arg(short, long)]
    force: bool,
}

const PRUNE_HELP: &str = "Examples:
  microvm image prune
  microvm image prune --all";

/// Flags of `microvm image prune`.
#[derive(Args)]
#[command(after_help = PRUNE_HELP)]
pub(super) struct PruneArgs {
    /// Also images with names; those that running VMs use stay
    #[arg(short, long)]
    all: bool,
    /// How the result is printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

fn waiting() {
    say("an import is going on: waiting for its end");
}

/// Removes what can be; the others are told of, one line each.
pub(super) fn run(store: &Store, args: &RemoveArgs) -> Result<u8, CliError> {
    let mut out = io::stdout().lock();
    let mut status = 0;
    for name in &args.images {
        match image::remove(store, name, args.force, waiting) {
            Ok(removed) => print(&removed, &mut out)?,
            Err(error) => {
                status = 1;
                say(&chain(&error));
            }
        }
    }
    Ok(status)
}

fn print(removed: &Removed, out: &mut dyn Write) -> io::Result<()> {
    removed.names.iter().try_for_each(|name| writeln!(out, "Untagged: {name}"))?;
    removed.images.iter().try_for_each(|id| writeln!(out, "Deleted: {id}"))
}

pub(super) fn prune(store: &Store, args: &PruneArgs) -> Result<(), CliError> {
    let removed = image::prune(store, args.all, waiting)?;
    let mut out = io::stdout().lock();
    if args.format == Format::Json {
        let all = json!({ "names": removed.names, "images": removed.images, "freed": removed.freed });
        writeln!(out, "{all}")?;
        return Ok(());
    }
    print(&removed, &mut out)?;
    writeln!(out, "Freed: {}", round(removed.freed))?;
    Ok(())
}

/// Whole KiB below 10 MiB, whole MiB beyond.
fn round(bytes: u64) -> Size {
    let unit = if bytes < 10 << 20 { 1 << 10 } else { 1 << 20 };
    Size(bytes.next_multiple_of(unit))
}
