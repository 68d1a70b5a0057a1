//! The same image on the host's own kernel, to compare with: as an ordinary container, or in a plain chroot.
//!
//! `microvm` itself enters a mount name space, mounts everything there and waits. Its child is process 1 of a process name
//! space ([`keeper`]) and starts the program or the container runtime. So whatever is killed, the kernel kills and unmounts
//! the rest.

mod cgroup;
mod chroot;
mod exec;
mod isolation;
mod keeper;
mod network;
mod oci;
mod output;
mod process;
mod rootfs;
mod runtime;
mod seccomp;
mod supervise;

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Uid, geteuid};
use thiserror::Error;

use crate::config::NetConfig;
use crate::devices::virtio::net::PasstError;
use crate::guest::status::NOT_STARTED;
use crate::guest::users::User;
use crate::guest::{NetworkSpec, ProcessSpec, hosts, resolv_conf};
use crate::image::Lease;
use crate::metrics::{Phase, Timeline};
use crate::sys::daemon::Ready;
use crate::sys::data::data_folder;
use crate::sys::exec_watch::ExecWatch;

use super::log::LogWriter;
use super::network::connect;
use super::program::Program;
use super::volume::{Placed, claim_new};
use super::{ContainerError, Wanted, storage};
use chroot::Chroot;
use keeper::Keeper;
use network::HostNetwork;
use oci::{Bind, Bundle};
use output::Output;
use rootfs::RootFs;
use runtime::Runtime;
use supervise::Supervisor;

pub use cgroup::Cgroup;
pub use exec::exec_on_host;
pub use isolation::{Isolation, ParseIsolationError};
pub use process::HostProcess;

