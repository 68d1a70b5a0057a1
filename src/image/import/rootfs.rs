//! An archive of plain files is an image of one layer.

use std::fs::File;
use std::path::Path;

use super::super::error::ImageError;
use super::super::manifest::{ImageConfig, RootFs, RunConfig, architecture};
use super::super::record::json;
use super::super::source::Part;
use super::super::store::Store;
use super::add::{New, register};
use super::layers::{Given, Layers};
use super::{ImportOptions, Imported};

pub(super) fn import(
    store: &Store,
    path: &Path,
    file: File,
    options: &ImportOptions,
) -> Result<Imported, ImageError> {
    let size = file.metadata().map_err(|source| ImageError::Source { path: path.into(), source })?.len();
    let mut layers = Layers::new(store, options);
    let given = Given { path: path.display().to_string(), blob: None, size: None };
    layers.add(&given, None, || Ok(Part { data: Box::new(file), size }))?;
    let diff_ids = layers.done().iter().map(|(layer, _)| layer.diff_id).collect();
    // No time of its own: the same archive is the same image.
    let config = ImageConfig {
        architecture: architecture().into(),
        os: "linux".into(),
        created: None,
        config: Some(RunConfig::default()),
        rootfs: RootFs { kind: "layers".into(), diff_ids },
    };
    let names = options.name.clone().into_iter().collect();
    let image = New { path, manifest: None, config: json(&config).into_bytes(), layers: Vec::new(), names };
    register(store, image, None, layers)
}
