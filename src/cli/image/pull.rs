//! `microvm pull`, and `microvm image pull`.

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::config::Size;
use crate::image::{self, Limits, PullOptions, Pulled, Reference, Store};

use super::super::CliError;
use super::super::boot::parse_timeout;
use super::super::table::Format;

const AFTER_HELP: &str = "\
NAME is [REGISTRY/]REPOSITORY[:TAG][@DIGEST], as Docker has it: alpine is docker.io/library/alpine:latest.
Of an image for several machines, this one's is taken. What is there already is not downloaded again, and a
download that was interrupted is gone on with. Digests are checked.

A login is taken from what docker login and podman login have left ($DOCKER_CONFIG/config.json,
~/.docker/config.json, $XDG_RUNTIME_DIR/containers/auth.json). HTTPS_PROXY and NO_PROXY are heeded, SSL_CERT_FILE
names other authorities than the system's. A registry of this machine itself (localhost) may have no TLS.

Examples:
  microvm pull alpine
  microvm pull ghcr.io/owner/app:1.2
  microvm pull --plain-http registry.lan:5000/app
  id=$(microvm pull -q debian:12)";

/// Flags of `microvm pull`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct PullArgs {
    /// The image
    #[arg(value_name = "NAME")]
    reference: Reference,
    /// Speak HTTP without TLS, as some registries in a network of one's own do: passwords can be read on the way
    #[arg(long)]
    plain_http: bool,
    /// How long the registry may say nothing
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_timeout)]
    timeout: Duration,
    /// The most that one layer may be, unpacked
    #[arg(long, value_name = "SIZE", default_value_t = Size(Limits::default().bytes))]
    max_size: Size,
    /// Show no progress, and print the id alone
    #[arg(short, long)]
    quiet: bool,
    /// How the result is printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

pub(super) fn run(store: &Store, args: &PullArgs) -> Result<(), CliError> {
    if args.timeout.is_zero() {
        return Err(CliError::Usage(
            "--timeout 0: give a time in which a registry can answer, as 30s".into(),
        ));
    }
    let options = PullOptions {
        plain_http: args.plain_http,
        timeout: args.timeout,
        max_layer: args.max_size.0,
        quiet: args.quiet,
    };
    let pulled = image::pull(store, &args.reference, &options)?;
    writeln!(io::stdout().lock(), "{}", line(&pulled, args))?;
    Ok(())
}

fn line(pulled: &Pulled, args: &PullArgs) -> String {
    let record = &pulled.image.record;
    match (args.quiet, args.format) {
        (_, Format::Json) => json!({
            "id": record.config,
            "digest": record.manifest,
            "registry_digest": pulled.digest,
            "name": pulled.reference.to_string(),
            "fetched": pulled.fetched,
        })
        .to_string(),
        (true, _) => record.config.short(),
        _ => format!("{}  {}", record.config.short(), pulled.reference),
    }
}
