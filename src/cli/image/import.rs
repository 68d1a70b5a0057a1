//! `microvm image import`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::config::Size;
use crate::image::{ImportOptions, Imported, Limits, Reference, Store, import};

use super::super::CliError;
use super::super::table::Format;
use super::progress::Bar;

const AFTER_HELP: &str =
    "What it is is told by its content: an archive of docker save (old or new), an OCI layout
(a folder) or archive, or a plain archive of files; archives and layers may be packed with gzip or zstd.
Of an image for several machines, this one's is taken. Digests are checked.

Examples:
  microvm image import alpine.tar
  microvm image import ./oci-layout --name registry.example/app:2
  microvm image import rootfs.tar.gz --name rootfs";

/// Flags of `microvm image import`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ImportArgs {
    /// An archive, or a folder with an OCI layout
    path: PathBuf,
    /// What the image is called, in place of the names it brings
    #[arg(long, value_name = "NAME")]
    name: Option<Reference>,
    /// The most that one layer may be, unpacked
    #[arg(long, value_name = "SIZE", default_value_t = Size(Limits::default().bytes))]
    max_size: Size,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// How the result is printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

pub(super) fn run(store: &Store, args: &ImportArgs) -> Result<(), CliError> {
    let bar = Bar::new(args.quiet);
    let limits = Limits { bytes: args.max_size.0, ..Limits::default() };
    let options = ImportOptions { name: args.name.clone(), limits, progress: &bar };
    let imported = import(store, &args.path, &options);
    bar.clear();
    let imported = imported?;
    let mut out = io::stdout().lock();
    if args.format == Format::Json {
        let all: Vec<Value> = imported.iter().map(describe).collect();
        writeln!(out, "{}", Value::from(all))?;
        return Ok(());
    }
    for image in &imported {
        let id = image.record.config.short();
        if image.names.is_empty() {
            writeln!(out, "{id}")?;
        }
        image.names.iter().try_for_each(|name| writeln!(out, "{id}  {name}"))?;
    }
    Ok(())
}

fn describe(image: &Imported) -> Value {
    json!({
        "id": image.record.config,
        "digest": image.record.manifest,
        "names": image.names.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}
