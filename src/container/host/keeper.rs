//! Process 1 of the container's process name space: it starts the program, waits for it and for orphans, and outlives a
//! `microvm` that was killed just long enough to clean up.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open, wait, waitpid,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::guest::status::{KILLED, NOT_STARTED};
use crate::sys::fork::{fork, unshare};

/// The keeper, as `microvm` has it.
pub struct Keeper {
    pid: Pid,
    /// Readable when it has ended.
    pub ended: OwnedFd,
    /// Each byte is a signal for the program; its end is the program's.
    control: Option<File>,
}

impl Keeper {
    /// Starts it in a new process name space. `program` is called in a process of its own, to become the program; it
    /// returns a status where it cannot. `clean_up` is called there, where `microvm` has gone.
    /// `foreign` are descriptors that neither must have.
    ///
    /// # Errors
    /// No process or name space is left.
    pub fn start(
        program: impl FnOnce() -> u8,
        clean_up: impl FnOnce(),
        foreign: Vec<RawFd>,
    ) -> io::Result<Self> {
        let (orders, control) = pipe_with(PipeFlags::CLOEXEC)?;
        let own = File::open("/proc/self/ns/pid")?;
        unshare(UnshareFlags::NEWPID)?;
        let number = control.as_raw_fd();
        let pid = fork(move || {
            // Else the end of `microvm` would not be the pipe's.
            close(number);
            foreign.into_iter().for_each(close);
            keep(program, orders.into(), clean_up).unwrap_or(NOT_STARTED)
        })?;
        // Else this process could have no threads (CLONE_THREAD in clone(2)).
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { pid, ended, control: Some(control.into()) })
    }

    /// Sends the program a signal.
    pub fn signal(&mut self, number: u8) {
        // It may have ended.
        let _ = self.control.as_mut().map(|control| control.write_all(&[number]));
    }

    /// Kills the program and all that it has started.
    pub fn kill(&mut self) {
        self.control = None;
    }

    /// Waits for the program's exit status: 128 and the signal's number where one ended it.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&self) -> io::Result<u8> {
        Ok(waitpid(Some(self.pid), WaitOptions::empty())?.map_or(NOT_STARTED, |(_, status)| code(status)))
    }
}

/// A process's exit status: 128 and the signal's number where one ended it.
pub fn code(status: WaitStatus) -> u8 {
    let signal = status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or(signal).map_or(NOT_STARTED, |code| code as u8)
}

fn keep(program: impl FnOnce() -> u8, orders: File, clean_up: impl FnOnce()) -> io::Result<u8> {
    let program = fork(program)?;
    let is_alone = Arc::new(AtomicBool::new(false));
    let alone = is_alone.clone();
    thread::Builder::new().name("orders".into()).spawn(move || obey(orders, program, &alone))?;
    let status = loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == program => break code(status),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    if is_alone.load(Ordering::Acquire) {
        // Everything has been killed: once it is gone, so can be what held it.
        while wait(WaitOptions::empty()).is_ok() {}
        clean_up();
        return Ok(KILLED);
    }
    // The kernel kills what is left in the name space, when this process ends.
    Ok(status)
}

fn obey(mut orders: File, program: Pid, is_alone: &AtomicBool) {
    let mut byte = [0];
    while let Ok(1) = orders.read(&mut byte) {
        if let Some(signal) = Signal::from_named_raw(byte[0].into()) {
            // Not waited for before its number is known, and this process ends with it.
            let _ = kill_process(program, signal);
        }
    }
    is_alone.store(true, Ordering::Release);
    kill_all();
}

/// All processes of this name space but this one.
fn kill_all() {
    // SAFETY: no memory is passed.
    unsafe { libc::kill(-1, libc::SIGKILL) };
}

fn close(number: RawFd) {
    // SAFETY: called in a new process, which has a copy that nobody in it owns: the owner is in the other one.
    drop(unsafe { OwnedFd::from_raw_fd(number) });
}
