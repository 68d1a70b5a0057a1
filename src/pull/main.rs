//! `microvm-pull`: gets one image from a registry into the store, for `microvm`.
//!
//! Its one argument is a [`PullRequest`], its standard output gets a [`PullAnswer`]; bars of progress go to standard error.
//!
//! ```text
//! request -> registry: names, login, redirects, retries -> manifest -> blobs: partial, resumed, verified -> store -> image
//! ```

mod auth;
mod bars;
mod credentials;
mod download;
mod error;
mod http;
mod image;
mod registry;

use std::env;
use std::io::{self, Write};
use std::os::unix::process::parent_id;
use std::process::ExitCode;

use microvm::cli::chain;
use microvm::image::{PullAnswer, PullRequest};
use microvm::sys::names;
use rustix::process::{Signal, set_parent_process_death_signal};

use error::PullError;

fn main() -> ExitCode {
    let argument = env::args().nth(1).unwrap_or_default();
    let Ok(request) = serde_json::from_str::<PullRequest>(&argument) else {
        eprintln!("microvm-pull: `microvm pull` runs this program; by itself it does nothing");
        return ExitCode::from(2);
    };
    let answer = answer(&request).unwrap_or_else(|error| PullAnswer::Failed(chain(&error)));
    let written = serde_json::to_writer(io::stdout(), &answer).map_err(io::Error::from);
    match written.and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn answer(request: &PullRequest) -> Result<PullAnswer, PullError> {
    // Whoever waits for the image is gone: what is there of it stays, to be resumed.
    set_parent_process_death_signal(Some(Signal::TERM)).map_err(io::Error::from)?;
    // It may have gone before that was said.
    if parent_id() != request.process {
        return Err(PullError::Orphan);
    }
    names::use_built_in();
    image::pull(request)
}
