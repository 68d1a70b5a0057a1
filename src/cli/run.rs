//! `microvm run`: a container image in a virtual machine of its own.

mod host;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::config::{HostEnd, MemoryConfig, Publish, Size, is_name};
use crate::container::{
    Address, Changes, Claim, ContainerError, Containers, Isolation, Machine, Network, NetworkWishes, Program,
    Record, StreamOptions, Streams, Volume, Wanted, make_storage, new_id, record_end, set_process,
};
use crate::guest::TerminalSize;
use crate::guest::status::{KILLED, NOT_STARTED};
use crate::image::PullPolicy;
use crate::metrics::Clock;
use crate::sys::daemon::{Detached, Ready, Waiting, detach};
use crate::vmm::{End, Vmm};

use super::boot::{Format, Launch, parse_timeout};
use super::{CliError, say};

const AFTER_HELP: &str =
    "The image is pulled where it is not there; a kernel must be (microvm kernel import).
A signal that comes for microvm goes to the program: Ctrl-C ends it as it would here.

Exit status: the program's, as its shell has it (128 and the signal's number where one ended it), and
  124  --timeout passed
  125  microvm itself failed, or the container could not be made
  126  the program may not be run
  127  the program is not there
  137  the container was killed

Examples:
  microvm run alpine cat /etc/os-release
  microvm run -it --rm alpine sh
  echo hello | microvm run -i --rm alpine tr a-z A-Z
  microvm run -d --name web -p 8080:80 nginx && microvm logs -f web
  microvm run --rm -v ./src:/src:ro -v cache:/cache -w /src rust cargo build
  microvm run -d --name web -p 8080:80 -v ./nginx.conf:/etc/nginx/nginx.conf:ro nginx
  microvm run -e GREETING=hello -w /tmp -u nobody alpine env
  sudo microvm run --rm --isolation container alpine id      # the same image on the host's kernel
  microvm run --memory 1G --cpus 2 --read-only python:3 python -c 'print(6 * 7)'";

/// Flags of `microvm run`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Give the program this command's standard input
    #[arg(short, long)]
    interactive: bool,
    /// Go on in the background, and print the container's id
    #[arg(short, long, conflicts_with_all = ["tty", "interactive", "timeline"])]
    detach: bool,
    /// Remove the container when it ends: microvm ps -a and microvm logs do not know it then
    #[arg(long)]
    rm: bool,
    /// What the container is called [default: its id]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A variable of the program's environment; NAME alone takes its value from here; again for more
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// A file of such variables, one a line; # begins a remark; again for more
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// The program's working folder
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// Who the program runs as, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Instead of the image's entry point; empty: none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// The guest's own name [default: the container's]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// How it reaches the world: none, user[,OPTION...] or tap=NAME[,OPTION...], with the options of boot --net
    /// [default: user]
    #[arg(long, value_name = "NETWORK")]
    network: Option<Network>,
    /// A port of the host's leads to one of the container's; again for more
    #[arg(short, long, value_name = "[ADDRESS:]HOST:PORT[/tcp|udp]")]
    publish: Vec<Publish>,
    /// A folder or a file of the host's in the container; with a name for HOST a folder that is kept for it, without one a
    /// folder that goes with the container; again for more
    #[arg(short, long, value_name = "[HOST:]CONTAINER[:ro]")]
    volume: Vec<Volume>,
    /// Its address on a tap, as 172.30.0.2/24
    #[arg(long, value_name = "ADDRESS/BITS", requires = "network")]
    ip: Option<Address>,
    /// Its way to all others from a tap
    #[arg(long, value_name = "ADDRESS", requires = "ip")]
    gateway: Option<Ipv4Addr>,
    /// When to get the image from its registry: missing, always or never
    #[arg(long, value_name = "POLICY", default_value = "missing", value_parser = parse_policy)]
    pull: PullPolicy,
    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Guest memory
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<MemoryConfig>,
    /// What is between the program and the host: vm, container (by crun or runc, on the host's kernel) or process (another
    /// root folder alone, on the host's network); the latter two are to compare with, and need root
    #[arg(long, value_name = "HOW", default_value_t)]
    isolation: Isolation,
    /// Where the container's control group is made, from the root of the hierarchy
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    cgroup_parent: Option<String>,
    /// A kernel by its name in microvm kernel ls [default: the one of microvm kernel default]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Put what it writes on a disk of this size instead of into its memory; the file takes what is written
    #[arg(long, value_name = "SIZE", conflicts_with = "read_only")]
    storage: Option<Size>,
    /// Nothing can be written to the root file system
    #[arg(long)]
    read_only: bool,
    /// End it after this long, as 500ms, 30s or 2m
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    timeout: Option<Duration>,
    /// Where the time went, on standard error
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "human")]
    timeline: Option<Format>,
    /// Write all counters as JSON to a file when the VM has ended
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Where the guest's serial port goes, to see its kernel: stdio, null or file=PATH
    #[arg(long, value_name = "WHERE", value_parser = OsStringValueParser::new().try_map(|text| HostEnd::parse(&text)),
          hide_short_help = true)]
    serial: Option<HostEnd>,
    /// Go on where /dev/kvm is a software KVM, which interprets the guest's kernel
    #[arg(long)]
    allow_software_kvm: bool,
    /// The image: a name, a digest or the first digits of an id
    image: String,
    /// The command and its arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(super) fn run(args: RunArgs, clock: Clock) -> Result<u8, CliError> {
    match start(args, clock) {
        Err(error) => {
            say(&super::chain(&error));
            // Not to be taken for the program's.
            Ok(NOT_STARTED)
        }
        status => status,
    }
}

