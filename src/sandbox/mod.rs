//! Confining this process before the guest's first instruction, without root.
//!
//! A guest that breaks out of its VM finds itself in a process that can do little. The layers, in this order:
//!
//! 1. `no_new_privs`: without it an ordinary user may install neither Landlock rules nor filters.
//! 2. Descriptors: everything is open by now, so what nobody named is closed.
//! 3. Landlock: no path, no TCP port, no signal to another process. It may have to open the folders of its list.
//! 4. Capabilities: none are needed any more, not even by the layers above.
//! 5. No core dump, no debugger: guest memory stays ours. After 4, because a change of privileges resets it.
//! 6. seccomp, last and for each thread alone: a thread that starts takes over the filter of the one that starts it, so
//!    vCPUs, console and control socket start before the VMM thread gets its own, and a vCPU's exit passes one short filter.
//!
//! 1 to 5 come before the first thread, which therefore has them all.

mod bpf;
mod descriptors;
mod landlock;
mod privileges;
mod rules;
mod seccomp;

use std::io;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use thiserror::Error;

use crate::config::Sandbox;
use crate::sys::{confinement, violation};

pub use descriptors::Kept;
pub use landlock::Folder;
pub use rules::ThreadKind;

/// The process cannot be confined as it was asked to.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// `--sandbox strict` on a host that lacks something.
    #[error(
        "--sandbox strict: this host lacks {0}: use a newer host kernel, or --sandbox on to go on without"
    )]
    Lacks(String),
    /// A layer that the host has failed.
    #[error("the sandbox cannot {what}: --sandbox off goes on without any")]
    Layer {
        /// What failed.
        what: &'static str,
        /// The reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A thread could not be started.
    #[error("no thread for {thread}")]
    Thread {
        /// Its name.
        thread: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// Names the step that failed.
fn layer<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
) -> impl Fn(E) -> SandboxError {
    move |source| SandboxError::Layer { what, source: source.into() }
}

/// Something that this host cannot confine with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// What it is.
    pub what: &'static str,
    /// The Linux version that brought it.
    pub since: &'static str,
}

/// The layers of this host, looked up before anything is opened.
#[derive(Clone, Copy, Debug)]
pub struct Layers {
    on: bool,
    landlock: u32,
    close_range: bool,
    seccomp: bool,
}

impl Layers {
    /// Looks up what this host has. A lack is one warning, or with [`Sandbox::Strict`] an error.
    ///
    /// # Errors
    /// [`Sandbox::Strict`], and something is lacking.
    pub fn find(level: Sandbox) -> Result<Self, SandboxError> {
        if level == Sandbox::Off {
            return Ok(Self { on: false, landlock: 0, close_range: false, seccomp: false });
        }
        let layers = Self::of_host();
        let lacks: Vec<_> = layers.lacks().map(|l| format!("{} (Linux {})", l.what, l.since)).collect();
        match (lacks.is_empty(), level) {
            (true, _) => {}
            (false, Sandbox::Strict) => return Err(SandboxError::Lacks(lacks.join(", "))),
            (false, _) => {
                log::warn!("the sandbox goes on without what this host lacks: {}", lacks.join(", "));
            }
        }
        Ok(layers)
    }

    /// What this host has.
    #[must_use]
    pub fn of_host() -> Self {
        Self {
            on: true,
            landlock: confinement::landlock_abi(),
            close_range: confinement::has_close_range(),
            seccomp: confinement::has_seccomp(),
        }
    }

    /// Version of Landlock's interface, 0 where there is none.
    #[must_use]
    pub fn landlock_abi(&self) -> u32 {
        self.landlock
    }

    /// What this host cannot confine with.
    pub fn lacks(&self) -> impl Iterator<Item = Lack> {
        let seccomp = (!self.seccomp).then_some(Lack { what: "seccomp filters", since: "4.14" });
        let close_range = (!self.close_range).then_some(Lack { what: "close_range", since: "5.9" });
        seccomp.into_iter().chain(close_range).chain(landlock::lacks(self.landlock))
    }

