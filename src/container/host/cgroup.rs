//! Control groups (cgroups(7), version 2): limits and charges.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{getpid, test_kill_process};

use super::oci::CPU_PERIOD;

const ROOT: &str = "/sys/fs/cgroup";
/// All of ours, below the root.
const OURS: &str = "microvm";
/// How long the kernel may work the end of what was in a group off.
const PATIENCE: Duration = Duration::from_secs(5);

/// A group, which is removed when this is dropped.
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Whether this host has the unified hierarchy, and we may make groups in it.
    #[must_use]
    pub fn is_there() -> bool {
        Path::new(ROOT).join("cgroup.controllers").exists()
            && rustix::fs::access(ROOT, rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// Makes a group below `parent`, a path from the root of the hierarchy; below our own where that is `None`. What
    /// processes that were killed have left there is removed first.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make(parent: Option<&str>, name: &str) -> io::Result<Self> {
        let folder = Path::new(ROOT).join(parent.unwrap_or(OURS).trim_start_matches('/'));
        if parent.is_none() {
            fs::create_dir_all(&folder)?;
            enable(Path::new(ROOT));
            enable(&folder);
            sweep(&folder);
        }
        // The number tells the next one that we are gone.
        let group = Self { path: folder.join(format!("{name}.{}", getpid().as_raw_nonzero())) };
        fs::create_dir(&group.path)?;
        Ok(group)
    }

    /// Makes a group in this one, which can have no processes of its own then.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn child(&self, name: &str) -> io::Result<Self> {
        enable(&self.path);
        let group = Self { path: self.path.join(name) };
        fs::create_dir(&group.path)?;
        Ok(group)
    }

    /// Its path from the root of the hierarchy.
    #[must_use]
    pub fn name(&self) -> String {
        format!("/{}", self.path.strip_prefix(ROOT).unwrap_or(&self.path).display())
    }

    /// Most memory in bytes, and most processors.
    ///
    /// # Errors
    /// The kernel lacks the controller.
    pub fn limit(&self, memory: Option<u64>, cpus: Option<u32>) -> io::Result<()> {
        if let Some(bytes) = memory {
            fs::write(self.path.join("memory.max"), bytes.to_string())?;
        }
        if let Some(cpus) = cpus {
            let quota = u64::from(cpus) * CPU_PERIOD;
            fs::write(self.path.join("cpu.max"), format!("{quota} {CPU_PERIOD}"))?;
        }
        Ok(())
    }

    /// Where a process writes `0` to enter.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn entrance(&self) -> io::Result<File> {
        fs::OpenOptions::new().write(true).open(self.path.join("cgroup.procs"))
    }

    /// The most memory that was ever charged to it, in bytes (Linux 5.19).
    #[must_use]
    pub fn peak(&self) -> Option<u64> {
        fs::read_to_string(self.path.join("memory.peak")).ok()?.trim().parse().ok()
    }

    /// Waits until nothing runs in it, and removes it with what is in it.
    pub fn remove(&self) {
        remove(&self.path, PATIENCE);
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Groups in this one can have limits, and are charged: where the kernel lacks a controller, setting the limit fails.
fn enable(group: &Path) {
    let control = group.join("cgroup.subtree_control");
    for controller in ["+memory", "+cpu"] {
        if let Err(e) = fs::write(&control, controller) {
            log::info!("{}: {controller}: {e}", control.display());
        }
    }
}

fn remove(group: &Path, patience: Duration) {
    let folders = fs::read_dir(group).into_iter().flatten().flatten();
    for folder in folders.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&folder.path(), patience);
    }
    if fs::remove_dir(group).is_err() && wait_until_empty(group, patience).is_ok() {
        let _ = fs::remove_dir(group);
    }
}

/// The file turns readable in a special way when the first process enters or the last one leaves.
fn wait_until_empty(group: &Path, patience: Duration) -> io::Result<()> {
    let path = group.join("cgroup.events");
    let file = File::open(&path)?;
    let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
    while fs::read_to_string(&path)?.contains("populated 1") {
        if poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&patience))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Removes the groups of processes that were killed.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.rsplit('.').next()?.parse().ok());
        let maker = number.and_then(rustix::process::Pid::from_raw);
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && maker.is_some_and(|pid| test_kill_process(pid) == Err(rustix::io::Errno::SRCH)) {
            remove(&entry.path(), Duration::ZERO);
        }
    }
}
