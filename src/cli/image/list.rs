//! `microvm image ls` and `inspect`.

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use crate::config::Size;
use crate::image::{ImageError, Named, Store};

use super::super::CliError;
use super::super::table::{self, Format};

const LIST_HELP: &str = "SIZE is that of the layers as file systems; images share layers.

Examples:
  microvm image ls
  microvm image ls --format json | jq -r '.[].id'";

/// Flags of `microvm image ls`.
#[derive(Args)]
#[command(after_help = LIST_HELP)]
pub(super) struct ListArgs {
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// How the list is printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

const INSPECT_HELP: &str = "Examples:
  microvm image inspect alpine
  microvm image inspect alpine | jq -r '.[0].layers[].path'";

/// Flags of `microvm image inspect`.
#[derive(Args)]
#[command(after_help = INSPECT_HELP)]
pub(super) struct InspectArgs {
    /// The images
    #[arg(required = true)]
    images: Vec<String>,
}

pub(super) fn run(store: &Store, args: &ListArgs) -> Result<(), CliError> {
    let images = store.images()?;
    let mut out = io::stdout().lock();
    match (args.quiet, args.format) {
        (true, _) => images.iter().try_for_each(|image| writeln!(out, "{}", image.record.config.short()))?,
        (_, Format::Json) => writeln!(out, "{}", Value::from(images.iter().map(line).collect::<Vec<_>>()))?,
        _ => write_table(&images, &mut out)?,
    }
    Ok(())
}

fn line(image: &Named) -> Value {
    json!({
        "id": image.record.config,
        "digest": image.record.manifest,
        "names": image.names,
        "created": image.record.created,
        "size": image.record.size(),
        "layers": image.record.layers.len(),
    })
}

fn write_table(images: &[Named], out: &mut dyn Write) -> io::Result<()> {
    let head = ["NAME", "ID", "CREATED", "LAYERS", "SIZE"].map(String::from);
    let row = |name: &str, image: &Named| {
        let record = &image.record;
        // The day alone: RFC 3339 starts with it.
        let created = record.created.as_deref().and_then(|c| c.get(..10)).unwrap_or("-");
        let created = created.chars().filter(|c| !c.is_control()).collect();
        // Whole MiB are enough in a list.
        let size = Size(record.size().next_multiple_of(1 << 20)).to_string();
        [name.into(), record.config.short(), created, record.layers.len().to_string(), size]
    };
    let rows = images.iter().flat_map(|image| {
        let nameless = image.names.is_empty().then(|| row("<none>", image));
        nameless.into_iter().chain(image.names.iter().map(move |name| row(name, image)))
    });
    table::write(std::iter::once(head).chain(rows), out)
}

pub(super) fn inspect(store: &Store, args: &InspectArgs) -> Result<(), CliError> {
    let all = args.images.iter().map(|name| describe(store, &store.find(name)?));
    let all = all.collect::<Result<Vec<_>, ImageError>>()?;
    let text = serde_json::to_string_pretty(&all).unwrap_or_default();
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

fn describe(store: &Store, image: &Named) -> Result<Value, ImageError> {
    let layer = |layer: &crate::image::LayerRecord| {
        json!({
            "diff_id": layer.diff_id,
            "digest": layer.blob,
            "compressed_size": layer.blob_size,
            "path": store.layer(&layer.image),
            "size": layer.image_size,
        })
    };
    let mut all = line(image);
    all["layers"] = image.record.layers.iter().map(layer).collect();
    all["config"] = json!(store.config(&image.record)?);
    Ok(all)
}
