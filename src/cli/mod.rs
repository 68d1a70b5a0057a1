//! The command line: one file per subcommand, flags to configuration and nothing else.

mod boot;
mod compare;
mod completions;
mod container;
mod ctl;
mod doctor;
mod image;
mod kernel;
mod man;
mod ps;
mod run;
mod table;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use thiserror::Error;

use crate::compare::CompareError;
use crate::container::ContainerError;
use crate::control::{ClientError, ControlError, PlaceError};
use crate::image::ImageError;
use crate::kernels::KernelError;
use crate::logger;
use crate::metrics::Clock;
use crate::vmm::{BuildError, RunError};

use container::{cp, exec, inspect, logs, rm, stats, stop, wait};

/// A small virtual machine monitor for KVM.
#[derive(Parser)]
#[command(name = "microvm", version, about, max_term_width = 110, after_help = EXAMPLES)]
struct Cli {
    /// Log more: once for information, twice for details, three times for all (RUST_LOG=... does the same)
    // Without a short form: -v is a volume to those who know Docker.
    #[arg(long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  microvm boot --kernel vmlinux --initrd initramfs.cpio
  microvm boot --kernel bzImage --cpus 2 --memory 1G --timeline
  microvm run -it alpine sh
  microvm ps
  microvm ctl NAME pause
  microvm doctor
  microvm pull alpine
  microvm image import alpine.tar

`microvm COMMAND --help` tells more of each.";

#[derive(Subcommand)]
enum Command {
    /// Boot a Linux kernel in a new virtual machine
    Boot(Box<boot::BootArgs>),
    /// Run a container image in a virtual machine of its own
    Run(Box<run::RunArgs>),
    /// Measure an image's command in a process, a container and a VM
    Compare(Box<compare::CompareArgs>),
    /// List this user's virtual machines and containers
    Ps(ps::PsArgs),
    /// Run another program in a running container
    Exec(Box<exec::ExecArgs>),
    /// Print what a container's program has printed
    Logs(logs::LogsArgs),
    /// Ask containers' programs to end, and end their VMs
    Stop(stop::StopArgs),
    /// Send containers' programs a signal
    Kill(stop::KillArgs),
    /// Wait until containers end, and print their exit status
    Wait(wait::WaitArgs),
    /// Remove containers that have ended
    Rm(rm::RmArgs),
    /// Remove all containers that have ended, and what dead VMs left
    Prune(rm::PruneArgs),
    /// Tell all of containers, as JSON
    Inspect(inspect::InspectArgs),
    /// Show what running VMs use
    Stats(stats::StatsArgs),
    /// Copy files and folders to or from a running container
    Cp(cp::CpArgs),
    /// Control a running virtual machine: state, pause, resume, stop, metrics, devices
    Ctl(ctl::CtlArgs),
    /// Keep guest kernels: import, ls, default, rm
    Kernel(kernel::KernelArgs),
    /// Tell what this host offers, and what to do about what it lacks
    Doctor(doctor::DoctorArgs),
    /// Get a container image from a registry
    Pull(image::pull::PullArgs),
    /// Pull, import, list and remove container images
    Image(image::ImageArgs),
    /// Print a shell's completions
    Completions(completions::CompletionsArgs),
    /// Write the man pages into a folder
    Man(man::ManArgs),
}

/// What goes wrong on the way.
#[derive(Debug, Error)]
pub enum CliError {
    /// Wrong usage.
    #[error("{0}")]
    Usage(String),
    /// A configuration file that cannot be used.
    #[error("--config {path}")]
    Config {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A configuration file that is not what it should be.
    #[error("--config {path}")]
    ConfigJson {
        /// The path.
        path: PathBuf,
        /// The reason, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// The VM cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The VM cannot be run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The file of `--metrics`.
    #[error("--metrics {path} cannot be written")]
    Metrics {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The control socket's place.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A VM that cannot be asked, or that refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A guest kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// An image, or the store of images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A container.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A comparison.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// The page of `compare --html`.
    #[error("--html {path} cannot be written")]
    Html {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A program's streams.
    #[error("the program's streams cannot be connected")]
    Streams(#[source] io::Error),
    /// A file or folder that is copied.
    #[error("{path}")]
    Copy {
        /// The path on the host.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A file of variables.
    #[error("--env-file {path}")]
    EnvFile {
        /// The path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A folder that cannot be written to.
    #[error("{folder} cannot be written to: give a folder that is there")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Standard output fails.
    #[error("standard output cannot be written")]
    Output(#[from] io::Error),
}

impl CliError {
    /// The exit status: 2 for wrong usage, 1 for a set-up that failed.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_)
            | Self::Config { .. }
            | Self::ConfigJson { .. }
            | Self::Build(BuildError::Config(_)) => 2,
            Self::Build(_)
            | Self::Run(_)
            | Self::Metrics { .. }
            | Self::Place(_)
            | Self::Control(_)
            | Self::Client(_)
            | Self::Kernel(_)
            | Self::Image(_)
            | Self::Container(_)
            | Self::Compare(_)
            | Self::Html { .. }
            | Self::Streams(_)
            | Self::EnvFile { .. }
            | Self::Copy { .. }
            | Self::Folder { .. }
            | Self::Output(_) => 1,
        }
    }
}

/// Prints one line on standard error. Where that cannot be written, nothing is left to tell, and the exit status still
/// says how it went.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "microvm: {line}");
}

/// An error and its sources on one line, outermost first.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |e| e.source());
    let line = sources.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    // A path or a JSON key may hold line breaks and a terminal's control codes.
    line.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

/// Parses the command line and runs the subcommand.
///
/// # Errors
/// What failed, on which flag or path, and what to do.
pub fn run(clock: Clock) -> Result<u8, CliError> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    logger::start(cli.verbose);
    match cli.command {
        Command::Boot(args) => boot::run(*args, clock),
        Command::Run(args) => run::run(*args, clock),
        Command::Compare(args) => compare::run(*args),
        Command::Ps(args) => ps::run(&args),
        Command::Exec(args) => exec::run(*args),
        Command::Logs(args) => logs::run(&args),
        Command::Stop(args) => stop::run_stop(&args),
        Command::Kill(args) => stop::run_kill(&args),
        Command::Wait(args) => wait::run(&args),
        Command::Rm(args) => rm::run_rm(&args),
        Command::Prune(args) => rm::run_prune(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Cp(args) => cp::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Kernel(args) => kernel::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Pull(args) => image::pull(&args),
        Command::Image(args) => image::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

/// Help goes to standard output, and errors become one line.
fn usage(error: &clap::Error) -> Result<u8, CliError> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            error.print()?;
            Ok(0)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            error.print()?;
            Ok(2)
        }
        _ => Err(CliError::Usage(one_line(&error.to_string()))),
    }
}

/// clap's message without its "error:", its usage block and its line breaks.
fn one_line(text: &str) -> String {
    let text = text.split("\n\nUsage:").next().unwrap_or_default();
    let text = text.split("\n\nFor more information").next().unwrap_or_default();
    let words: Vec<&str> = text.trim_start_matches("error: ").split_whitespace().collect();
    format!("{} (see --help)", words.join(" "))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_usage_error_is_one_line() {
        let error = Cli::try_parse_from(["microvm", "boot", "--memory", "x"]).err().unwrap();
        let line = one_line(&error.to_string());
        assert!(!line.contains('\n') && line.contains("--memory"), "{line}");
    }
}
