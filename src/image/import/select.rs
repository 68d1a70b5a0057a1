//! Which images of a list this machine runs, and what they are called.

use std::cell::Cell;

use super::super::error::ImageError;
use super::super::manifest::{CONTAINERD_NAME, Descriptor, Index, OCI_NAME};
use super::super::reference::Reference;

/// Lists within lists, at most, and how many are read in all: lists that name each other would have no end.
const MAX_DEPTH: usize = 4;
const MAX_LISTS: usize = 64;

/// How many entries a list may have.
const MAX_ENTRIES: usize = 1000;

/// Reads a list by its descriptor.
type Read<'a> = dyn Fn(&Descriptor) -> Result<Index, ImageError> + 'a;

/// The images of a list, one for each name, with all their names.
pub(super) fn from_index(
    index: &Index,
    read: &Read,
) -> Result<Vec<(Descriptor, Vec<Reference>)>, ImageError> {
    let lists = Cell::new(MAX_LISTS);
    let mut found: Vec<(Descriptor, Vec<Reference>)> = Vec::new();
    let mut seen: Vec<Option<&str>> = Vec::new();
    for descriptor in ranked(index) {
        let own = name(descriptor);
        // Several entries of one name are one image for several machines: the one that fits best is it.
        if seen.contains(&own) {
            continue;
        }
        let Some(image) = select(descriptor, read, (MAX_DEPTH, &lists))? else { continue };
        seen.push(own);
        // OCI allows a tag alone, which names nothing by itself.
        let name = own.filter(|name| name.contains(['/', ':'])).and_then(|name| name.parse().ok());
        match found.iter_mut().find(|(there, _)| there.digest == image.digest) {
            Some((_, names)) => names.extend(name),
            None => found.push((image, name.into_iter().collect())),
        }
    }
    Ok(found)
}

/// The image of a list that a registry has under one name.
///
/// # Errors
/// A list within it cannot be read.
pub fn from_registry(index: &Index, read: &Read) -> Result<Option<Descriptor>, ImageError> {
    let lists = Cell::new(MAX_LISTS);
    for descriptor in ranked(index) {
        if let Some(image) = select(descriptor, read, (MAX_DEPTH, &lists))? {
            return Ok(Some(image));
        }
    }
    Ok(None)
}

/// The entries that this machine runs, the best first.
fn ranked(index: &Index) -> Vec<&Descriptor> {
    let entries = index.manifests.iter().take(MAX_ENTRIES);
    let mut fitting: Vec<_> = entries.filter(|descriptor| descriptor.rank().is_some()).collect();
    fitting.sort_by_key(|descriptor| descriptor.rank());
    fitting
}

fn name(descriptor: &Descriptor) -> Option<&str> {
    let note = |key| descriptor.annotations.get(key).map(String::as_str);
    note(CONTAINERD_NAME).or_else(|| note(OCI_NAME))
}

fn select(
    descriptor: &Descriptor,
    read: &Read,
    (depth, lists): (usize, &Cell<usize>),
) -> Result<Option<Descriptor>, ImageError> {
    if depth == 0 {
        return Ok(None);
    }
    if !descriptor.is_index() {
        return Ok(Some(descriptor.clone()));
    }
    let Some(left) = lists.get().checked_sub(1) else { return Ok(None) };
    lists.set(left);
    for inner in ranked(&read(descriptor)?) {
        if let Some(image) = select(inner, read, (depth - 1, lists))? {
            return Ok(Some(image));
        }
    }
    Ok(None)
}