    /// Confines the process in everything but its system calls, for good. Call it when everything is open and before
    /// the first thread is started: `kept` are the descriptors that stay open beside the standard ones, `folders` what
    /// Landlock goes on to allow.
    ///
    /// # Errors
    /// A layer that the host has fails.
    pub fn confine_process(self, kept: &Kept, folders: &[Folder]) -> Result<Confined, SandboxError> {
        if !self.on {
            return Ok(Confined::not());
        }
        privileges::forbid_new()?;
        if self.close_range {
            descriptors::close_others(kept)?;
        }
        if self.landlock > 0 {
            landlock::restrict(folders)?;
        }
        privileges::drop_capabilities()?;
        privileges::hide_memory()?;
        if self.seccomp {
            violation::install_handler().map_err(layer("handle SIGSYS"))?;
            report_panics();
        }
        Ok(Confined { filters: self.seccomp })
    }
}

/// A panic is one line. The standard library's message may come with a backtrace, for which it opens files, and that
/// would be a violation instead.
fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        let text = info.to_string().replace('\n', " ");
        // A standard error that cannot be written must not make a panic of the panic.
        let _ = io::Write::write_fmt(
            &mut io::stderr(),
            format_args!("microvm: thread {} {text}\n", thread.name().unwrap_or("without a name")),
        );
    }));
}

/// Says that the process is confined, and confines its threads.
#[derive(Clone, Copy, Debug)]
pub struct Confined {
    filters: bool,
}

impl Confined {
    /// Nothing is confined: `--sandbox off`, and tests of devices alone.
    #[must_use]
    pub const fn not() -> Self {
        Self { filters: false }
    }

    /// Threads are confined to their system calls, in a process that is not: tests of devices whose threads do more than
    /// move data.
    #[cfg(test)]
    #[must_use]
    pub const fn threads_alone() -> Self {
        Self { filters: true }
    }

    /// Confines the calling thread to the system calls of `kind`, for good. Threads that it starts later are confined
    /// to the same and can only be confined further.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn confine_thread(self, kind: ThreadKind) -> Result<(), SandboxError> {
        if self.filters { seccomp::install(kind) } else { Ok(()) }
    }

    /// Starts a thread that runs `body` once it is confined to `kind`, and waits until it is. `stack` is in bytes.
    ///
    /// # Errors
    /// There is no thread, or it cannot be confined; then `body` does not run.
    pub fn spawn<T: Send + 'static>(
        self,
        kind: ThreadKind,
        name: String,
        stack: usize,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Option<T>>, SandboxError> {
        let (ready, is_ready) = mpsc::sync_channel(1);
        let confine_and_run = move || {
            let confined = self.confine_thread(kind);
            let go_on = confined.is_ok();
            // The one who waits is there until it has received this.
            let _ = ready.send(confined);
            go_on.then(body)
        };
        let thread = thread::Builder::new().name(name.clone()).stack_size(stack).spawn(confine_and_run);
        let thread = thread.map_err(|source| SandboxError::Thread { thread: name.clone(), source })?;
        let gone = || SandboxError::Thread { thread: name, source: io::ErrorKind::BrokenPipe.into() };
        is_ready.recv().map_err(|_| gone())??;
        Ok(thread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lacks_are_named() {
        let old = Layers { on: true, landlock: 3, close_range: false, seccomp: false };
        let lacks: Vec<_> = old.lacks().map(|l| l.what).collect();
        for what in ["seccomp filters", "close_range", "Landlock's TCP rules"] {
            assert!(lacks.contains(&what), "{lacks:?}");
        }
        let new = Layers { on: true, landlock: 6, close_range: true, seccomp: true };
        assert_eq!(new.lacks().count(), 0);
    }

    #[test]
    fn off_looks_for_nothing() {
        assert!(!Layers::find(Sandbox::Off).unwrap().on);
    }
}
