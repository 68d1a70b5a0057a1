//! The OCI runtime that is installed.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, mount};
use rustix::thread::UnshareFlags;
use serde_json::Value;

use crate::guest::status::{NOT_ALLOWED, NOT_FOUND, NOT_STARTED};
use crate::sys::fork::unshare;

use super::{HostError, NotRun};

/// In this order.
const NAMES: [&str; 2] = ["crun", "runc"];

/// A runtime.
pub struct Runtime(PathBuf);

impl Runtime {
    /// Looks for one in `PATH`.
    ///
    /// # Errors
    /// There is none.
    pub fn find() -> Result<Self, HostError> {
        find_in(&env::var_os("PATH").unwrap_or_default()).map(Self).ok_or(HostError::NoRuntime)
    }

    /// Becomes the runtime, which runs the container `id` of the bundle in `work`. Returns only where it cannot.
    pub fn become_it(&self, id: &str, work: &Path, with_cgroups: bool) -> NotRun {
        // It has to find its own processes in /proc, by their numbers in this name space.
        let nothing = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let proc =
            unshare(UnshareFlags::NEWNS).and_then(|()| Ok(mount("proc", "/proc", "proc", nothing, None)?));
        if let Err(e) = proc {
            return NotRun { status: NOT_STARTED, message: format!("/proc cannot be mounted: {e}") };
        }
        let mut command = self.command(work, work);
        if !with_cgroups && self.0.ends_with(NAMES[0]) {
            command.arg("--cgroup-manager=disabled");
        }
        self.not_run(&command.args(["run", "--bundle"]).arg(work).arg(id).exec())
    }

    /// Becomes the runtime, which runs the program of `process.json` in `bundle` in the container `id`. Its log is there, too.
    pub fn become_exec(&self, id: &str, work: &Path, bundle: &Path) -> NotRun {
        let mut command = self.command(work, bundle);
        self.not_run(&command.args(["exec", "--process"]).arg(bundle.join("process.json")).arg(id).exec())
    }

    /// What it is told in any case: where it keeps what it knows, and where it says what fails.
    fn command(&self, work: &Path, bundle: &Path) -> Command {
        let mut command = Command::new(&self.0);
        command.arg("--root").arg(work.join("runtime")).arg("--log").arg(log(bundle));
        command.args(["--log-format", "json"]);
        command
    }

    fn not_run(&self, e: &io::Error) -> NotRun {
        NotRun { status: NOT_STARTED, message: format!("{} cannot be run: {e}", self.0.display()) }
    }
}

fn find_in(path: &OsStr) -> Option<PathBuf> {
    let folders: Vec<_> = env::split_paths(path).collect();
    let places = NAMES.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    places.into_iter().find(|path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
}

fn log(work: &Path) -> PathBuf {
    work.join("log")
}

/// What kept the runtime from running the program, and the exit status that Docker has for it. `None`: nothing did.
pub fn failure(work: &Path) -> Option<(String, u8)> {
    let text = fs::read_to_string(log(work)).ok()?;
    let message = text.lines().rev().find_map(error_of)?;
    let status = status_of(&message);
    Some((message, status))
}

/// A line of the log, if it is an error.
fn error_of(line: &str) -> Option<String> {
    let line: Value = serde_json::from_str(line).ok()?;
    // crun gives only errors no level in older versions.
    let is_error = line["level"].as_str().is_none_or(|level| level == "error");
    line["msg"].as_str().filter(|_| is_error).map(String::from)
}

/// The runtimes say in words what was wrong with the program; about everything else they name no executable.
fn status_of(message: &str) -> u8 {
    let is_of_program = ["executable", "exec:", "exec `", "exec user process", "starting container process"]
        .iter()
        .any(|words| message.contains(words));
    let message = message.to_lowercase();
    if !is_of_program {
        NOT_STARTED
    } else if message.contains("no such file") || message.contains("not found") {
        NOT_FOUND
    } else if ["permission denied", "not permitted", "exec format error", "is a directory"]
        .iter()
        .any(|w| message.contains(w))
    {
        NOT_ALLOWED
    } else {
        NOT_STARTED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_words_become_dockers_statuses() {
        for (message, expected) in [
            ("executable file `nothing` not found in $PATH: No such file or directory", 127),
            ("open executable: Permission denied", 126),
            ("open executable: Operation not permitted", 126),
            ("exec `/x`: Exec format error", 126),
            ("unable to start container process: exec: \"x\": executable file not found in $PATH", 127),
            ("unable to start container process: exec: \"/etc/passwd\": permission denied", 126),
            ("mount `proc` to `/proc`: Operation not permitted", 125),
            ("open `/x`: No such file or directory", 125),
        ] {
            assert_eq!(status_of(message), expected, "{message}");
        }
    }

    #[test]
    fn warnings_are_no_failures() {
        assert_eq!(error_of(r#"{"level":"warning","msg":"slow"}"#), None);
        assert_eq!(error_of(r#"{"level":"error","msg":"no"}"#), Some("no".into()));
        assert_eq!(error_of(r#"{"msg":"old crun"}"#), Some("old crun".into()));
        assert_eq!(error_of("not JSON"), None);
    }
}
