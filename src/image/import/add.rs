//! Adds an image whose parts are at hand: the checks that all images get, and the order in which they come to be seen.

use std::fs::File;
use std::path::Path;

use super::super::decode::Packing;
use super::super::digest::Digest;
use super::super::error::ImageError;
use super::super::manifest::{Descriptor, ImageConfig, Manifest, machine, media_type};
use super::super::record::{LayerRecord, Record, json};
use super::super::reference::Reference;
use super::super::source::{Part, parse};
use super::super::store::Store;
use super::layers::{Given, Layers};
use super::{ImportOptions, Imported};

/// The most layers of an image: overlayfs stacks 500.
const MAX_LAYERS: usize = 500;

/// An image that is to be added.
pub(super) struct New<'a> {
    /// Where it comes from, to be named in errors.
    pub path: &'a Path,
    /// Its manifest, where it has one.
    pub manifest: Option<Vec<u8>>,
    pub config: Vec<u8>,
    pub layers: Vec<Given>,
    pub names: Vec<Reference>,
}

/// An image that is downloaded: what is small, with digests that have been checked.
pub struct Parts {
    /// Its manifest.
    pub manifest: Vec<u8>,
    /// Its configuration.
    pub config: Vec<u8>,
    /// What it will be called.
    pub names: Vec<Reference>,
}

/// Adds an image whose layers are in the store, or will be: `ready` is called before each layer that is read, and returns
/// when [`Store::blob`] has it. The caller keeps [`Store::to_add`]'s guard.
///
/// # Errors
/// It is no image for this machine, is broken or too large, or the store cannot be written. Nothing of it is seen then.
pub fn add_parts(
    store: &Store,
    parts: Parts,
    options: &ImportOptions,
    mut ready: impl FnMut(&Digest) -> Result<(), ImageError>,
) -> Result<Imported, ImageError> {
    let manifest: Manifest = parse("the manifest", &parts.manifest)?;
    let image = New {
        path: Path::new("the registry's image"),
        manifest: Some(parts.manifest),
        config: parts.config,
        layers: manifest.layers.iter().map(Given::of).collect(),
        names: parts.names,
    };
    add(store, image, options, |given| {
        let digest = given.blob.ok_or_else(|| ImageError::Missing(given.path.clone()))?;
        ready(&digest)?;
        let path = store.blob(&digest);
        let open = || File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (size, file) = open().map_err(|source| ImageError::Store { path: path.clone(), source })?;
        Ok(Part { data: Box::new(file), size })
    })
}

pub(super) fn add(
    store: &Store,
    image: New,
    options: &ImportOptions,
    mut open: impl FnMut(&Given) -> Result<Part, ImageError>,
) -> Result<Imported, ImageError> {
    let config: ImageConfig = parse("the configuration", &image.config)?;
    check(&image, &config)?;
    let mut layers = Layers::new(store, options);
    for (given, diff_id) in image.layers.iter().zip(&config.rootfs.diff_ids) {
        layers.add(given, Some(*diff_id), || open(given))?;
    }
    register(store, image, config.created, layers)
}

fn check(image: &New, config: &ImageConfig) -> Result<(), ImageError> {
    let platform = format!("{}/{}", config.os, config.architecture);
    if platform != machine() {
        return Err(ImageError::Platform(platform));
    }
    let no_image = |reason| Err(ImageError::NoImage { path: image.path.into(), reason });
    if image.layers.len() > MAX_LAYERS {
        return no_image(format!("it has more than {MAX_LAYERS} layers, which overlayfs cannot stack"));
    }
    if image.layers.len() != config.rootfs.diff_ids.len() {
        return no_image("its configuration and its manifest name different numbers of layers".into());
    }
    Ok(())
}

/// Makes an image seen: its layers are there by now, its record is written last, then its names.
pub(super) fn register(
    store: &Store,
    image: New,
    created: Option<String>,
    layers: Layers,
) -> Result<Imported, ImageError> {
    let bytes = image.manifest.unwrap_or_else(|| new_manifest(&image.config, layers.done()));
    let (manifest, config) = (Digest::of(&bytes), Digest::of(&image.config));
    for (digest, bytes) in [(manifest, &bytes), (config, &image.config)] {
        store.write(&store.blob(&digest), bytes)?;
    }
    let record = Record { manifest, config, created, layers: layers.into_records() };
    store.add_record(&record)?;
    for name in &image.names {
        store.add_name(name, manifest)?;
    }
    Ok(Imported { record, names: image.names })
}

/// The manifest of an image that came without.
fn new_manifest(config: &[u8], layers: &[(LayerRecord, Packing)]) -> Vec<u8> {
    let descriptor = |media_type: String, digest, size| Descriptor {
        media_type,
        digest,
        size,
        platform: None,
        annotations: Default::default(),
    };
    let layer = |(layer, packing): &(LayerRecord, Packing)| {
        descriptor(format!("{}{}", media_type::LAYER, packing.suffix()), layer.blob, layer.blob_size)
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::MANIFEST.into(),
        config: descriptor(media_type::CONFIG.into(), Digest::of(config), config.len() as u64),
        layers: layers.iter().map(layer).collect(),
    };
    json(&manifest).into_bytes()
}
