//! `microvm image`: the images of this user.

mod import;
mod list;
mod progress;
pub(super) mod pull;
mod remove;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::image::{Store, export};

use super::CliError;

const AFTER_HELP: &str = "Images are in $MICROVM_DATA/images, else $XDG_DATA_HOME/microvm/images, else
~/.local/share/microvm/images.

IMAGE is a name (alpine, alpine:3.20, registry:5000/app@sha256:...), or an id or its first digits.

Exit status:
  0  done
  1  there is no such image, it is broken or in use, its registry cannot be had, or the store cannot be written
  2  wrong usage

Examples:
  microvm image pull alpine
  docker save alpine -o alpine.tar && microvm image import alpine.tar
  skopeo copy docker://alpine oci-archive:alpine.tar && microvm image import alpine.tar --name alpine
  microvm image import rootfs.tar.zst --name my/rootfs:1
  microvm image ls
  microvm image rm alpine
  microvm image export alpine -o alpine.tar";

/// Flags of `microvm image`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ImageArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Get an image from a registry
    Pull(pull::PullArgs),
    /// Bring in images of docker save, an OCI layout or archive, or a plain archive of files
    Import(import::ImportArgs),
    /// List images
    Ls(list::ListArgs),
    /// Tell all of images, as JSON
    Inspect(list::InspectArgs),
    /// Remove images, or names of them
    Rm(remove::RemoveArgs),
    /// Remove images that have no name, and whatever no image needs
    Prune(remove::PruneArgs),
    /// Write an image as an OCI archive
    Export(ExportArgs),
}

const EXPORT_HELP: &str = "Examples:
  microvm image export alpine -o alpine.tar
  skopeo inspect oci-archive:alpine.tar";

/// Flags of `microvm image export`.
#[derive(Args)]
#[command(after_help = EXPORT_HELP)]
struct ExportArgs {
    /// The image
    image: String,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// `microvm pull`, which is `microvm image pull`.
pub(super) fn pull(args: &pull::PullArgs) -> Result<u8, CliError> {
    pull::run(&Store::open()?, args)?;
    Ok(0)
}

pub(super) fn run(args: &ImageArgs) -> Result<u8, CliError> {
    let store = Store::open()?;
    match &args.command {
        Command::Pull(args) => pull::run(&store, args)?,
        Command::Import(args) => import::run(&store, args)?,
        Command::Ls(args) => list::run(&store, args)?,
        Command::Inspect(args) => list::inspect(&store, args)?,
        Command::Rm(args) => return remove::run(&store, args),
        Command::Prune(args) => remove::prune(&store, args)?,
        Command::Export(args) => export(&store, &store.find(&args.image)?, &args.output)?,
    }
    Ok(0)
}
