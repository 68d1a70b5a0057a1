//! `microvm run`: a container image in a virtual machine of its own.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::config::{MemoryConfig, is_name};
use crate::container::{Changes, Machine, Wanted};
use crate::control;
use crate::metrics::Clock;

use super::boot::{Format, Launch, parse_timeout};
use super::{CliError, say};

const AFTER_HELP: &str =
    "The image must be there (microvm image import), and a kernel (microvm kernel import).
Without -t the program has no input, and its output and errors come out as one.

Exit status: the program's, as its shell has it (128 and the signal's number where one ended it), and
  124  --timeout passed
  125  microvm itself failed, or the container could not be made
  126  the program may not be run
  127  the program is not there

Examples:
  microvm run alpine cat /etc/os-release
  microvm run -it alpine sh
  microvm run -e GREETING=hello -w /tmp -u nobody alpine env
  microvm run --memory 1G --cpus 2 --read-only python:3 python -c 'print(6 * 7)'";

/// Flags of `microvm run`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Give the program this terminal's keys; with -t alone
    #[arg(short, long, requires = "tty")]
    interactive: bool,
    /// Nothing of a container stays behind: always so
    #[arg(long)]
    rm: bool,
    /// What the VM is called in `microvm ps` and `microvm ctl` [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A variable of the program's environment; NAME alone takes its value from here; again for more
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The program's working folder
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// Who the program runs as, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Instead of the image's entry point; empty: none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// The guest's own name [default: the VM's]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Guest memory
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<MemoryConfig>,
    /// A kernel by its name in microvm kernel ls [default: the one of microvm kernel default]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Nothing can be written to the root file system
    #[arg(long)]
    read_only: bool,
    /// End the VM after this long, as 500ms, 30s or 2m
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    timeout: Option<Duration>,
    /// Where the time went, on standard error
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "human")]
    timeline: Option<Format>,
    /// Go on where /dev/kvm is a software KVM, which interprets the guest's kernel
    #[arg(long)]
    allow_software_kvm: bool,
    /// The image: a name, a digest or the first digits of an id
    image: String,
    /// The command and its arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// microvm's own failures must not be taken for the program's.
const OWN_FAILURE: u8 = 125;

pub(super) fn run(args: RunArgs, clock: Clock) -> Result<u8, CliError> {
    match start(args, clock) {
        Err(error) => {
            say(&super::chain(&error));
            Ok(OWN_FAILURE)
        }
        status => status,
    }
}

fn start(args: RunArgs, clock: Clock) -> Result<u8, CliError> {
    if args.tty && !io::stdin().is_terminal() {
        return Err(CliError::Usage("-t: standard input is no terminal: leave the flag out".into()));
    }
    let hostname = args.hostname.or_else(|| args.name.clone()).unwrap_or_else(control::default_name);
    if !is_name(&hostname) {
        return Err(CliError::Usage(format!("--hostname {hostname:?}: letters, digits, '.', '_' and '-'")));
    }
    let wanted = Wanted {
        image: args.image,
        hostname,
        changes: Changes {
            command: args.command,
            entrypoint: args.entrypoint,
            env: args.env.iter().filter_map(|word| variable(word)).collect(),
            workdir: args.workdir,
            user: args.user,
            terminal: args.tty,
        },
        read_only: args.read_only,
        kernel: args.kernel,
    };
    let Machine { mut config, lease, initramfs } = Machine::of(&wanted)?;
    config.name = args.name;
    config.cpus = args.cpus.unwrap_or(config.cpus);
    config.memory = args.memory.unwrap_or(config.memory);
    config.timeout = args.timeout;
    config.allow_software_kvm = args.allow_software_kvm;
    let launch = Launch {
        timeline: args.timeline,
        kvm_device: PathBuf::from("/dev/kvm"),
        metrics: None,
        until_built: Some(initramfs),
        until_end: Some(("the image that is in use", lease.file)),
    };
    launch.run(&config, clock)
}

/// As Docker: a name alone stands for this environment's value, if it has one.
fn variable(word: &str) -> Option<String> {
    match word.split_once('=') {
        Some(_) => Some(word.into()),
        None => std::env::var(word).ok().map(|value| format!("{word}={value}")),
    }
}
