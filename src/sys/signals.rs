//! The signals that a VM hears, read from a descriptor instead of a handler.

use std::fs::File;
use std::io::{self, Read};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};

use rustix::event::{PollFd, PollFlags, poll};

/// Signals that end the VM in order. One that the parent ignores (`nohup`) stays ignored.
const ENDING: [libc::c_int; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// A descriptor that turns readable when a signal has arrived that a VM hears.
pub struct Signals(File);

/// A signal that a VM hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// One that ends the VM: its number.
    End(u8),
    /// The terminal has another size (SIGWINCH).
    Resize,
}

/// Who has sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The kernel: a key was pressed in the terminal, whose other processes have got the signal, too.
    Kernel,
    /// A process, to this one.
    Process,
}

impl Signals {
    /// Blocks the signals in this thread, and so in every thread it starts later, and routes them here.
    ///
    /// # Errors
    /// The kernel has no descriptor left.
    pub fn new() -> io::Result<Self> {
        // A blocked signal reaches the descriptor even where it is ignored, so those are left out.
        let ending = ENDING.into_iter().filter(|signal| !is_ignored(*signal));
        descriptor(ending.chain([libc::SIGWINCH])).map(Self)
    }

    /// A signal that has arrived, if one has.
    pub fn take(&mut self) -> Option<Signal> {
        Some(self.take_with_sender()?.0)
    }

    /// The same, with who has sent it.
    pub fn take_with_sender(&mut self) -> Option<(Signal, Sender)> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        // `ssi_signo` is the first field, a u32 in this machine's byte order, and `ssi_code` the third, an i32.
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let code = i32::from_ne_bytes([info[8], info[9], info[10], info[11]]);
        let sender = if code == libc::SI_KERNEL { Sender::Kernel } else { Sender::Process };
        match u8::try_from(number).ok()? {
            number if libc::c_int::from(number) == libc::SIGWINCH => Some((Signal::Resize, sender)),
            number => Some((Signal::End(number), sender)),
        }
    }
}

impl Signals {
    /// Waits for the next signal. `None`: the descriptor fails.
    pub fn wait(&mut self) -> Option<Signal> {
        loop {
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
            if let Some(signal) = self.take() {
                return Some(signal);
            }
        }
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no new action is given; the old one is written to `action`, which is valid for that.
    let failed = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } != 0;
    // SAFETY: all zeros is a valid `sigaction`, and the kernel wrote a valid one over it if it wrote at all.
    let action = unsafe { action.assume_init() };
    !failed && action.sa_sigaction == libc::SIG_IGN
}

/// Ignores `signal` in the whole process.
pub fn ignore(signal: libc::c_int) {
    // SAFETY: ignoring runs no code of ours. It fails for numbers that are no signals alone.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Lets `signal` come through to this thread, whatever the parent process has blocked.
pub fn unblock(signal: libc::c_int) {
    change_mask(libc::SIG_UNBLOCK, signal);
}

/// Keeps `signal` from this thread.
pub fn block(signal: libc::c_int) {
    change_mask(libc::SIG_BLOCK, signal);
}

/// Blocks signals in this thread, and gives a descriptor that they are read from.
pub(super) fn descriptor(signals: impl IntoIterator<Item = libc::c_int>) -> io::Result<File> {
    let set = set_of(signals);
    // SAFETY: `set` is valid for reading; the old mask is not asked for.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    // SAFETY: `set` is valid for reading; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is open, new, and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn set_of(signals: impl IntoIterator<Item = libc::c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised on the line above.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: `set` is an initialised signal set; a number that is no signal's leaves it as it is.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

fn change_mask(how: libc::c_int, signal: libc::c_int) {
    let set = set_of([signal]);
    // SAFETY: `set` is valid for reading; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) };
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
