//! Raw mode for the terminal on standard input, given back whatever happens.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

use rustix::process::getpgrp;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};

use super::signals;

/// The mode to go back to. A static, because a panic hook and every way out of the process must find it.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// While this lives, the terminal is raw: every key, `Ctrl-C` too, goes to the guest.
pub struct RawMode(());

/// What standard input is to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdin {
    /// A terminal that this process may read.
    Terminal,
    /// A terminal, but this process runs in the background: reading it would stop the process.
    BackgroundTerminal,
    /// A file, a pipe, a socket.
    Other,
}

/// Tells what standard input is.
#[must_use]
pub fn stdin_kind() -> Stdin {
    if !io::stdin().is_terminal() {
        Stdin::Other
    } else if tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp()) {
        Stdin::Terminal
    } else {
        Stdin::BackgroundTerminal
    }
}

/// Columns and rows of the terminal that output goes to, or else of that which input comes from. `None`: there is no
/// terminal, or it does not say.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin())).ok()?;
    (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
}

/// A terminal as it is, and may become.
pub struct Prepared {
    before: Termios,
    raw: Termios,
}

impl RawMode {
    /// Makes the terminal on standard input raw. Output processing stays, so that the log's lines keep their shape.
    ///
    /// # Errors
    /// Standard input is no terminal, or one that has gone away.
    pub fn enter() -> io::Result<Self> {
        Prepared::look()?.enter()
    }
}

impl Prepared {
    /// Looks at the terminal on standard input, so that [`Prepared::enter`] makes one system call alone.
    ///
    /// # Errors
    /// Standard input is no terminal, or one that has gone away.
    pub fn look() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes = before.output_modes;
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            hook(info);
        }));
        Ok(Self { before, raw })
    }

    /// Makes it raw.
    ///
    /// # Errors
    /// It has gone away.
    pub fn enter(self) -> io::Result<RawMode> {
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.before);
        tcsetattr(stdin(), OptionalActions::Now, &self.raw)?;
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back from within a signal handler, where waiting for the lock could be waiting for oneself.
pub(super) fn restore_from_signal() {
    if let Some(before) = SAVED.try_lock().ok().and_then(|mut saved| saved.take()) {
        signals::block(libc::SIGTTOU);
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// Gives the terminal back, once, where [`RawMode`] has it.
pub fn restore() {
    if let Some(before) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // From the background this would stop the process (SIGTTOU), and it is about to end.
        signals::block(libc::SIGTTOU);
        // Draining would wait for a terminal that shows nothing any more. Nothing is left to do if this fails.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}
