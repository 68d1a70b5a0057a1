//! An image's program: the image found, in use, and what it and its user say to run.

use std::path::PathBuf;

use crate::config::MAX_PIECES;
use crate::guest::ProcessSpec;
use crate::image::{Lease, PullOptions, Store, ensure};

use super::{ContainerError, Wanted, parse_signal, plan};

/// What programs are asked to end with.
const TERM: u8 = libc::SIGTERM as u8;

/// What a container is made of, wherever it runs.
pub struct Program {
    /// The image cannot be removed as long as this lives.
    pub lease: Lease,
    /// The image's id.
    pub image_id: String,
    /// Its layers, the lowest first.
    pub layers: Vec<PathBuf>,
    /// What is run.
    pub process: ProcessSpec,
    /// The image's `StopSignal`, else SIGTERM.
    pub stop_signal: u8,
}

impl Program {
    /// Finds the image, or gets it from its registry.
    ///
    /// # Errors
    /// It is not there, or nothing says what to run.
    pub fn of(wanted: &Wanted) -> Result<Self, ContainerError> {
        let store = Store::open()?;
        let image = ensure(&store, &wanted.image, wanted.pull, &PullOptions::default())?.record;
        let lease = store.lease(&image)?;
        let run = store.config(&image)?.config.unwrap_or_default();
        let process = plan(&run, &wanted.changes, &wanted.hostname)?;
        let (image_id, layers) = (image.config.to_string(), store.layers(&image));
        if !(1..=MAX_PIECES).contains(&layers.len()) {
            return Err(ContainerError::Layers { image: wanted.image.clone(), layers: layers.len() });
        }
        let stop_signal = run.stop_signal.as_deref().map_or(Ok(TERM), parse_signal)?;
        Ok(Self { lease, image_id, layers, process, stop_signal })
    }
}
