//! The streams of a container's program, in the process of its VM: to standard output and error and to the log, from
//! standard input; and the signals that come for this process.

use std::any::Any;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::guest::TerminalSize;
use crate::guest::wire::{Kind, MAIN_SESSION, PORT, Request, write_json};
use crate::sandbox::{Confined, Folder, Kept, SandboxError, ThreadKind};
use crate::sys::daemon::Ready;
use crate::sys::terminal::{self, Prepared, RawMode};
use crate::vmm::{Service, SignalSink, Vmm};

use super::log::LogWriter;
use super::relay::{self, Finish};

/// They relay; what they hold is on the heap.
const STACK: usize = 128 << 10;
/// Of the answers that wait, the bytes that are thrown away before a request: more than a socket holds
/// (net.core.rmem_default).
const MOST_ANSWERS: usize = 1 << 20;
/// What is left to show when the VM has ended is shown by then, or nobody reads it.
const SHOW_BOUND: Duration = Duration::from_secs(2);
/// A reader of its output has gone away (SIGPIPE).
const PIPE: u8 = libc::SIGPIPE as u8;

/// What a program's streams are on the host.
pub struct StreamOptions {
    /// Standard input is the program's.
    pub input: bool,
    /// Standard input is a terminal, and so is the program's.
    pub terminal: bool,
    /// Standard output and error show what it prints. Else only the log has it.
    pub attached: bool,
    /// Who waits until the program runs.
    pub ready: Option<Ready>,
    /// Locks of volumes, until the program runs.
    pub new_volumes: Vec<File>,
}

/// The streams, before the VM runs.
pub struct Streams {
    options: StreamOptions,
    log: LogWriter,
    frames: UnixStream,
    requests: Arc<Requests>,
}

/// Requests to the guest, for this process.
struct Requests {
    stream: UnixStream,
    /// The guest has said that the program runs.
    started: AtomicBool,
}

impl Streams {
    /// Connects the program of the VM that is built.
    ///
    /// # Errors
    /// It has no socket device, or no descriptor is left.
    pub fn connect(vmm: &mut Vmm, options: StreamOptions, log: LogWriter) -> io::Result<Self> {
        let (frames, its_frames) = UnixStream::pair()?;
        let (requests, its_requests) = UnixStream::pair()?;
        // A guest that takes none must not stop this process.
        requests.set_nonblocking(true)?;
        vmm.meet_guest(PORT, its_frames)?;
        vmm.meet_guest(PORT, its_requests)?;
        let requests = Arc::new(Requests { stream: requests, started: AtomicBool::new(false) });
        vmm.pass_signals_to(Box::new(Signals { requests: requests.clone(), terminal: options.terminal }));
        Ok(Self { options, log, frames, requests })
    }
}

impl Requests {
    /// Sends a request, if the guest takes it now. It answers, but what it could say changes nothing: the answers are
    /// thrown away, so that there is room for the next.
    fn send(&self, request: &Request) -> bool {
        let mut answers = [0; 4096];
        // As many as fit into a socket's buffer: a guest may send more than is read here, for ever.
        for _ in 0..MOST_ANSWERS / answers.len() {
            if !(&self.stream).read(&mut answers).is_ok_and(|len| len > 0) {
                break;
            }
        }
        // In one piece, or not at all: it is far shorter than what a socket takes.
        write_json(&mut &self.stream, Kind::Request, request).is_ok()
    }

    fn signal(&self, signal: u8) -> bool {
        self.started.load(Ordering::Acquire) && self.send(&Request::Signal { session: MAIN_SESSION, signal })
    }
}

/// Signals of this process become the program's.
struct Signals {
    requests: Arc<Requests>,
    terminal: bool,
}

impl SignalSink for Signals {
    fn signal(&self, number: u8) -> bool {
        self.requests.signal(number)
    }

    fn resized(&self) {
        if let Some(size) = TerminalSize::here().filter(|_| self.terminal) {
            self.requests.send(&Request::Resize { session: MAIN_SESSION, size });
        }
    }
}

