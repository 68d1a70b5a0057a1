//! Gets images from registries: what `microvm` asks of `microvm-pull`, the program that speaks to them, and what that
//! answers.
//!
//! It is a program of its own, so that what parses the network's bytes, and the code of TLS, is no part of the VMM.

use std::env;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::ImageError;
use super::layer::Limits;
use super::record::Named;
use super::reference::Reference;
use super::store::Store;

/// The most bytes of an answer.
const MAX_ANSWER: u64 = 64 << 10;

/// When an image that is asked for is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// If the store does not have it.
    Missing,
    /// In any case: what the store has is asked for again, and used if nothing is new.
    Always,
    /// Not at all.
    Never,
}

/// How images are pulled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PullOptions {
    /// HTTP without TLS. The registries of this machine itself may have either, whatever this says.
    pub plain_http: bool,
    /// How long a registry may be silent.
    pub timeout: Duration,
    /// The most bytes that one layer may be, unpacked.
    pub max_layer: u64,
    /// Without bars of progress, which are on a terminal alone in any case.
    pub quiet: bool,
}

impl Default for PullOptions {
    fn default() -> Self {
        let timeout = Duration::from_secs(30);
        Self { plain_http: false, timeout, max_layer: Limits::default().bytes, quiet: false }
    }
}

/// What `microvm-pull` is asked for, as JSON in its one argument.
#[derive(Debug, Serialize, Deserialize)]
pub struct PullRequest {
    /// The process that asks, which may be process 1 of its container.
    pub process: u32,
    /// The store's folder.
    pub store: PathBuf,
    /// The image.
    pub reference: String,
    /// How.
    pub options: PullOptions,
}

/// What it answers, as JSON on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullAnswer {
    /// The store has the image.
    Done {
        /// The digest of its manifest, by which it is found.
        manifest: Digest,
        /// The digest that the registry has under this name: the manifest's, or that of a list it is in.
        digest: Digest,
        /// Bytes of layers that came over the network.
        fetched: u64,
    },
    /// Why it has not, on one line.
    Failed(String),
}

/// An image that has been pulled.
#[derive(Debug)]
pub struct Pulled {
    /// It, as the store has it.
    pub image: Named,
    /// What it was asked for as, whole.
    pub reference: Reference,
    /// The digest that the registry has under this name.
    pub digest: Digest,
    /// Bytes of layers that came over the network.
    pub fetched: u64,
}

/// Gets an image from its registry. Bars of progress, if any, are on standard error.
///
/// # Errors
/// The registry cannot be reached, does not have it or refuses; the image is broken or for another machine; the store
/// cannot be written; `microvm-pull` is not there.
pub fn pull(store: &Store, reference: &Reference, options: &PullOptions) -> Result<Pulled, ImageError> {
    let failed = |reason| ImageError::Pull { reference: reference.to_string(), reason };
    let request = PullRequest {
        process: std::process::id(),
        store: store.path().to_path_buf(),
        reference: reference.to_string(),
        options: options.clone(),
    };
    match ask(&request).map_err(failed)? {
        PullAnswer::Done { manifest, digest, fetched } => {
            let image = store.find(&manifest.to_string())?;
            Ok(Pulled { image, reference: reference.pinned(), digest, fetched })
        }
        PullAnswer::Failed(reason) => Err(failed(reason)),
    }
}

/// The image that is called `text`, pulled where `policy` says so.
///
/// # Errors
/// There is no such image, or it cannot be pulled.
pub fn ensure(
    store: &Store,
    text: &str,
    policy: PullPolicy,
    options: &PullOptions,
) -> Result<Named, ImageError> {
    if policy != PullPolicy::Always {
        match store.find(text) {
            Err(ImageError::NotFound(_)) if policy == PullPolicy::Missing => {}
            found => return found,
        }
    }
    Ok(pull(store, &text.parse()?, options)?.image)
}

fn ask(request: &PullRequest) -> Result<PullAnswer, String> {
    let program = program();
    let mut command = Command::new(&program);
    command.arg(serde_json::to_string(request).unwrap_or_default());
    let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = started.map_err(|e| {
        format!("{} cannot be run: {e}: install it beside microvm, or set MICROVM_PULL", program.display())
    })?;
    let mut answer = String::new();
    let read = child.stdout.take().map(|out| out.take(MAX_ANSWER).read_to_string(&mut answer));
    let status = child.wait().map_err(|e| format!("{}: {e}", program.display()))?;
    match read {
        Some(Ok(_)) if !answer.is_empty() => {
            serde_json::from_str(&answer).map_err(|e| format!("{} answers: {e}", program.display()))
        }
        _ => Err(ended(status)),
    }
}

fn ended(status: ExitStatus) -> String {
    format!("microvm-pull has ended without an answer ({status})")
}

/// `$MICROVM_PULL`, else beside this program.
fn program() -> PathBuf {
    let beside = || env::current_exe().unwrap_or_default().with_file_name("microvm-pull");
    env::var_os("MICROVM_PULL").map_or_else(beside, PathBuf::from)
}
