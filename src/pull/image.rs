//! An image from its name to its place in the store.

use std::fs;
use std::sync::Arc;

use microvm::image::{
    Descriptor, Digest, ImageError, ImportOptions, Index, Limits, Manifest, Parts, PullAnswer, PullOptions,
    PullRequest, Reference, Store, add_parts, from_registry, machine,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::bars::Bars;
use super::download::Downloads;
use super::error::PullError;
use super::registry::{Registry, sized};

/// What the configuration of a container's image is called. Some writers leave it out.
const CONFIGS: [&str; 3] =
    ["", "application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// What tells the kinds of manifests apart, whatever they are called on the way.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u32>,
    manifests: Option<Value>,
    layers: Option<Value>,
}

/// The image that a name stands for on this machine.
struct Resolved {
    /// The digest that the registry has under the name.
    digest: Digest,
    bytes: Vec<u8>,
    manifest: Manifest,
}

/// Gets an image.
pub fn pull(request: &PullRequest) -> Result<PullAnswer, PullError> {
    let reference: Reference = request.reference.parse().map_err(ImageError::from)?;
    let store = Arc::new(Store::at(request.store.clone())?);
    let guard = store.to_add()?;
    let registry = Registry::connect(&reference, &request.options)?;
    let resolved = resolve(&registry, &reference)?;
    check(&resolved.manifest, &request.options)?;
    let config = config(&store, &registry, &resolved.manifest.config)?;
    let bars = Arc::new(Bars::new(request.options.quiet));
    let downloads = Downloads::start(registry, store.clone(), bars.clone(), &resolved.manifest.layers);
    let name = Reference { tag: reference.tag.clone(), digest: reference.digest, ..reference }.pinned();
    let parts = Parts { manifest: resolved.bytes, config, names: vec![name] };
    let limits = Limits { bytes: request.options.max_layer, ..Limits::default() };
    let options = ImportOptions { name: None, limits, progress: &*bars };
    let added = add_parts(&store, parts, &options, |layer| downloads.wait(layer).map_err(as_image_error));
    bars.clear();
    drop(guard);
    let manifest = added?.record.manifest;
    Ok(PullAnswer::Done { manifest, digest: resolved.digest, fetched: downloads.fetched() })
}

fn as_image_error(error: PullError) -> ImageError {
    match error {
        PullError::Image(error) => error,
        error => ImageError::Download(Box::new(error)),
    }
}

fn resolve(registry: &Registry, reference: &Reference) -> Result<Resolved, PullError> {
    let by_digest = reference.digest.map(|digest| digest.to_string());
    let name = by_digest.or(reference.tag.clone()).unwrap_or_default();
    let mut bytes = registry.manifest(&name)?;
    let digest = Digest::of(&bytes);
    if is_index(&bytes)? {
        let index: Index = parse("the list of manifests", &bytes)?;
        let read = |descriptor: &Descriptor| {
            fetch(registry, descriptor)
                .and_then(|bytes| parse("a list of manifests", &bytes))
                .map_err(as_image_error)
        };
        let chosen = from_registry(&index, &read)?.ok_or_else(|| no_platform(&index))?;
        bytes = fetch(registry, &chosen)?;
        if is_index(&bytes)? {
            return Err(PullError::NoImage("a list of manifests that is called a manifest".into()));
        }
    }
    let manifest = parse("the manifest", &bytes)?;
    Ok(Resolved { digest, bytes, manifest })
}

/// A manifest of a list.
fn fetch(registry: &Registry, descriptor: &Descriptor) -> Result<Vec<u8>, PullError> {
    sized(descriptor, registry.manifest(&descriptor.digest.to_string())?)
}

fn is_index(bytes: &[u8]) -> Result<bool, PullError> {
    let shape: Shape = parse("the manifest", bytes)?;
    match shape {
        Shape { schema_version: Some(1), .. } => Err(PullError::Schema1),
        // What is both is read as the one here and as the other elsewhere (OCI image specification, 1.0.2).
        Shape { manifests: Some(_), layers: Some(_), .. } => {
            Err(PullError::NoImage("both a list of manifests and a manifest".into()))
        }
        shape => Ok(shape.manifests.is_some()),
    }
}

fn no_platform(index: &Index) -> PullError {
    let known = index.manifests.iter().filter_map(|descriptor| descriptor.platform.as_ref());
    let mut there: Vec<String> =
        known.filter(|platform| platform.os != "unknown").map(ToString::to_string).take(20).collect();
    there.dedup();
    PullError::Platform { wanted: machine(), there: there.join(", ") }
}

fn check(manifest: &Manifest, options: &PullOptions) -> Result<(), PullError> {
    let kind = &manifest.config.media_type;
    if !CONFIGS.contains(&kind.as_str()) {
        return Err(PullError::NoImage(kind.chars().take(100).collect()));
    }
    match manifest.layers.iter().find(|layer| layer.size > options.max_layer) {
        Some(layer) => {
            let name = format!("layer {}", layer.digest.short());
            Err(PullError::TooLarge { name, limit: options.max_layer })
        }
        None => Ok(()),
    }
}

/// The configuration, of the store where that has it.
fn config(store: &Store, registry: &Registry, descriptor: &Descriptor) -> Result<Vec<u8>, PullError> {
    let there = fs::read(store.blob(&descriptor.digest)).ok();
    match there.filter(|bytes| Digest::of(bytes) == descriptor.digest) {
        Some(bytes) => Ok(bytes),
        None => registry.small(descriptor),
    }
}

fn parse<T: DeserializeOwned>(name: &'static str, bytes: &[u8]) -> Result<T, PullError> {
    serde_json::from_slice(bytes).map_err(|source| PullError::Json { name, source })
}