fn start(args: RunArgs, clock: Clock) -> Result<u8, CliError> {
    if args.tty && !io::stdin().is_terminal() {
        return Err(CliError::Usage("-t: standard input is no terminal: leave the flag out".into()));
    }
    let id = new_id();
    let name = args.name.clone().unwrap_or_else(|| id.clone());
    if !is_name(&name) {
        return Err(ContainerError::Name(name).into());
    }
    let containers = Containers::of_user()?;
    let wanted = wanted(&args, name, containers.folder_of(&id))?;
    if args.isolation != Isolation::Vm {
        return host::run(&args, &id, &wanted, clock);
    }
    let machine = Machine::of(&wanted)?;
    let claim = containers.add(&record(&args, &id, &wanted, &machine.program))?;
    let ready = match args.detach.then(detach).transpose()? {
        Some(Detached::Parent(waiting)) => {
            // The other process has them: here they would keep an ended container from being seen as one.
            drop((machine, claim));
            return announce(waiting, &id);
        }
        Some(Detached::Child(ready)) => Some(ready),
        None => None,
    };
    run_here(args, machine, claim, ready, clock)
}

fn record(args: &RunArgs, id: &str, wanted: &Wanted, program: &Program) -> Record {
    Record {
        id: id.into(),
        name: wanted.name.clone(),
        image: args.image.clone(),
        image_id: program.image_id.clone(),
        created: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        process: program.process.clone(),
        stop_signal: program.stop_signal,
        rm: args.rm,
        ports: args.publish.iter().map(ToString::to_string).collect(),
        volumes: args.volume.iter().map(ToString::to_string).collect(),
        isolation: args.isolation,
    }
}

/// Waits for the process that goes on in the background.
fn announce(waiting: Waiting, id: &str) -> Result<u8, CliError> {
    match waiting.wait()? {
        Some(status) => Ok(status),
        None => {
            writeln!(io::stdout(), "{id}")?;
            Ok(0)
        }
    }
}

/// Runs the VM in this process.
fn run_here(
    args: RunArgs,
    machine: Machine,
    claim: Claim,
    ready: Option<Ready>,
    clock: Clock,
) -> Result<u8, CliError> {
    let Machine { mut config, initramfs, program, new_volumes } = machine;
    let lease = program.lease;
    config.cpus = args.cpus.unwrap_or(config.cpus);
    config.memory = args.memory.clone().unwrap_or(config.memory);
    config.timeout = args.timeout;
    config.allow_software_kvm = args.allow_software_kvm;
    let Claim { folder, lock, end, log, leavings } = claim;
    let unused = folder.clone();
    let storage = args.storage.map(|size| make_storage(&folder, size)).transpose();
    let volumes = make_volumes(&args, &folder);
    let attached = ready.is_none();
    let options = StreamOptions { input: args.interactive, terminal: args.tty, attached, ready, new_volumes };
    let rm = args.rm;
    let prepare = move |vmm: &mut Vmm| {
        drop(initramfs);
        set_process(&lock).map_err(|source| ContainerError::Store { path: folder, source })?;
        let streams = Streams::connect(vmm, options, log).map_err(CliError::Streams)?;
        vmm.add_service(Box::new(streams));
        vmm.keep("the image that is in use", &lease.file);
        vmm.keep("the container's lock", &lock);
        vmm.keep("how the container ended", &end);
        if rm {
            vmm.add_service(Box::new(leavings));
        }
        vmm.at_end(Box::new(move |how| {
            if let Err(e) = record_end(&end, status_of(how)) {
                log::warn!("how the container ended cannot be written down: {e}");
            }
            drop((lock, lease));
        }));
        Ok(())
    };
    let launch = Launch {
        timeline: args.timeline,
        kvm_device: PathBuf::from("/dev/kvm"),
        metrics: args.metrics,
        prepare: Some(Box::new(prepare)),
    };
    let ended = volumes.and(storage).map_err(CliError::from).and_then(|storage| {
        config.disks.extend(storage);
        launch.run(&config, clock)
    });
    match ended {
        Ok(end) => Ok(status_of(&end)),
        // Confined by then: nothing can be removed any more, and the container is known as dead.
        Err(e @ CliError::Run(_)) => Err(e),
        Err(e) => {
            // What never ran is no container.
            let _ = fs::remove_dir_all(unused);
            Err(e)
        }
    }
}