impl Service for Streams {
    fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        kept.add("the program's streams", &self.frames);
        kept.add("requests to the guest", &self.requests.stream);
        self.log.keep(kept);
        if let Some(ready) = &self.options.ready {
            kept.add("who waits for the program", ready);
        }
        self.options.new_volumes.iter().for_each(|lock| kept.add("a new volume", lock));
        Vec::new()
    }

    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError> {
        let Self { options, log, frames, requests } = *self;
        let failed = |source| SandboxError::Thread { thread: "the program's streams".into(), source };
        let terminal = options.terminal.then(Prepared::look).transpose().map_err(failed)?;
        if options.input {
            let mut input = frames.try_clone().map_err(failed)?;
            // It may wait for a key for ever; the process does not wait for it.
            confined
                .spawn(ThreadKind::Streams, "input".into(), STACK, move || relay::send_input(&mut input))?;
        }
        let stream = frames.try_clone().map_err(failed)?;
        let mut printer = Printer {
            log: Some(log),
            attached: options.attached,
            ready: options.ready,
            new_volumes: options.new_volumes,
            requests,
            terminal,
            raw: None,
        };
        let (done, is_done) = channel();
        let thread = confined.spawn(ThreadKind::Streams, "output".into(), STACK, move || {
            let mut frames = io::BufReader::new(frames);
            let finish = relay::receive(&mut frames, &mut printer);
            // First: what is said of a failure is for a terminal as it was.
            printer.raw = None;
            printer.finish(finish);
            // The guest waits for this before it ends the VM.
            let _ = frames.get_ref().shutdown(Shutdown::Both);
            let _ = done.send(());
        })?;
        Ok(Box::new(Serving { stream, thread: Some(thread), is_done }))
    }
}

/// Streams that are served.
struct Serving {
    stream: UnixStream,
    thread: Option<JoinHandle<Option<()>>>,
    is_done: Receiver<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The VM has ended, so nothing more comes, though its device may have its end open. What has come is passed on: a
        // Unix socket gives that first (unix_stream_read_generic).
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.is_done.recv_timeout(SHOW_BOUND) == Err(RecvTimeoutError::Timeout) {
            // A program that ended by itself has waited for its output. The thread ends with this process.
            terminal::restore();
            log::warn!("nobody reads what the program printed: the rest is lost");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // It only fails where the thread panicked, which has been told.
            let _ = thread.join();
        }
    }
}

/// Has what the program prints.
struct Printer {
    /// Until it cannot be written any more.
    log: Option<LogWriter>,
    attached: bool,
    ready: Option<Ready>,
    new_volumes: Vec<File>,
    requests: Arc<Requests>,
    /// Until the program has it: before, Ctrl-C ends the VM.
    terminal: Option<Prepared>,
    raw: Option<RawMode>,
}

impl relay::Receiver for Printer {
    fn started(&mut self, _session: u32) {
        if let Some(terminal) = self.terminal.take() {
            let raw = terminal.enter().inspect_err(|e| log::warn!("the terminal cannot be made raw: {e}"));
            self.raw = raw.ok();
        }
        self.requests.started.store(true, Ordering::Release);
        self.new_volumes.clear();
        self.ready.take().into_iter().for_each(Ready::tell);
    }

    fn printed(&mut self, kind: Kind, bytes: &[u8]) {
        if let Some(log) = &mut self.log
            && let Err(e) = log.add(kind, bytes)
        {
            log::warn!("the container's log ends here: {e}");
            self.log = None;
        }
        if self.attached && relay::print(kind, bytes).is_err() {
            // As a program learns that writes to a pipe without a reader.
            self.attached = false;
            self.requests.signal(PIPE);
        }
    }
}

impl Printer {
    fn finish(&mut self, finish: Finish) {
        if let Finish::Failed(failure) = finish {
            let _ = writeln!(io::stderr(), "microvm: {}", failure.message);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn output_that_nobody_reads_does_not_keep_the_process() {
        let (stream, _its) = UnixStream::pair().unwrap();
        let (done, is_done) = channel();
        let (release, is_released) = channel::<()>();
        let thread = thread::spawn(move || {
            let _ = is_released.recv();
            drop(done);
            Some(())
        });
        // It ends although the thread goes on.
        drop(Serving { stream, thread: Some(thread), is_done });
        release.send(()).unwrap();
    }
}
