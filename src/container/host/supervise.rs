//! Waiting for a program on the host: its start, its end, its time limit, and signals for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::metrics::{Phase, Timeline};
use crate::sys::daemon::Ready;
use crate::sys::exec_watch::ExecWatch;
use crate::sys::orders::Orders;
use crate::sys::signals::{Sender, Signal, Signals};

use super::super::log::LogWriter;
use super::super::set_process;
use super::HostError;
use super::keeper::Keeper;
use super::output::Output;

/// As of `timeout`.
const TIMED_OUT: u8 = 124;
const KILL: u8 = libc::SIGKILL as u8;

/// Who waits for a program.
pub struct Supervisor<'a> {
    /// Process 1 of its name space.
    pub keeper: Keeper,
    /// Sees its start.
    pub watch: Option<ExecWatch>,
    /// It does, wherever the program is.
    pub is_seen: bool,
    /// Who is told of it.
    pub ready: Option<Ready>,
    /// It is killed after this long.
    pub timeout: Option<Duration>,
    /// Where its start and its end are marked.
    pub timeline: &'a Timeline,
}

/// Where signals for the program come from.
struct Inbox {
    signals: Signals,
    orders: Orders,
}

/// Which of them are ready.
#[derive(Default)]
struct News {
    end: bool,
    start: bool,
}

impl Supervisor<'_> {
    /// Waits until the program has ended, and returns its status. What it prints goes where it belongs meanwhile. Its process
    /// is named in `lock` once that hears signals.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn supervise(mut self, lock: &File, output: Option<Output>, log: LogWriter) -> Result<u8, HostError> {
        let status = self.wait_for_program(lock, output, log);
        if status.is_err() {
            // Nothing of it is left when that is told.
            self.keeper.kill();
            let _ = self.keeper.wait();
        }
        status.map_err(HostError::Watch)
    }

    fn wait_for_program(&mut self, lock: &File, output: Option<Output>, log: LogWriter) -> io::Result<u8> {
        // Behind the program's start, which must not begin with signals that it does not get.
        let mut inbox = Inbox::new()?;
        set_process(lock)?;
        let attached = self.ready.is_none();
        let relay = output.map(|output| output.relay(log, attached)).transpose()?;
        if self.watch.is_none() || !self.is_seen {
            self.ready.take().into_iter().for_each(Ready::tell);
        }
        let mut deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let (mut timed_out, mut was_killed) = (false, false);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                (timed_out, was_killed, deadline) = (true, true, None);
                self.keeper.kill();
                continue;
            }
            let news = self.wait(&inbox, left)?;
            if news.start {
                self.take_start()?;
            }
            was_killed |= self.pass_signals(&mut inbox);
            if news.end {
                break;
            }
        }
        self.timeline.mark(Phase::WorkloadEnd);
        let status = self.keeper.wait()?;
        relay.into_iter().for_each(|relay| relay.finish(was_killed));
        Ok(if timed_out { TIMED_OUT } else { status })
    }

    fn take_start(&mut self) -> io::Result<()> {
        let (timeline, ready) = (self.timeline, &mut self.ready);
        let Some(watch) = &mut self.watch else { return Ok(()) };
        let seen = || {
            timeline.mark(Phase::WorkloadStart);
            ready.take().into_iter().for_each(Ready::tell);
        };
        if watch.take(seen)? {
            self.watch = None;
        }
        Ok(())
    }

    /// Says whether all was killed.
    fn pass_signals(&mut self, inbox: &mut Inbox) -> bool {
        while let Some((signal, from)) = inbox.signals.take_with_sender() {
            match signal {
                // The terminal has sent it to the program, too.
                Signal::End(number) if from == Sender::Process => self.keeper.signal(number),
                _ => {}
            }
        }
        while let Some(number) = inbox.orders.take() {
            if number == KILL {
                self.keeper.kill();
                return true;
            }
            self.keeper.signal(number);
        }
        false
    }

    fn wait(&self, inbox: &Inbox, left: Option<Duration>) -> io::Result<News> {
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut polled = vec![
            PollFd::new(&self.keeper.ended, PollFlags::IN),
            PollFd::from_borrowed_fd(inbox.signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(inbox.orders.as_fd(), PollFlags::IN),
        ];
        polled.extend(self.watch.iter().map(|watch| PollFd::from_borrowed_fd(watch.as_fd(), PollFlags::IN)));
        match poll(&mut polled, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(News::default()),
            Err(e) => return Err(e.into()),
        }
        let is_ready = |index: usize| polled.get(index).is_some_and(|polled| !polled.revents().is_empty());
        Ok(News { end: is_ready(0), start: is_ready(3) })
    }
}

impl Inbox {
    fn new() -> io::Result<Self> {
        Ok(Self { signals: Signals::new()?, orders: Orders::new()? })
    }
}
