//! OCI images: brought in, kept once, and made into file systems that VMs share. docs/images.md tells of the use.
//!
//! ```text
//! file or folder -> source -> manifest -> layers: hashed, unpacked, checked -> EROFS images -> store
//! ```

mod decode;
mod digest;
mod erofs;
mod error;
mod export;
mod import;
mod layer;
mod manifest;
mod record;
mod reference;
mod remove;
mod source;
mod store;
mod tar;

pub use digest::{Digest, ParseDigestError};
pub use error::ImageError;
pub use export::export;
pub use import::{ImportOptions, Imported, Progress, import};
pub use layer::{LayerError, Limits};
pub use manifest::{ImageConfig, RunConfig};
pub use record::{LayerRecord, Lease, Named, Record};
pub use reference::{ParseReferenceError, Reference};
pub use remove::{Removed, prune, remove};
pub use store::{Guard, Store};
pub use tar::TarError;
