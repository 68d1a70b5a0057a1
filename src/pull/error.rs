//! Why an image cannot be pulled. Whoever prints it has the image's name in front.

use std::io;
use std::path::PathBuf;

use microvm::image::{Digest, ImageError};
use thiserror::Error;

/// An image that cannot be pulled.
#[derive(Debug, Error)]
pub enum PullError {
    /// The program that asked has ended.
    #[error("microvm has ended")]
    Orphan,
    /// The store, or what is wrong with the image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The operating system.
    #[error(transparent)]
    System(#[from] io::Error),
    /// A file of the store.
    #[error("{path}")]
    File {
        /// Its path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Nobody answers, or the connection breaks.
    #[error("{host}: {reason}")]
    Unreachable {
        /// Who.
        host: String,
        /// Why.
        reason: String,
    },
    /// There is no such image.
    #[error("{host} has no such {what}")]
    NotFound {
        /// Who.
        host: String,
        /// `image or tag`, or `digest`.
        what: &'static str,
    },
    /// It is not for everybody.
    #[error("{host} has no such image, or wants a login first (docker login {host})")]
    Login {
        /// Who.
        host: String,
    },
    /// It is not for this user.
    #[error("{host} refuses the user name or password of {path}: log in again (docker login {host})")]
    Credentials {
        /// Who.
        host: String,
        /// Where they are from.
        path: PathBuf,
    },
    /// A file with credentials.
    #[error("{path} cannot be used: {reason}")]
    Config {
        /// Its path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A way to log in that is not known.
    #[error("{host} wants a login that is not known here: {challenge}")]
    Challenge {
        /// Who.
        host: String,
        /// What it says.
        challenge: String,
    },
    /// Too much was asked of it.
    #[error("{host} wants fewer requests (429){again}: wait, or log in (docker login {host})")]
    TooMany {
        /// Who.
        host: String,
        /// When to try again.
        again: String,
    },
    /// Another status.
    #[error("{host} answers {status}")]
    Status {
        /// Who.
        host: String,
        /// Of HTTP.
        status: u16,
    },
    /// A redirect that is not followed.
    #[error("{host} sends to {place}, {reason}")]
    Redirect {
        /// Who.
        host: String,
        /// Where to.
        place: String,
        /// Why it is not followed.
        reason: &'static str,
    },
    /// What comes is not what was asked for.
    #[error("{name} has the digest {found}: it was changed on its way or at the registry")]
    Digest {
        /// What was asked for.
        name: String,
        /// What came.
        found: Digest,
    },
    /// More or less bytes than there should be.
    #[error("{name} should have {size} bytes and has {found}")]
    Size {
        /// What.
        name: String,
        /// As its descriptor says.
        size: u64,
        /// What came.
        found: String,
    },
    /// Something small that is not.
    #[error("{name} has more than {limit} bytes, which is not taken")]
    TooLarge {
        /// What.
        name: String,
        /// The most that is taken.
        limit: u64,
    },
    /// JSON that cannot be used.
    #[error("{name} is not as OCI has it")]
    Json {
        /// What.
        name: &'static str,
        /// The reason.
        #[source]
        source: serde_json::Error,
    },
    /// An image of before 2016.
    #[error(
        "the image has the old format schema 1, which has no checked layers: push it again with a newer tool"
    )]
    Schema1,
    /// Something else than an image.
    #[error("it is no container image, its configuration is {0}")]
    NoImage(String),
    /// For other machines.
    #[error("there is none for {wanted}, only for {there}")]
    Platform {
        /// This machine.
        wanted: String,
        /// What there is.
        there: String,
    },
    /// Another part has failed.
    #[error("stopped")]
    Stopped,
}