/// Makes the volumes that go with the container. With `--rm` another process removes them: this one may not look at what its
/// guest has made, when that is due.
fn make_volumes(args: &RunArgs, folder: &Path) -> Result<(), ContainerError> {
    let mut volumes = args.volume.iter().enumerate();
    volumes.try_for_each(|(number, volume)| volume.make(number, folder))?;
    if args.rm && args.volume.iter().any(Volume::is_anonymous) {
        let left = Containers::of_user()?.clean_behind(folder);
        left.map_err(|source| ContainerError::Store { path: folder.into(), source })?;
    }
    Ok(())
}

/// The container's exit status.
fn status_of(end: &End) -> u8 {
    match end {
        End::Stop => KILLED,
        // Not the program's end.
        End::Panic | End::Fault(_) => NOT_STARTED,
        other => other.exit_status(),
    }
}

fn wanted(args: &RunArgs, name: String, folder: PathBuf) -> Result<Wanted, CliError> {
    let hostname = args.hostname.clone().unwrap_or_else(|| name.clone());
    if !is_name(&hostname) {
        return Err(CliError::Usage(format!(
            "--hostname {hostname:?}: letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
        )));
    }
    for (number, volume) in args.volume.iter().enumerate() {
        if args.volume[..number].iter().any(|other| other.target() == volume.target()) {
            return Err(CliError::Usage(format!("--volume {volume}: there is another one at this place")));
        }
    }
    let files = args.env_file.iter().map(|path| read_env_file(path));
    let mut env: Vec<String> = files.collect::<Result<Vec<_>, _>>()?.concat();
    for word in &args.env {
        env.extend(variable(word)?);
    }
    Ok(Wanted {
        image: args.image.clone(),
        name,
        folder,
        hostname,
        changes: Changes {
            command: args.command.clone(),
            entrypoint: args.entrypoint.clone(),
            env,
            workdir: args.workdir.clone(),
            user: args.user.clone(),
            terminal: args.tty,
            input: args.interactive,
            size: TerminalSize::here().filter(|_| args.tty),
        },
        storage: args.storage.is_some(),
        read_only: args.read_only,
        kernel: args.kernel.clone(),
        network: NetworkWishes { network: args.network.clone(), address: args.ip, gateway: args.gateway },
        publish: args.publish.clone(),
        volumes: args.volume.clone(),
        pull: args.pull,
        serial: args.serial.clone(),
    })
}

/// As Docker: a variable a line; empty lines and those that begin with `#` are none.
fn read_env_file(path: &Path) -> Result<Vec<String>, CliError> {
    let text = fs::read_to_string(path).map_err(|source| CliError::EnvFile { path: path.into(), source })?;
    let lines = text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let variables = lines.map(|line| {
        variable(line).map_err(|e| CliError::Usage(format!("--env-file {}: {e}", path.display())))
    });
    Ok(variables.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
}

fn parse_policy(text: &str) -> Result<PullPolicy, String> {
    match text {
        "missing" => Ok(PullPolicy::Missing),
        "always" => Ok(PullPolicy::Always),
        "never" => Ok(PullPolicy::Never),
        _ => Err("allowed are missing, always and never".into()),
    }
}

/// As Docker: a name alone stands for this environment's value, if it has one.
pub(super) fn variable(word: &str) -> Result<Option<String>, CliError> {
    match word.split_once('=') {
        Some(("", _)) => Err(CliError::Usage(format!("the variable {word:?} has no name: write NAME=VALUE"))),
        Some(_) => Ok(Some(word.into())),
        None => Ok(std::env::var(word).ok().map(|value| format!("{word}={value}"))),
    }
}
