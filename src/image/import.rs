//! Brings images into the store: what `docker save`, `skopeo`, `buildah` and `umoci` write, and plain archives of files.

mod add;
mod layers;
mod rootfs;
mod select;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use super::decode::{self, Packing};
use super::digest::{Digest, HashingReader};
use super::error::ImageError;
use super::layer::Limits;
use super::manifest::{Descriptor, DockerImage, Index, Manifest, architecture};
use super::record::Record;
use super::reference::Reference;
use super::source::{Archive, Source, parse};
use super::store::Store;
use super::tar::TarReader;
use add::New;
pub use add::{Parts, add_parts};
use layers::Given;
pub use select::from_registry;

/// Told how far an import is.
pub trait Progress: Sync {
    /// A part of so many bytes starts.
    fn start(&self, what: &str, bytes: u64);
    /// So many bytes more of it have been read.
    fn advance(&self, bytes: u64);
}

/// How an import is done.
pub struct ImportOptions<'a> {
    /// The image's name, in place of those it brings.
    pub name: Option<Reference>,
    /// What is not taken.
    pub limits: Limits,
    /// Told how far it is.
    pub progress: &'a dyn Progress,
}

/// An image that has been imported.
pub struct Imported {
    /// The image.
    pub record: Record,
    /// Its names as imported.
    pub names: Vec<Reference>,
}

/// An image of a source.
enum Found {
    Oci(Descriptor),
    Docker(DockerImage),
}

/// Imports the images of a file or folder.
///
/// # Errors
/// It is no image, is broken or too large, or the store cannot be written. Nothing of a failed image is seen.
pub fn import(store: &Store, path: &Path, options: &ImportOptions) -> Result<Vec<Imported>, ImageError> {
    if options.name.as_ref().is_some_and(|name| name.digest.is_some()) {
        return Err(ImageError::NameWithDigest);
    }
    let _guard = store.to_add()?;
    let failed = |source| ImageError::Source { path: path.into(), source };
    let meta = std::fs::metadata(path).map_err(failed)?;
    if meta.is_dir() {
        return Import { store, options, source: Source::Folder(path.into()) }.images();
    }
    if !meta.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a folder")));
    }
    let file = File::open(path).map_err(failed)?;
    let (packing, _) = decode::sniff(&file).map_err(failed)?;
    if !holds_image(path, packing, &file)? {
        return rootfs::import(store, path, file, options).map(|image| vec![image]);
    }
    let file = match packing {
        Packing::Plain => file,
        packing => unpack(store, path, packing, file, options)?,
    };
    let source = Source::Archive(Archive::index(path, file)?);
    Import { store, options, source }.images()
}

/// Tells an image's archive from one of plain files, by its first entry that is not a folder.
fn holds_image(path: &Path, packing: Packing, mut file: &File) -> Result<bool, ImageError> {
    let failed = |source| ImageError::Source { path: path.into(), source };
    file.rewind().map_err(failed)?;
    let mut tar = TarReader::new(decode::unpacked(packing, file).map_err(failed)?);
    let mut seen = 0;
    let found = loop {
        let entry = tar.next_entry().map_err(|source| ImageError::Archive { path: path.into(), source })?;
        let Some(entry) = entry else { break false };
        let name = String::from_utf8_lossy(&entry.path);
        let name = name.trim_start_matches("./");
        let first = name.split('/').next().unwrap_or_default();
        let of_image = matches!(name, "manifest.json" | "index.json" | "oci-layout" | "repositories");
        let hex = Digest::from_hex(first.trim_end_matches(".json").trim_end_matches(".tar")).is_some();
        seen += 1;
        if of_image || hex || name.starts_with("blobs/sha256/") {
            break true;
        }
        if entry.kind != b'5' || seen > 64 {
            break false;
        }
    };
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(found)
}

/// An image's archive that is packed as a whole: its entries are needed in another order than theirs.
fn unpack(
    store: &Store,
    path: &Path,
    packing: Packing,
    file: File,
    options: &ImportOptions,
) -> Result<File, ImageError> {
    let failed = |source| ImageError::Source { path: path.into(), source };
    options.progress.start("unpacking", file.metadata().map_err(failed)?.len());
    let counted = Counted { inner: file, progress: options.progress };
    let unpacked = decode::unpacked(packing, counted).map_err(failed)?;
    let mut temporary = store.temporary()?;
    let mut limited = HashingReader::new(unpacked, options.limits.bytes);
    io::copy(&mut limited, &mut temporary.file).map_err(failed)?;
    // It has no name after this, and needs none.
    temporary.file.try_clone().map_err(failed)
}

