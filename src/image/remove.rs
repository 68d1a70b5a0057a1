//! Removes images and what no image needs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::ImageError;
use super::record::Named;
use super::reference::Reference;
use super::store::Store;

/// What has gone.
#[derive(Debug, Default)]
pub struct Removed {
    /// Names.
    pub names: Vec<String>,
    /// Ids of images.
    pub images: Vec<String>,
    /// Bytes of files that the store no longer has.
    pub freed: u64,
}

/// Removes the image or, where it has others, the name that `text` is. With `force` an id stands for all its names.
///
/// # Errors
/// There is no such image, a VM uses it, it has several names, or the store cannot be written.
pub fn remove(store: &Store, text: &str, force: bool, waiting: impl FnOnce()) -> Result<Removed, ImageError> {
    let _guard = store.to_remove(waiting)?;
    let images = store.find_all(text)?;
    let names = || images.iter().flat_map(|image| &image.names);
    let by_name = text.parse::<Reference>().ok().map(|name| name.pinned().to_string());
    let named = by_name.filter(|by_name| names().any(|name| name == by_name));
    let mut removed = Removed::default();
    match named {
        Some(name) if names().count() > 1 => {
            remove_name(store, &name, &mut removed)?;
            return Ok(removed);
        }
        None if names().count() > 1 && !force => return Err(ImageError::SeveralNames(text.into())),
        _ => {}
    }
    for image in &images {
        remove_image(store, image, &mut removed)?;
    }
    sweep(store, &mut removed)?;
    Ok(removed)
}

/// Removes images without a name, with `all` also those with one, except for what a VM uses; and whatever no image needs,
/// downloads that were interrupted among it.
///
/// # Errors
/// The store cannot be read or written.
pub fn prune(store: &Store, all: bool, waiting: impl FnOnce()) -> Result<Removed, ImageError> {
    let _guard = store.to_remove(waiting)?;
    let mut removed = Removed::default();
    for image in store.images()? {
        if !all && !image.names.is_empty() {
            continue;
        }
        match remove_image(store, &image, &mut removed) {
            Ok(()) | Err(ImageError::InUse(_)) => {}
            Err(error) => return Err(error),
        }
    }
    // Nobody downloads now: what is there is of somebody who was interrupted.
    for path in store.files("partial")? {
        remove_unneeded(&path, &mut removed)?;
    }
    sweep(store, &mut removed)?;
    Ok(removed)
}

fn remove_image(store: &Store, image: &Named, removed: &mut Removed) -> Result<(), ImageError> {
    let id = image.record.config.short();
    let Some(_held) = store.unleased(&image.record) else {
        return Err(ImageError::InUse(image.names.first().cloned().unwrap_or(id)));
    };
    // Names first: one that is left over would be of an image that is not there.
    for name in &image.names {
        remove_name(store, name, removed)?;
    }
    remove_file(&store.image(&image.record.manifest))?;
    removed.images.push(id);
    Ok(())
}

fn remove_name(store: &Store, name: &str, removed: &mut Removed) -> Result<(), ImageError> {
    remove_file(&store.name(name))?;
    removed.names.push(name.into());
    Ok(())
}

/// Removes what no image needs: also what an import left that was killed.
fn sweep(store: &Store, removed: &mut Removed) -> Result<(), ImageError> {
    let mut needed: BTreeSet<PathBuf> = BTreeSet::new();
    for image in store.images()? {
        let record = &image.record;
        needed.extend([store.blob(&record.manifest), store.blob(&record.config)]);
        needed.extend(record.layers.iter().map(|layer| store.blob(&layer.blob)));
        needed.extend(store.layers(record));
    }
    for folder in ["blobs/sha256", "layers"] {
        for path in store.files(folder)?.into_iter().filter(|path| !needed.contains(path)) {
            remove_unneeded(&path, removed)?;
        }
    }
    Ok(())
}

fn remove_unneeded(path: &Path, removed: &mut Removed) -> Result<(), ImageError> {
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    remove_file(path)?;
    removed.freed += size;
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(ImageError::Store { path: path.into(), source: e })
        }
        _ => Ok(()),
    }
}