/// A container cannot be made on the host.
#[derive(Debug, Error)]
pub enum HostError {
    /// Layers are mounted.
    #[error(
        "--isolation container and process mount the image's layers: run microvm as root (sudo microvm run …)"
    )]
    NotRoot,
    /// No runtime.
    #[error("--isolation container needs crun or runc: install one (sudo apt install crun)")]
    NoRuntime,
    /// Limits need control groups.
    #[error("--memory and --cpus need control groups of version 2 at /sys/fs/cgroup: leave the flags out")]
    NoCgroups,
    /// Control groups.
    #[error("a control group cannot be made")]
    Cgroup(#[source] io::Error),
    /// A network.
    #[error("a network name space cannot be had")]
    Network(#[source] io::Error),
    /// Name spaces.
    #[error("name spaces of its own cannot be had")]
    Namespace(#[source] io::Error),
    /// A file, folder or layer.
    #[error("{path}")]
    Path {
        /// Which.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The layers cannot be stacked.
    #[error("the root file system (overlayfs) cannot be mounted")]
    Overlay(#[source] io::Error),
    /// No such user.
    #[error("{0}")]
    User(String),
    /// The runtime could not make it.
    #[error("{message}")]
    Runtime {
        /// In its words.
        message: String,
        /// The exit status that Docker has for it.
        status: u8,
    },
    /// Waiting fails.
    #[error("the container cannot be watched")]
    Watch(#[source] io::Error),
}

/// Says of which path an error is.
fn at(path: &Path) -> impl Fn(io::Error) -> HostError + '_ {
    move |source| HostError::Path { path: path.into(), source }
}

/// Why a program was not run, in its process.
struct NotRun {
    status: u8,
    message: String,
}

/// What a container on the host is to be besides [`Wanted`].
#[derive(Clone, Debug)]
pub struct HostWishes {
    /// How it is kept apart: as an ordinary container, else in a plain chroot.
    pub isolation: Isolation,
    /// Most memory, in bytes.
    pub memory: Option<u64>,
    /// Most processors.
    pub cpus: Option<u32>,
    /// It is killed after this long.
    pub timeout: Option<Duration>,
    /// Where its control group is made, from the root of the hierarchy.
    pub cgroup_parent: Option<String>,
}

/// What a container has while it runs.
pub struct Life {
    /// Its process's number is put here.
    pub lock: File,
    /// What it prints goes here, unless it has a terminal.
    pub log: LogWriter,
    /// Who waits until the program runs; what it prints is shown where nobody does.
    pub ready: Option<Ready>,
}

/// What there is of a container before anything of it is made.
pub struct HostContainer {
    /// Its program.
    pub program: Program,
    runtime: Option<Runtime>,
    card: Option<NetConfig>,
    network: Option<NetworkSpec>,
}

impl HostContainer {
    /// Finds the image and what runs it.
    ///
    /// # Errors
    /// Something is not there: what, and what to do.
    pub fn of(wanted: &Wanted, isolation: Isolation) -> Result<Self, ContainerError> {
        if !geteuid().is_root() {
            return Err(HostError::NotRoot.into());
        }
        let is_container = isolation == Isolation::Container;
        let runtime = is_container.then(Runtime::find).transpose()?;
        let program = Program::of(wanted)?;
        // A process is where this host is.
        let network = is_container.then(|| connect(&wanted.network, !wanted.publish.is_empty()));
        let (card, network) = network.unwrap_or_default();
        Ok(Self { program, runtime, card, network })
    }

    /// Runs it to its end, and returns its exit status.
    ///
    /// # Errors
    /// It cannot be made: what failed, and what to do.
    pub fn run(
        self,
        wanted: &Wanted,
        wishes: &HostWishes,
        life: Life,
        timeline: &Timeline,
    ) -> Result<u8, ContainerError> {
        timeline.mark(Phase::Start);
        let host = self.make(wanted, wishes)?;
        let status = host.run(wanted, wishes, life, timeline)?;
        drop(host);
        timeline.mark(Phase::End);
        Ok(status)
    }

    fn make(self, wanted: &Wanted, wishes: &HostWishes) -> Result<Host, ContainerError> {
        let Self { program, runtime, card, network } = self;
        let Program { lease, layers, process, .. } = program;
        let volumes = wanted.volumes.iter().enumerate();
        let volumes = volumes.map(|(number, volume)| volume.place(number, &wanted.folder));
        let mut volumes = volumes.collect::<Result<Vec<_>, _>>()?;
        volumes.sort_by(|a, b| a.target.cmp(&b.target));
        let cgroup = make_cgroup(wanted, wishes)?;
        let work = data_folder().ok_or(ContainerError::NoPlace)?.join("mnt");
        let names = match &runtime {
            Some(_) => resolv_conf(network.as_ref()),
            None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        };
        let files = [
            ("/etc/hostname", format!("{}\n", wanted.hostname)),
            ("/etc/hosts", hosts(&wanted.hostname, network.map(|network| network.address))),
            ("/etc/resolv.conf", names),
        ];
        let storage = wanted.storage.then(|| wanted.folder.join(storage::FILE));
        let root = RootFs::mount(&work, &layers, &files, storage.as_deref())?;
        let user = root.user(&process.user)?;
        let claims = claim_new(&mut volumes)?;
        volumes.iter().filter(|volume| volume.fill).try_for_each(|volume| root.fill(volume))?;
        drop(claims);
        let network = card.map(|card| HostNetwork::make(&root.work, card, wanted.publish.clone()));
        let network = network.transpose().map_err(HostError::Network)?;
        Ok(Host { process, user, root, volumes, network, runtime, cgroup, _lease: lease })
    }
}

/// What is there before the program is.
struct Host {
    process: ProcessSpec,
    user: User,
    root: RootFs,
    /// Those that lie in others behind these.
    volumes: Vec<Placed>,
    network: Option<HostNetwork>,
    runtime: Option<Runtime>,
    cgroup: Option<Cgroup>,
    _lease: Lease,
}

impl Host {
    fn run(
        &self,
        wanted: &Wanted,
        wishes: &HostWishes,
        life: Life,
        timeline: &Timeline,
    ) -> Result<u8, HostError> {
        let Life { lock, log, ready } = life;
        // Who waits for the program wants to know when it runs, too.
        let watch = (timeline.is_on() || ready.is_some()).then(|| ExecWatch::new(&self.root.path()));
        let watch = watch.and_then(|watch| {
            watch.map_err(|e| log::warn!("the program's start cannot be seen (fanotify): {e}")).ok()
        });
        // A terminal is the program's as it is.
        let output = (!self.process.terminal).then(Output::new).transpose().map_err(HostError::Watch)?;
        let mut foreign: Vec<_> = output.iter().flat_map(Output::own_ends).collect();
        foreign.extend(watch.as_ref().map(AsRawFd::as_raw_fd));
        foreign.extend(ready.as_ref().map(AsRawFd::as_raw_fd));
        let clean_up = || self.cgroup.iter().for_each(Cgroup::remove);
        let keeper = match &self.runtime {
            Some(runtime) => {
                self.write_config(wanted, wishes)?;
                let program = || runtime.become_it(&wanted.name, &self.root.work, self.cgroup.is_some());
                Keeper::start(|| self.become_program(output.as_ref(), program), clean_up, foreign)
            }
            None => {
                let chroot = self.chroot(wanted, wishes)?;
                let program = || chroot.become_it();
                Keeper::start(|| self.become_program(output.as_ref(), program), clean_up, foreign)
            }
        };
        let keeper = keeper.map_err(HostError::Namespace)?;
        let is_seen = self.is_of_image();
        let supervisor = Supervisor { keeper, watch, is_seen, ready, timeout: wishes.timeout, timeline };
        let status = supervisor.supervise(&lock, output, log)?;
        match self.runtime.as_ref().and_then(|_| runtime::failure(&self.root.work)) {
            Some((message, status)) => Err(HostError::Runtime { message, status }),
            None => Ok(status),
        }
    }

    /// Whether the program is one of the image's, and not of a volume's, whose file system is not watched.
    fn is_of_image(&self) -> bool {
        let Some(program) = self.process.args.first() else { return false };
        let path = self.process.env.iter().find_map(|word| word.strip_prefix("PATH=")).unwrap_or_default();
        let candidates: Vec<_> = if program.contains('/') {
            vec![Path::new(&self.process.cwd).join(program)]
        } else {
            path.split(':').map(|folder| Path::new(folder).join(program)).collect()
        };
        let is_covered = |path: &Path| self.volumes.iter().any(|volume| path.starts_with(&volume.target));
        for candidate in candidates {
            if is_covered(&candidate) {
                return false;
            }
            if let Some(real) = self.root.real_path(&candidate) {
                return !is_covered(&real);
            }
        }
        // There is none, as far as can be seen from here: its end says so.
        self.volumes.is_empty()
    }

    /// In the program's process: what it needs besides files, and then `program`, which returns only where it is not run.
    fn become_program(&self, output: Option<&Output>, program: impl FnOnce() -> NotRun) -> u8 {
        let errors = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3);
        if let Some(Err(e)) = self.network.as_ref().map(HostNetwork::connect) {
            eprintln!("microvm: {}", of_network(&e));
            return NOT_STARTED;
        }
        if let Err(e) = self.put_streams(output) {
            eprintln!("microvm: the program's streams: {e}");
            return NOT_STARTED;
        }
        let NotRun { status, message } = program();
        // It is not the program that says so.
        let _ = errors.and_then(rustix::stdio::dup2_stderr);
        eprintln!("microvm: {message}");
        status
    }

    fn put_streams(&self, output: Option<&Output>) -> io::Result<()> {
        put_input(&self.process)?;
        let Some(output) = output else { return Ok(()) };
        output.put()?;
        // Programs open /dev/stdout again by its name, which is for the owner of the pipe alone.
        let user = Some(Uid::from_raw(self.user.uid));
        rustix::fs::fchown(rustix::stdio::stdout(), user, None)?;
        Ok(rustix::fs::fchown(rustix::stdio::stderr(), user, None)?)
    }

    fn write_config(&self, wanted: &Wanted, wishes: &HostWishes) -> Result<(), HostError> {
        let file = |path: &&str| Bind {
            source: self.root.source_of(path).display().to_string(),
            target: path.to_string(),
            options: &[],
        };
        let volume = |volume: &Placed| Bind {
            source: volume.source.display().to_string(),
            target: volume.target.clone(),
            options: if volume.read_only { &["nodev", "ro"] } else { &["nodev"] },
        };
        let bundle = Bundle {
            process: &self.process,
            user: &self.user,
            hostname: &wanted.hostname,
            root: self.root.path().display().to_string(),
            read_only: wanted.read_only,
            binds: self.root.files.iter().map(file).chain(self.volumes.iter().map(volume)).collect(),
            network: self.network.as_ref().map(|network| network.path.display().to_string()),
            run: self.root.is_empty("run"),
            cgroup: self.cgroup.as_ref().map(|group| format!("{}/container", group.name())),
            memory: wishes.memory,
            cpus: wishes.cpus,
            seccomp: seccomp::installed(&oci::CAPABILITIES).map(|(_, profile)| profile),
        };
        let path = self.root.work.join("config.json");
        fs::write(&path, bundle.to_config().to_string()).map_err(at(&path))
    }

    fn chroot<'a>(&'a self, wanted: &'a Wanted, wishes: &HostWishes) -> Result<Chroot<'a>, HostError> {
        let enter = |group: &Cgroup| {
            group.limit(wishes.memory, wishes.cpus)?;
            group.entrance()
        };
        Ok(Chroot {
            root: &self.root,
            process: &self.process,
            user: &self.user,
            hostname: &wanted.hostname,
            read_only: wanted.read_only,
            run: self.root.is_empty("run"),
            volumes: &self.volumes,
            entrance: self.cgroup.as_ref().map(enter).transpose().map_err(HostError::Cgroup)?,
        })
    }
}

/// A program without input finds the end of it.
fn put_input(process: &ProcessSpec) -> io::Result<()> {
    if !process.input && !process.terminal {
        rustix::stdio::dup2_stdin(rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty())?)?;
    }
    Ok(())
}

/// Where the seccomp profile is that a container is given; none is where nobody has installed one.
#[must_use]
pub fn seccomp_profile() -> Option<&'static str> {
    seccomp::installed(&oci::CAPABILITIES).map(|(path, _)| path)
}

/// With its reason, on one line.
fn of_network(error: &PasstError) -> String {
    let source = error.source().map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

/// A container has one wherever there can be one, a process where it is needed.
fn make_cgroup(wanted: &Wanted, wishes: &HostWishes) -> Result<Option<Cgroup>, HostError> {
    let has_limits = wishes.memory.is_some() || wishes.cpus.is_some();
    let is_needed = has_limits || wishes.cgroup_parent.is_some();
    match Cgroup::is_there() {
        false if has_limits => Err(HostError::NoCgroups),
        true if is_needed || wishes.isolation == Isolation::Container => {
            let group = Cgroup::make(wishes.cgroup_parent.as_deref(), &wanted.name);
            group.map(Some).map_err(HostError::Cgroup)
        }
        _ => Ok(None),
    }
}