/// Tells the progress.
struct Counted<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.progress.advance(count as u64);
        Ok(count)
    }
}

/// The import of a source.
struct Import<'a> {
    store: &'a Store,
    options: &'a ImportOptions<'a>,
    source: Source,
}

impl Import<'_> {
    fn images(&self) -> Result<Vec<Imported>, ImageError> {
        let path = || self.source.path().to_path_buf();
        let found = self.found()?;
        if self.options.name.is_some() && found.len() > 1 {
            return Err(ImageError::SeveralImages(path(), found.len()));
        }
        if found.is_empty() {
            let reason = format!("it has none for linux/{}", architecture());
            return Err(ImageError::NoImage { path: path(), reason });
        }
        found.into_iter().map(|(found, names)| self.image(&found, names)).collect()
    }

    /// The source's images with their names.
    fn found(&self) -> Result<Vec<(Found, Vec<Reference>)>, ImageError> {
        // What newer Docker writes is both; the list keeps the manifests' digests and tells machines apart.
        if let Some(index) = self.source.json::<Index>("index.json")? {
            let selected = select::from_index(&index, &|descriptor| self.json(descriptor))?;
            return Ok(selected.into_iter().map(|(d, names)| (Found::Oci(d), names)).collect());
        }
        let Some(images) = self.source.json::<Vec<DockerImage>>("manifest.json")? else {
            let reason = "it has neither index.json (OCI) nor manifest.json (docker save)".into();
            return Err(ImageError::NoImage { path: self.source.path().into(), reason });
        };
        let named = |mut image: DockerImage| {
            let names = image.repo_tags.take().unwrap_or_default();
            let names = names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
            Ok((Found::Docker(image), names))
        };
        images.into_iter().map(named).collect()
    }

    fn image(&self, found: &Found, names: Vec<Reference>) -> Result<Imported, ImageError> {
        let (manifest, config, layers) = match found {
            Found::Oci(descriptor) => self.oci(descriptor)?,
            Found::Docker(image) => self.docker(image)?,
        };
        let open = |given: &Given| {
            self.source.open(&given.path)?.ok_or_else(|| ImageError::Missing(given.path.clone()))
        };
        // A digest that comes with a name is what somebody says, who need not have checked it.
        let names = self.options.name.clone().map_or(names, |name| vec![name]).into_iter();
        let names = names.filter(|name| name.tag.is_some()).map(|name| Reference { digest: None, ..name });
        let image = New { path: self.source.path(), manifest, config, layers, names: names.collect() };
        add::add(self.store, image, self.options, open)
    }

    /// The manifest, the configuration and where the layers are.
    #[allow(clippy::type_complexity, reason = "read in one place")]
    fn oci(&self, descriptor: &Descriptor) -> Result<(Option<Vec<u8>>, Vec<u8>, Vec<Given>), ImageError> {
        let bytes = self.blob(descriptor)?;
        let manifest: Manifest = parse("the manifest", &bytes)?;
        let config = self.blob(&manifest.config)?;
        Ok((Some(bytes), config, manifest.layers.iter().map(Given::of).collect()))
    }

    #[allow(clippy::type_complexity, reason = "read in one place")]
    fn docker(&self, image: &DockerImage) -> Result<(Option<Vec<u8>>, Vec<u8>, Vec<Given>), ImageError> {
        let config =
            self.source.read(&image.config)?.ok_or_else(|| ImageError::Missing(image.config.clone()))?;
        // Named by its digest, with a folder or a suffix.
        let stem = image.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
        if let Some(wanted) = Digest::from_hex(stem) {
            check(&wanted, &config)?;
        }
        let given = image.layers.iter().map(|path| Given { path: path.clone(), blob: None, size: None });
        Ok((None, config, given.collect()))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T, ImageError> {
        parse("a list of manifests", &self.blob(descriptor)?)
    }

    /// A small part by its digest, which is checked.
    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let bytes = self.source.read(&blob_path(&descriptor.digest))?;
        let bytes = bytes.ok_or_else(|| ImageError::Missing(descriptor.digest.to_string()))?;
        check(&descriptor.digest, &bytes)?;
        Ok(bytes)
    }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn check(wanted: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
    let found = Digest::of(bytes);
    if found == *wanted { Ok(()) } else { Err(ImageError::Digest { name: wanted.to_string(), found }) }
}
