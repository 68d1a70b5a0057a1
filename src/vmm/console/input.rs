//! A console's input: keys from the terminal, or bytes from a file, as fast as the guest takes them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::metrics::Counter;
use crate::sys::terminal::{Stdin, stdin_kind};

use super::super::End;
use super::super::run::EndSlot;
use super::{Console, GuestEnd, Port};

/// `Ctrl-A`: the next key is for microvm.
const ESCAPE: u8 = 1;
/// Keys that wait for a guest which does not read; more are dropped, so that `Ctrl-A x` is always seen.
const MAX_PENDING_KEYS: usize = 4096;

/// A console's part in the event loop: its input.
pub(in crate::vmm) struct ConsoleEvents {
    pub console: Console,
    pub end: EndSlot,
}

impl ConsoleEvents {
    fn read_in(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
        // Another process that shares the descriptor may have been faster; a read would then block.
        if !input.is_ready() {
            return;
        }
        let mut buffer = [0; 256];
        match input.stdin.read(&mut buffer) {
            // The end of input: the guest's line just stays silent.
            Ok(0) => return input.watch(ops, false),
            Ok(n) => {
                if input.take_keys(&buffer[..n]) {
                    self.end.set(End::Escape);
                }
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => {
                log::warn!("standard input cannot be read: {e}");
                return input.watch(ops, false);
            }
        }
        input.feed(ops);
    }
}

/// What comes from standard input and goes to the guest.
pub(super) struct Input {
    stdin: File,
    port: Port,
    received: Counter,
    drained: Arc<EventFd>,
    pending: Vec<u8>,
    /// Only a terminal has escape keys: a file is passed on as it is.
    escapes: bool,
    escaped: bool,
    watching: bool,
}

impl Input {
    /// Takes standard input for `guest`. `None`: reading it would stop the process (SIGTTIN).
    pub fn open(guest: GuestEnd) -> io::Result<Option<Self>> {
        let kind = stdin_kind();
        if kind == Stdin::BackgroundTerminal {
            return Ok(None);
        }
        let GuestEnd { port, received, drained, .. } = guest;
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let (pending, escapes) = (Vec::new(), kind == Stdin::Terminal);
        Ok(Some(Self { stdin, port, received, drained, pending, escapes, escaped: false, watching: false }))
    }

    /// Whether it is a terminal's.
    pub fn is_terminal(&self) -> bool {
        self.escapes
    }

    /// Adds keys to what the guest gets. `true`: the user wants to leave.
    fn take_keys(&mut self, keys: &[u8]) -> bool {
        if !self.escapes {
            self.pending.extend_from_slice(keys);
            return false;
        }
        for key in keys {
            match (std::mem::take(&mut self.escaped), *key) {
                (true, b'x' | b'X') => return true,
                (false, ESCAPE) => self.escaped = true,
                (_, key) if self.pending.len() < MAX_PENDING_KEYS => self.pending.push(key),
                _ => {}
            }
        }
        false
    }

    /// Gives the guest what its FIFO takes. A file is read on only when all is given, so it is not taken in faster
    /// than the guest reads; a terminal always is, so that the user can leave.
    fn feed(&mut self, ops: &mut EventOps) {
        let sent = self.port.send(&self.pending);
        self.received.add(sent as u64);
        self.pending.drain(..sent);
        self.watch(ops, self.escapes || self.pending.is_empty());
    }

    fn is_ready(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.stdin, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
    }

    fn watch(&mut self, ops: &mut EventOps, on: bool) {
        if on == self.watching {
            return;
        }
        let event = Events::new(&self.stdin, EventSet::IN);
        let done = if on { ops.add(event) } else { ops.remove(event) };
        // A file cannot be watched. It is read whenever the guest has drained its FIFO.
        if done.is_ok() {
            self.watching = on;
        }
    }
}

impl MutEventSubscriber for ConsoleEvents {
    fn init(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
        if let Err(e) = ops.add(Events::new_raw(input.drained.as_raw_fd(), EventSet::IN)) {
            log::error!("the console cannot be watched: {e:?}");
        }
        input.watch(ops, true);
        if !input.watching {
            self.read_in(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let Some(input) = &mut self.console.input else { return };
        if events.fd() == input.stdin.as_raw_fd() {
            self.read_in(ops);
        } else if events.fd() == input.drained.as_raw_fd() {
            let _ = input.drained.read();
            input.feed(ops);
            if input.pending.is_empty() && !input.watching {
                self.read_in(ops);
            }
        }
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.stdin.as_raw_fd()
    }
}
