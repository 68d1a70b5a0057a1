//! What a program on the host prints, on its way to this process's streams and to the log.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};

use crate::guest::wire::{Kind, MAX_FRAME};

use super::super::log::LogWriter;
use super::super::relay;

/// What is left to show when the program was killed is shown by then, or nobody reads it.
const SHOW_BOUND: Duration = Duration::from_secs(2);

/// Two pipes, for a program that is not started yet.
pub struct Output {
    ends: [(OwnedFd, OwnedFd); 2],
}

impl Output {
    /// Makes them.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { ends: [pipe_with(PipeFlags::CLOEXEC)?, pipe_with(PipeFlags::CLOEXEC)?] })
    }

    /// The ends that are read here: who else has them keeps the program from learning that nobody reads any more.
    pub fn own_ends(&self) -> [RawFd; 2] {
        [self.ends[0].0.as_raw_fd(), self.ends[1].0.as_raw_fd()]
    }

    /// Makes them this process's standard output and error, in the program's process.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn put(&self) -> io::Result<()> {
        rustix::stdio::dup2_stdout(&self.ends[0].1)?;
        Ok(rustix::stdio::dup2_stderr(&self.ends[1].1)?)
    }

    /// Passes on what comes, to the log and, where it is `attached`, to this process's streams.
    ///
    /// # Errors
    /// No thread is left.
    pub fn relay(self, log: LogWriter, attached: bool) -> io::Result<Relay> {
        let log = Arc::new(Mutex::new(Some(log)));
        let (done, is_done) = channel::<()>();
        let [(output, its_output), (errors, its_errors)] = self.ends;
        drop((its_output, its_errors));
        for (kind, from) in [(Kind::Output, output), (Kind::Error, errors)] {
            let (log, done) = (log.clone(), done.clone());
            thread::Builder::new().name("output".into()).spawn(move || {
                pass_on(kind, from.into(), &log, attached);
                drop(done);
            })?;
        }
        Ok(Relay { is_done })
    }
}

/// Threads that pass on what a program prints.
pub struct Relay {
    is_done: Receiver<()>,
}

impl Relay {
    /// Waits until all that was printed is passed on: for ever where the program ended by itself, as it would have waited,
    /// too.
    pub fn finish(self, was_killed: bool) {
        // Nothing is ever sent: the threads go away.
        if was_killed {
            let _ = self.is_done.recv_timeout(SHOW_BOUND);
        } else {
            let _ = self.is_done.recv();
        }
    }
}

fn pass_on(kind: Kind, mut from: File, log: &Mutex<Option<LogWriter>>, attached: bool) {
    let mut bytes = vec![0; MAX_FRAME];
    loop {
        let len = match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return log::warn!("what the program prints cannot be read: {e}"),
        };
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(e)) = log.as_mut().map(|log| log.add(kind, &bytes[..len])) {
            log::warn!("the container's log ends here: {e}");
            *log = None;
        }
        drop(log);
        if attached && relay::print(kind, &bytes[..len]).is_err() {
            // The program gets a SIGPIPE when it goes on.
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::super::log::LogReader;
    use super::*;

    #[test]
    fn what_is_printed_is_in_the_log_when_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output::new().unwrap();
        let mut program =
            [&output.ends[0].1, &output.ends[1].1].map(|fd| File::from(fd.try_clone().unwrap()));
        let relay = output.relay(LogWriter::create(dir.path()).unwrap(), false).unwrap();
        program[0].write_all(b"out").unwrap();
        program[1].write_all(b"err").unwrap();
        drop(program);
        relay.finish(false);
        let mut reader = LogReader::open(dir.path()).unwrap();
        let mut records: Vec<_> = std::iter::from_fn(|| reader.next_record().unwrap()).collect();
        records.sort_by_key(|record| record.is_error);
        let seen: Vec<_> = records.iter().map(|r| (r.is_error, r.bytes.as_slice())).collect();
        assert_eq!(seen, [(false, &b"out"[..]), (true, b"err")]);
    }
}
