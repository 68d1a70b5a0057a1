//! A container in a VM: what an image says and what its user wants become a description for the guest and a VM's
//! configuration.

mod machine;
mod plan;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::image::ImageError;
use crate::kernels::KernelError;

pub use machine::{Machine, Wanted};
pub use plan::{Changes, plan};

/// A container cannot be made.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// Its image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Nothing to run.
    #[error("the image says no command: give one behind it")]
    NoCommand,
    /// No program for process 1.
    #[error(
        "{0} is needed as the guest's process 1: install it beside microvm, or set MICROVM_INIT to its path"
    )]
    NoInit(PathBuf, #[source] io::Error),
    /// The initramfs.
    #[error("the guest's initramfs cannot be made")]
    Initramfs(#[source] io::Error),
}
