//! A container in a VM: what an image says and what its user wants become a description for the guest and a VM's
//! configuration.

mod agent;
mod host;
mod log;
mod machine;
mod network;
mod plan;
mod program;
mod relay;
mod signal;
mod storage;
mod store;
mod streams;
mod volume;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::config::{MAX_PIECES, Size};
use crate::image::ImageError;
use crate::kernels::KernelError;

pub use agent::{Agent, exec, forget_dead_vms, forget_vm};
pub use host::{
    Cgroup, HostContainer, HostError, HostProcess, HostWishes, Isolation, Life, ParseIsolationError,
    exec_on_host, seccomp_profile,
};
pub use log::{LogReader, LogRecord};
pub use machine::{Machine, Wanted};
pub use network::{Address, Network, NetworkWishes, ParseAddressError};
pub use plan::{Changes, plan, set_variable};
pub use program::Program;
pub use relay::{Finish, Receiver, print};
pub use signal::{ParseSignalError, parse_signal};
pub use storage::make as make_storage;
pub use store::{
    Claim, Container, Containers, Ended, Leavings, Record, State, new_id, record_end, set_process,
};
pub use streams::{StreamOptions, Streams};
pub use volume::{ParseVolumeError, Volume};

/// A container cannot be made.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// Its image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// On the host's own kernel.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The image's `StopSignal`.
    #[error("the image's StopSignal")]
    StopSignal(#[from] ParseSignalError),
    /// Nothing to stack, or too much: a guest makes a partition of each.
    #[error(
        "image {image} has {layers} layers: what can be run has 1 to {MAX_PIECES}, so build it with that many"
    )]
    Layers {
        /// As it was asked for.
        image: String,
        /// How many it has.
        layers: usize,
    },
    /// Nothing to run.
    #[error("the image says no command: give one behind it")]
    NoCommand,
    /// No program for process 1.
    #[error(
        "{0} is needed as the guest's process 1: install it beside microvm, or set MICROVM_INIT to its path"
    )]
    NoInit(PathBuf, #[source] io::Error),
    /// Nowhere to keep them.
    #[error("there is no place for containers: set MICROVM_DATA or HOME to the absolute path of a folder")]
    NoPlace,
    /// Files and folders of containers.
    #[error("{path}")]
    Store {
        /// Which.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A disk that is too small.
    #[error("--storage {0}: the least is {1}")]
    StorageSize(Size, Size),
    /// Nothing that makes a file system.
    #[error("--storage: there is no mkfs.ext4 on this host: install it (sudo apt-get install e2fsprogs)")]
    NoMkfs,
    /// A volume's folder.
    #[error("--volume {path}: give a folder or a file that is there")]
    Volume {
        /// Which.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A name that none can have.
    #[error("--name {0:?}: letters, digits, '.', '_' and '-', at most 64, a letter or digit first")]
    Name(String),
    /// A name that another one has.
    #[error(
        "--name {0}: a container of this name is there: remove it (microvm rm {0}), or choose another name"
    )]
    NameTaken(String),
    /// There is none.
    #[error("there is no container {0}: microvm ps -a lists them")]
    NotFound(String),
    /// There are several.
    #[error("several containers' ids begin with {0}: give more of it")]
    Ambiguous(String),
    /// It runs.
    #[error("container {0} runs: stop it first (microvm stop {0}), or use --force")]
    Running(String),
    /// It does not run.
    #[error("container {0} does not run: microvm ps -a says how it ended")]
    NotRunning(String),
    /// It has no VM.
    #[error(
        "container {name} runs on the host's own kernel (--isolation {isolation}): cp and stats are for those in a VM"
    )]
    OnHost {
        /// Which.
        name: String,
        /// What it has instead.
        isolation: Isolation,
    },
    /// It cannot be sent a signal.
    #[error("container {name}: its process cannot be sent a signal")]
    Signal {
        /// Which.
        name: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Its guest does not answer.
    #[error("container {name}: its guest cannot be asked")]
    Agent {
        /// Which.
        name: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Its guest refuses.
    #[error("container {name}: {message}")]
    Refused {
        /// Which.
        name: String,
        /// In its words.
        message: String,
        /// The exit status that Docker has for it.
        status: u8,
    },
    /// The initramfs.
    #[error("the guest's initramfs cannot be made")]
    Initramfs(#[source] io::Error),
}
