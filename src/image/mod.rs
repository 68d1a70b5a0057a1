//! OCI images: brought in, kept once, and made into file systems that VMs share. docs/images.md tells of the use.
//!
//! Registries are spoken to by a program of its own, `microvm-pull` (src/pull).
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
mod pull;
mod record;
mod reference;
mod remove;
mod source;
mod store;
mod tar;

pub use digest::{Digest, ParseDigestError};
pub use error::ImageError;
pub use export::export;
pub use import::{ImportOptions, Imported, Parts, Progress, add_parts, from_registry, import};
pub use layer::{LayerError, Limits};
pub use manifest::{Descriptor, ImageConfig, Index, Manifest, RunConfig, machine};
pub use pull::{PullAnswer, PullOptions, PullPolicy, PullRequest, Pulled, ensure, pull};
pub use record::{LayerRecord, Lease, Named, Record, is_at};
pub use reference::{ParseReferenceError, Reference};
pub use remove::{Removed, prune, remove};
pub use source::MAX_JSON;
pub use store::{Guard, Store, keep};
pub use tar::{TarError, count_folders};
