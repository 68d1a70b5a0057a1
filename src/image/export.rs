//! Writes an image as an OCI archive, as `skopeo copy oci-archive:FILE` reads it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::digest::Digest;
use super::error::ImageError;
use super::manifest::{CONTAINERD_NAME, Descriptor, Index, OCI_NAME, Platform, media_type};
use super::record::{Named, json};
use super::store::Store;

/// Writes an image to a file, which is there only when it is whole.
///
/// # Errors
/// The file cannot be written, or the store read.
pub fn export(store: &Store, image: &Named, output: &Path) -> Result<(), ImageError> {
    let _lease = store.lease(&image.record)?;
    let failed = |source| ImageError::Output { path: output.into(), source };
    // A device or a pipe is written to as it is.
    if fs::metadata(output).is_ok_and(|meta| !meta.is_file()) {
        let file = File::options().write(true).open(output).map_err(failed)?;
        return write(store, image, file).map_err(failed);
    }
    let mut name = output.as_os_str().to_os_string();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(name);
    let written = File::create_new(&partial)
        .and_then(|file| write(store, image, file))
        .and_then(|()| fs::rename(&partial, output));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written.map_err(failed)
}

fn write(store: &Store, image: &Named, file: File) -> io::Result<()> {
    let record = &image.record;
    let mut archive = Builder::new(file);
    add(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let size = fs::metadata(store.blob(&record.manifest))?.len();
    add(&mut archive, "index.json", json(&index(image, size)).as_bytes())?;
    let mut blobs = vec![record.manifest, record.config];
    blobs.extend(record.layers.iter().map(|layer| layer.blob));
    for (i, digest) in blobs.iter().enumerate() {
        // Several layers may be the same, as empty ones are.
        if !blobs[..i].contains(digest) {
            add_blob(&mut archive, store, digest)?;
        }
    }
    let file = archive.into_inner()?;
    // A pipe or a device cannot be synced, and need not be.
    if file.metadata()?.is_file() { file.sync_all() } else { Ok(()) }
}

/// One entry for each name.
fn index(image: &Named, size: u64) -> Index {
    let platform = Platform {
        architecture: super::manifest::architecture().into(),
        os: "linux".into(),
        ..Platform::default()
    };
    let entry = |annotations| Descriptor {
        media_type: media_type::MANIFEST.into(),
        digest: image.record.manifest,
        size,
        platform: Some(platform.clone()),
        annotations,
    };
    let named =
        |name: &String| entry([CONTAINERD_NAME, OCI_NAME].map(|key| (key.into(), name.clone())).into());
    let mut manifests: Vec<_> = image.names.iter().map(named).collect();
    if manifests.is_empty() {
        manifests.push(entry(BTreeMap::new()));
    }
    Index { schema_version: 2, media_type: media_type::INDEX.into(), manifests }
}

fn header(size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn add<W: Write>(archive: &mut Builder<W>, name: &str, bytes: &[u8]) -> io::Result<()> {
    archive.append_data(&mut header(bytes.len() as u64), name, bytes)
}

fn add_blob<W: Write>(archive: &mut Builder<W>, store: &Store, digest: &Digest) -> io::Result<()> {
    let file = File::open(store.blob(digest))?;
    let size = file.metadata()?.len();
    archive.append_data(&mut header(size), format!("blobs/sha256/{}", digest.hex()), file)
}
