//! The same image on the host's own kernel, to compare with: as an ordinary container, or in a plain chroot.
//!
//! `microvm` itself enters a mount name space, mounts everything there and waits. Its child is process 1 of a process name
//! space ([`keeper`]) and starts the program or the container runtime. So whatever is killed, the kernel kills and unmounts
//! the rest.

mod cgroup;
mod chroot;
mod isolation;
mod keeper;
mod oci;
mod rootfs;
mod runtime;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;

use crate::guest::users::User;
use crate::guest::{ProcessSpec, hosts};
use crate::image::Lease;
use crate::metrics::{Phase, Timeline};
use crate::sys::data::data_folder;
use crate::sys::exec_watch::ExecWatch;
use crate::sys::signals::{Sender, Signal, Signals};

use super::program::Program;
use super::{ContainerError, Wanted};
use chroot::Chroot;
use keeper::Keeper;
use oci::{Bind, Bundle};
use rootfs::RootFs;
use runtime::Runtime;

pub use cgroup::Cgroup;
pub use isolation::{Isolation, ParseIsolationError};

/// As of `timeout`.
const TIMED_OUT: u8 = 124;

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

/// Runs a container on the host to its end, and returns its exit status. What it prints goes where this process's output
/// goes.
///
/// # Errors
/// It cannot be made: what failed, and what to do.
pub fn run_on_host(wanted: &Wanted, wishes: &HostWishes, timeline: &Timeline) -> Result<u8, ContainerError> {
    timeline.mark(Phase::Start);
    let host = Host::new(wanted, wishes)?;
    let status = host.run(wanted, wishes, timeline)?;
    timeline.mark(Phase::End);
    Ok(status)
}

/// What is there before the program is.
struct Host {
    process: ProcessSpec,
    user: User,
    root: RootFs,
    runtime: Option<Runtime>,
    cgroup: Option<Cgroup>,
    _lease: Lease,
}

impl Host {
    fn new(wanted: &Wanted, wishes: &HostWishes) -> Result<Self, ContainerError> {
        let is_container = wishes.isolation == Isolation::Container;
        if !geteuid().is_root() {
            return Err(HostError::NotRoot.into());
        }
        let runtime = is_container.then(Runtime::find).transpose()?;
        let Program { lease, layers, process, .. } = Program::of(wanted)?;
        let cgroup = make_cgroup(wanted, wishes)?;
        let work = data_folder().ok_or(ContainerError::NoPlace)?.join("mnt");
        let root = RootFs::mount(&work, &layers, &files(&wanted.hostname, is_container))?;
        let user = root.user(&process.user)?;
        Ok(Self { process, user, root, runtime, cgroup, _lease: lease })
    }

    fn run(&self, wanted: &Wanted, wishes: &HostWishes, timeline: &Timeline) -> Result<u8, HostError> {
        let watch = timeline.is_on().then(|| ExecWatch::new(&self.root.path()));
        let watch = watch.and_then(|watch| {
            watch.map_err(|e| log::warn!("the program's start cannot be seen (fanotify): {e}")).ok()
        });
        let foreign = watch.as_ref().map(AsRawFd::as_raw_fd);
        let clean_up = || self.cgroup.iter().for_each(Cgroup::remove);
        let keeper = match &self.runtime {
            Some(runtime) => {
                self.write_config(wanted, wishes)?;
                let program = || runtime.become_it(&wanted.name, &self.root.work, self.cgroup.is_some());
                Keeper::start(|| self.with_input(program), clean_up, foreign)
            }
            None => {
                let chroot = self.chroot(wanted, wishes)?;
                Keeper::start(|| self.with_input(|| chroot.become_it()), clean_up, foreign)
            }
        };
        let status = supervise(keeper.map_err(HostError::Namespace)?, watch, wishes.timeout, timeline)?;
        match self.runtime.as_ref().and_then(|_| runtime::failure(&self.root.work)) {
            Some((message, status)) => Err(HostError::Runtime { message, status }),
            None => Ok(status),
        }
    }

    /// A program without input finds the end of it.
    fn with_input(&self, program: impl FnOnce() -> u8) -> u8 {
        if !self.process.input && !self.process.terminal {
            let null = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty());
            if let Err(e) = null.and_then(rustix::stdio::dup2_stdin) {
                eprintln!("microvm: /dev/null: {e}");
            }
        }
        program()
    }

    fn write_config(&self, wanted: &Wanted, wishes: &HostWishes) -> Result<(), HostError> {
        let bind = |path: &&str| Bind {
            source: self.root.source_of(path).display().to_string(),
            target: path.to_string(),
        };
        let bundle = Bundle {
            process: &self.process,
            user: &self.user,
            hostname: &wanted.hostname,
            root: self.root.path().display().to_string(),
            read_only: wanted.read_only,
            binds: self.root.files.iter().map(bind).collect(),
            run: self.root.is_empty("run"),
            cgroup: self.cgroup.as_ref().map(|group| format!("{}/container", group.name())),
            memory: wishes.memory,
            cpus: wishes.cpus,
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
            entrance: self.cgroup.as_ref().map(enter).transpose().map_err(HostError::Cgroup)?,
        })
    }
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

/// What says who and where the container is. A process is where this host is.
fn files(hostname: &str, is_container: bool) -> Vec<(&'static str, String)> {
    let names = if is_container { String::new() } else { host_file("/etc/resolv.conf") };
    vec![
        ("/etc/hostname", format!("{hostname}\n")),
        ("/etc/hosts", hosts(hostname, None)),
        ("/etc/resolv.conf", names),
    ]
}

fn host_file(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Waits until the program has ended, and returns its status.
fn supervise(
    mut keeper: Keeper,
    mut watch: Option<ExecWatch>,
    timeout: Option<Duration>,
    timeline: &Timeline,
) -> Result<u8, HostError> {
    let mut signals = Signals::new().map_err(HostError::Watch)?;
    let mut deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut timed_out = false;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            (timed_out, deadline) = (true, None);
            keeper.kill();
            continue;
        }
        let ready = wait_for(&keeper, &signals, watch.as_ref(), left).map_err(HostError::Watch)?;
        if let Some(held) = watch.as_mut().filter(|_| ready[2])
            && held.take(|| timeline.mark(Phase::WorkloadStart)).map_err(HostError::Watch)?
        {
            watch = None;
        }
        while let Some((signal, from)) = signals.take_with_sender() {
            match signal {
                // The terminal has sent it to the program, too.
                Signal::End(number) if from == Sender::Process => keeper.signal(number),
                _ => {}
            }
        }
        if ready[0] {
            break;
        }
    }
    timeline.mark(Phase::WorkloadEnd);
    let status = keeper.wait().map_err(HostError::Watch)?;
    Ok(if timed_out { TIMED_OUT } else { status })
}

/// Which of the three are ready.
fn wait_for(
    keeper: &Keeper,
    signals: &Signals,
    watch: Option<&ExecWatch>,
    left: Option<Duration>,
) -> io::Result<[bool; 3]> {
    let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    let mut polled = vec![
        PollFd::new(&keeper.ended, PollFlags::IN),
        PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
    ];
    polled.extend(watch.map(|watch| PollFd::from_borrowed_fd(watch.as_fd(), PollFlags::IN)));
    match poll(&mut polled, left.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok([false; 3]),
        Err(e) => return Err(e.into()),
    }
    let is_ready = |index: usize| polled.get(index).is_some_and(|polled| !polled.revents().is_empty());
    Ok([is_ready(0), is_ready(1), is_ready(2)])
}
