//! What the store says of an image, and how one is found.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::ImageError;
use super::manifest::ImageConfig;
use super::reference::Reference;
use super::store::Store;

/// An image of the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The digest of its manifest.
    pub manifest: Digest,
    /// The digest of its configuration: its id, as in Docker.
    pub config: Digest,
    /// When it was made, as its configuration says.
    pub created: Option<String>,
    /// Its layers, lowest first.
    pub layers: Vec<LayerRecord>,
}

/// A layer of an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The digest of the plain archive.
    pub diff_id: Digest,
    /// The digest of the archive as it came, compressed or not.
    pub blob: Digest,
    /// Its bytes.
    pub blob_size: u64,
    /// Names the layer's file system, as [`Store::layer`] takes it.
    pub image: Digest,
    /// Its bytes.
    pub image_size: u64,
}

impl Record {
    /// Bytes of its layers as file systems.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.image_size).sum()
    }
}

/// A name of an image.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NameRecord {
    pub name: String,
    pub manifest: Digest,
}

/// An image with its names, in alphabetical order.
#[derive(Clone, Debug)]
pub struct Named {
    /// The image.
    pub record: Record,
    /// Its names, with a tag or with the digest it was pulled by.
    pub names: Vec<String>,
}

/// An image that somebody uses: it cannot be removed as long as this lives.
pub struct Lease {
    /// Keeps a shared lock on the image's record.
    pub file: File,
}

/// `None`: removed meanwhile.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, ImageError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| ImageError::Record { path: path.into(), source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ImageError::Store { path: path.into(), source }),
    }
}

impl Store {
    /// All images with their names.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn images(&self) -> Result<Vec<Named>, ImageError> {
        let mut names: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for path in self.files("names")? {
            let Some(name) = read::<NameRecord>(&path)? else { continue };
            names.entry(name.manifest).or_default().push(name.name);
        }
        let mut images = Vec::new();
        for path in self.files("images")? {
            let Some(record) = read::<Record>(&path)? else { continue };
            let mut names = names.remove(&record.manifest).unwrap_or_default();
            names.sort();
            images.push(Named { record, names });
        }
        images.sort_by(|a, b| (&a.names, a.record.config).cmp(&(&b.names, b.record.config)));
        Ok(images)
    }

    /// The image of a name (`alpine`, `alpine:3.20`, `alpine@sha256:…`), a digest of manifest or configuration, or the
    /// start of an id.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn find(&self, text: &str) -> Result<Named, ImageError> {
        let all = self.find_all(text)?;
        // What has the same id has the same files, whatever its layers were packed with.
        let named = all.iter().find(|image| !image.names.is_empty()).or(all.first());
        named.cloned().ok_or_else(|| ImageError::NotFound(text.into()))
    }

    /// As [`Store::find`]; several are of one id, and differ in how their layers were packed.
    pub(super) fn find_all(&self, text: &str) -> Result<Vec<Named>, ImageError> {
        let images = self.images()?;
        if let Ok(reference) = text.parse::<Reference>()
            && let Some(found) = images.iter().find(|image| is_named(image, &reference))
        {
            return Ok(vec![found.clone()]);
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let is_id = hex.len() >= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit());
        let starts = |digest: &Digest| is_id && digest.hex().starts_with(hex);
        let is_meant = |image: &Named| starts(&image.record.config) || starts(&image.record.manifest);
        let found: Vec<Named> = images.into_iter().filter(is_meant).collect();
        let Some(first) = found.first() else { return Err(ImageError::NotFound(text.into())) };
        if found.iter().any(|image| image.record.config != first.record.config) {
            return Err(ImageError::Ambiguous(text.into()));
        }
        Ok(found)
    }

    /// Uses an image: it stays until the lease ends.
    ///
    /// # Errors
    /// It has gone meanwhile.
    pub fn lease(&self, image: &Record) -> Result<Lease, ImageError> {
        let path = self.image(&image.manifest);
        let failed = |source| ImageError::Store { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        flock(&file, FlockOperation::LockShared).map_err(|e| failed(e.into()))?;
        // Removed between the two, and perhaps added again: that is another file.
        if !is_at(&file, &path) {
            return Err(ImageError::NotFound(image.config.short()));
        }
        Ok(Lease { file })
    }

    /// Keeps an image from being leased, unless somebody uses it. As long as the file is open, a new lease waits, and then
    /// finds that the image has gone.
    pub(super) fn unleased(&self, image: &Record) -> Option<File> {
        let file = File::open(self.image(&image.manifest)).ok()?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(file)
    }

    /// The image's configuration.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn config(&self, image: &Record) -> Result<ImageConfig, ImageError> {
        read(&self.blob(&image.config))?.ok_or_else(|| ImageError::Missing(image.config.to_string()))
    }

    /// Where the image's file systems are, lowest first.
    #[must_use]
    pub fn layers(&self, image: &Record) -> Vec<PathBuf> {
        image.layers.iter().map(|layer| self.layer(&layer.image)).collect()
    }

    pub(super) fn add_record(&self, record: &Record) -> Result<(), ImageError> {
        let path = self.image(&record.manifest);
        // One that is there may be leased: its file stays.
        if read::<Record>(&path).is_ok_and(|there| there.is_some()) {
            return Ok(());
        }
        self.write(&path, json(record).as_bytes())
    }

    pub(super) fn add_name(&self, name: &Reference, manifest: Digest) -> Result<(), ImageError> {
        let name = name.to_string();
        self.write(&self.name(&name), json(&NameRecord { name: name.clone(), manifest }).as_bytes())
    }
}

/// Whether a file that is open is still what a path leads to.
#[must_use]
pub fn is_at(file: &File, path: &Path) -> bool {
    let place = |meta: &fs::Metadata| (meta.dev(), meta.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(ours), Ok(there)) if place(&ours) == place(&there))
}

fn is_named(image: &Named, reference: &Reference) -> bool {
    let of_repository =
        |name: &String| name.strip_prefix(&reference.name()).is_some_and(|rest| rest.starts_with([':', '@']));
    image.names.contains(&reference.pinned().to_string())
        || reference.digest == Some(image.record.manifest) && image.names.iter().any(of_repository)
}

/// JSON of plain data, which cannot fail.
pub(super) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
