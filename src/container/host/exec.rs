//! Another program in a container on the host: in the name spaces of its first one, by the runtime, or in the same chroot.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal as Number, WaitOptions, chroot, fchdir, kill_process, pidfd_open, waitpid,
};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::guest::ProcessSpec;
use crate::guest::status::NOT_STARTED;
use crate::sys::data::data_folder;
use crate::sys::fork::fork;
use crate::sys::signals::{Sender, Signal, Signals};

use super::super::{Container, ContainerError};
use super::process::HostProcess;
use super::rootfs::{RootFs, find_user, open_inside};
use super::runtime::{self, Runtime};
use super::{Cgroup, HostError, Isolation, NotRun, at, chroot as plain, oci, put_input};

/// The first program's number in its PID name space: the keeper's first child.
const FIRST: &str = "2";

/// Runs `process` in a container, with this process's streams, and returns its exit status.
///
/// # Errors
/// The container does not run, or its name spaces cannot be entered.
pub fn exec_on_host(container: &Container, process: &ProcessSpec) -> Result<u8, ContainerError> {
    let not_running = || ContainerError::NotRunning(container.record.name.clone());
    let host = HostProcess::of(container)?.ok_or_else(not_running)?;
    let first = first_program(host.pid()).ok_or_else(not_running)?;
    let entrance = Entrance::of(first).map_err(HostError::Namespace)?;
    if container.record.isolation == Isolation::Process {
        let status =
            entrance.run(process, |root| become_program(root, process)).map_err(HostError::Namespace)?;
        return Ok(status);
    }
    let runtime = Runtime::find()?;
    let work = data_folder().ok_or(ContainerError::NoPlace)?.join("mnt");
    // As when it was made.
    let has_cgroup = Cgroup::is_there();
    entrance.enter().map_err(HostError::Namespace)?;
    let root = RootFs { work: work.clone(), files: Vec::new() };
    let user = root.user(&process.user)?;
    let bundle = work.join(format!("exec.{}", std::process::id()));
    fs::create_dir(&bundle).map_err(at(&bundle))?;
    let path = bundle.join("process.json");
    fs::write(&path, oci::process(process, &user, has_cgroup).to_string()).map_err(at(&path))?;
    let status = run(process, || runtime.become_exec(&container.record.name, &work, &bundle));
    let failure = runtime::failure(&bundle);
    // In a file system that goes with the container.
    let _ = fs::remove_dir_all(&bundle);
    match (failure, status.map_err(HostError::Namespace)?) {
        (Some((message, status)), _) => Err(HostError::Runtime { message, status }.into()),
        (None, status) => Ok(status),
    }
}

/// The process that became the program, or the runtime: the keeper's child that was its first.
fn first_program(microvm: u32) -> Option<Pid> {
    let children = |pid: &str| -> Option<Vec<String>> {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        Some(text.split_whitespace().map(String::from).collect())
    };
    let number_inside = |pid: &String| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let numbers = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        numbers.split_whitespace().last().map(String::from)
    };
    let keepers = children(&microvm.to_string())?;
    let mut programs = keepers.iter().filter_map(|keeper| children(keeper)).flatten();
    let first = programs.find(|pid| number_inside(pid).as_deref() == Some(FIRST))?;
    first.parse().ok().and_then(Pid::from_raw)
}

/// The way into a process's name spaces.
struct Entrance {
    process: OwnedFd,
    root: File,
    /// Where its control group is, so that the new one has its limits.
    cgroup: Option<PathBuf>,
}

impl Entrance {
    fn of(pid: Pid) -> io::Result<Self> {
        let number = pid.as_raw_nonzero();
        let cgroup = fs::read_to_string(format!("/proc/{number}/cgroup")).ok();
        let cgroup =
            cgroup.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("0::/")));
        Ok(Self {
            process: pidfd_open(pid, PidfdFlags::empty())?,
            root: File::open(format!("/proc/{number}/root"))?,
            cgroup: cgroup.map(|path| Path::new("/sys/fs/cgroup").join(path).join("cgroup.procs")),
        })
    }

    /// Enters them. It is the next child that is in the PID name space.
    fn enter(&self) -> io::Result<()> {
        let spaces = ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
        Ok(move_into_thread_name_spaces(self.process.as_fd(), spaces)?)
    }

    fn run(&self, process: &ProcessSpec, program: impl FnOnce(&File) -> NotRun) -> io::Result<u8> {
        // Before its path means another file. A process without limits is where this one is, as far as it matters.
        let cgroup = self.cgroup.as_ref().and_then(|path| File::options().write(true).open(path).ok());
        self.enter()?;
        run(process, || {
            if let Some(mut cgroup) = cgroup
                && let Err(e) = io::Write::write_all(&mut cgroup, b"0")
            {
                log::warn!("the program is outside of the container's control group: {e}");
            }
            program(&self.root)
        })
    }
}

/// In the program's process of a plain chroot.
fn become_program(root: &File, process: &ProcessSpec) -> NotRun {
    let entered = fchdir(root).and_then(|()| chroot("."));
    if let Err(e) = entered {
        return NotRun {
            status: NOT_STARTED,
            message: format!("the root file system cannot be entered: {e}"),
        };
    }
    let user = match find_user(root, &process.user) {
        Ok(user) => user,
        Err(message) => return NotRun { status: NOT_STARTED, message },
    };
    let folder = open_inside(root, &process.cwd, OFlags::PATH | OFlags::DIRECTORY);
    if let Err(e) = folder.and_then(fchdir) {
        let message = format!("the working folder {} cannot be entered: {e}", process.cwd);
        return NotRun { status: NOT_STARTED, message };
    }
    plain::exec(process, &user)
}

/// Runs `program`, which becomes `process`, in a child, passes signals to it, and returns its status.
fn run(process: &ProcessSpec, program: impl FnOnce() -> NotRun) -> io::Result<u8> {
    let child = fork(|| {
        let NotRun { status, message } = match put_input(process) {
            Ok(()) => program(),
            Err(e) => NotRun { status: NOT_STARTED, message: format!("/dev/null: {e}") },
        };
        eprintln!("microvm: {message}");
        status
    })?;
    let ended = pidfd_open(child, PidfdFlags::empty())?;
    let mut signals = Signals::new()?;
    loop {
        let mut polled =
            [PollFd::new(&ended, PollFlags::IN), PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let has_ended = !polled[0].revents().is_empty();
        while let Some((signal, from)) = signals.take_with_sender() {
            // The terminal has sent it to the program, too.
            if let (Signal::End(number), Sender::Process) = (signal, from)
                && let Some(number) = Number::from_named_raw(number.into())
            {
                let _ = kill_process(child, number);
            }
        }
        if has_ended {
            let status = waitpid(Some(child), WaitOptions::empty())?.map(|(_, status)| status);
            return Ok(status.map_or(NOT_STARTED, super::keeper::code));
        }
    }
}
