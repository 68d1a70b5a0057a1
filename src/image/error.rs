//! What goes wrong with images.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::digest::Digest;
use super::layer::LayerError;
use super::reference::ParseReferenceError;
use super::tar::TarError;

/// An image, or the store, that cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// There is no place for the store.
    #[error(
        "there is no folder for images: set MICROVM_DATA to an absolute path (or XDG_DATA_HOME, or HOME)"
    )]
    NoPlace,
    /// The store is not the user's own.
    #[error("{0} is not this user's own folder: set MICROVM_DATA to another one")]
    NotOurs(PathBuf),
    /// A file of the store.
    #[error("{path}")]
    Store {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A note of the store that is not what it should be.
    #[error("{path} is broken: remove it")]
    Record {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: serde_json::Error,
    },
    /// What is imported.
    #[error("{path}")]
    Source {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// What is imported, as an archive.
    #[error("{path}")]
    Archive {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: TarError,
    },
    /// What is imported is no image.
    #[error("{path} is no image: {reason}")]
    NoImage {
        /// Its path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A part of an image that is not there.
    #[error("{0} is missing in the image: get it once more")]
    Missing(String),
    /// A part that is not what it should be.
    #[error("{name} is broken, its digest is {found}: get the image once more")]
    Digest {
        /// The digest or path that it should have.
        name: String,
        /// What it has.
        found: Digest,
    },
    /// A part whose JSON cannot be used.
    #[error("{name} is not as OCI has it")]
    Json {
        /// What it is.
        name: String,
        /// The reason.
        #[source]
        source: serde_json::Error,
    },
    /// An image for another machine.
    #[error("the image is for {0}: this machine runs linux/{machine}", machine = super::manifest::architecture())]
    Platform(String),
    /// A layer.
    #[error("layer {name}")]
    Layer {
        /// Its digest or path.
        name: String,
        /// The reason.
        #[source]
        source: LayerError,
    },
    /// A wrong name.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// No such image.
    #[error("no image {0:?} here: see `microvm image ls`, or import it")]
    NotFound(String),
    /// Several images.
    #[error("{0:?} is the start of several images' ids: give more digits")]
    Ambiguous(String),
    /// A VM uses it.
    #[error("image {0} is in use by a running VM: stop that first")]
    InUse(String),
    /// It has several names.
    #[error("image {0} has several names: give the one to remove, or --force for all")]
    SeveralNames(String),
    /// A name that a digest belongs to.
    #[error("--name: give a name without a digest, which the image itself tells")]
    NameWithDigest,
    /// One name for several images.
    #[error("--name: {0} has {1} images, each with a name of its own")]
    SeveralImages(PathBuf, usize),
    /// A layer that cannot be downloaded.
    #[error(transparent)]
    Download(Box<dyn std::error::Error + Send + Sync>),
    /// An image that cannot be pulled.
    #[error("{reference} cannot be pulled: {reason}")]
    Pull {
        /// The image.
        reference: String,
        /// Why, and what to do.
        reason: String,
    },
    /// What is exported.
    #[error("--output {path} cannot be written")]
    Output {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}
