//! A system call that the seccomp filter refuses: one line that names it, and the end of the process.
//!
//! Everything here runs in a signal handler, at any point of any thread: no allocation, no lock that is waited for.

use std::io;
use std::mem::MaybeUninit;

use super::{signals, syscalls, terminal};

/// The exit status: 128 and the number of SIGSYS, as of any program that a signal ended.
pub const STATUS: libc::c_int = 128 + libc::SIGSYS;

/// What the kernel tells of a refused call: `siginfo_t` of a SIGSYS (Linux, `include/uapi/asm-generic/siginfo.h`).
#[repr(C)]
struct SigsysInfo {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    padding: libc::c_int,
    call_address: *const libc::c_void,
    number: libc::c_uint,
    architecture: libc::c_uint,
}

/// Bytes of a thread's name with its NUL (`PR_GET_NAME`).
const NAME: usize = 16;

/// From now on a refused system call in any thread writes a line to standard error and ends the process with [`STATUS`].
///
/// # Errors
/// The kernel refuses the handler.
pub fn install_handler() -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `action` is a whole sigaction, and all zeros (no flags, an empty mask) are valid for it.
    let action = unsafe { action.assume_init_mut() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = refused;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is valid for reading and its handler does what a handler may; the old action is not asked for.
    if unsafe { libc::sigaction(libc::SIGSYS, action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // A parent may have left it blocked: then the kernel would end the process without a word.
    signals::unblock(libc::SIGSYS);
    Ok(())
}

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t; for a SIGSYS the fields read here are those that it
    // filled, and for one that another process sent they are zero or that process's numbers, valid as well.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    let mut name = [0_u8; NAME];
    // SAFETY: the call writes at most 16 bytes to `name`, which is that long.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let line = Line::of(&name, info.number);
    terminal::restore_from_signal();
    // SAFETY: the bytes are valid for reading. If nobody takes them, the status still tells.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    // SAFETY: ends the process at once, running nothing of ours.
    unsafe { libc::_exit(STATUS) }
}

/// A line of text without an allocation; what does not fit is cut.
struct Line {
    bytes: [u8; 240],
    len: usize,
}

impl Line {
    fn of(thread: &[u8], number: u32) -> Self {
        let mut line = Self { bytes: [0; 240], len: 0 };
        line.push(b"microvm: the sandbox refused the system call ");
        line.push(syscalls::name(number).as_bytes());
        line.push(b" (");
        line.push_number(number);
        line.push(b") of thread ");
        line.push(thread.split(|b| *b == 0).next().unwrap_or_default());
        line.push(
            b": a guest broke out of its VM, or this is a bug (docs/security.md tells how to report it)\n",
        );
        line
    }

    fn push(&mut self, text: &[u8]) {
        for byte in text.iter().take(self.bytes.len() - self.len) {
            self.bytes[self.len] = *byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut place = 1_000_000_000;
        while place > 1 && number < place {
            place /= 10;
        }
        while place > 0 {
            self.push(&[b'0' + (number / place % 10) as u8]);
            place /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(thread: &[u8], number: u32) -> String {
        let line = Line::of(thread, number);
        String::from_utf8(line.bytes[..line.len].to_vec()).unwrap()
    }

    #[test]
    fn a_line_names_call_and_thread() {
        let line = text(b"vcpu3\0garbage", 59);
        assert!(line.contains(" execve (59) of thread vcpu3: ") && line.ends_with(")\n"), "{line}");
        assert!(text(b"", 0).contains(" read (0) "));
        assert!(text(b"x", u32::MAX).contains(" unknown (4294967295) "));
    }

    #[test]
    fn the_longest_line_fits() {
        assert!(text(&[b'x'; NAME], libc::SYS_sched_get_priority_max as u32).ends_with('\n'));
    }
}
