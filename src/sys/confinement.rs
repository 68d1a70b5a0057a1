//! What of confinement the kernel has, and closing descriptors that nobody named.

use std::io;
use std::os::fd::RawFd;
use std::ptr;

/// Version of Landlock's interface (`landlock_create_ruleset(2)`); 0: this kernel has none, or it is switched off.
#[must_use]
pub fn landlock_abi() -> u32 {
    const VERSION: libc::c_long = 1;
    // SAFETY: with this flag the call takes no attributes (null, 0), makes no descriptor, and only returns a number.
    let abi =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<u8>(), 0_usize, VERSION) };
    u32::try_from(abi).unwrap_or(0)
}

/// Whether the kernel has seccomp filters that answer a call with SIGSYS (`seccomp(2)`, Linux 4.14).
#[must_use]
pub fn has_seccomp() -> bool {
    let trap = libc::SECCOMP_RET_TRAP;
    // SAFETY: the operation reads one u32, which lives until the call returns.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const trap) };
    answer == 0
}

/// Whether the kernel has `close_range(2)` (Linux 5.9).
#[must_use]
pub fn has_close_range() -> bool {
    // No descriptor has the highest number, so this closes nothing.
    close_range(libc::c_uint::MAX, libc::c_uint::MAX, 0).is_ok()
}

/// Closes every descriptor of this process that is not among `kept`.
///
/// Whoever owns one that is not among them must not use it any more: its number may soon be another descriptor's.
///
/// # Errors
/// The kernel has no `close_range(2)`.
pub fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<_> = kept.iter().filter_map(|fd| libc::c_uint::try_from(*fd).ok()).collect();
    kept.sort_unstable();
    let mut first = 0;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX, 0)
}

/// Has every descriptor closed when this process starts a program, but standard input, output and error.
///
/// # Errors
/// The kernel has no such flag (Linux 5.11).
pub fn close_all_on_exec() -> io::Result<()> {
    let first = libc::STDERR_FILENO as libc::c_uint + 1;
    close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int)
}

fn close_range(first: libc::c_uint, last: libc::c_uint, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the call touches no memory. That nobody goes on to use what it closes is the promise of this module's
    // callers, see `close_all_but`.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has all threads allocate from one arena. glibc would make one for each, up to a number for which it opens a file in
/// `/sys` when the first few are in use: by then no file can be opened. It also saves their memory.
pub fn share_one_arena() {
    // SAFETY: changes how malloc divides its memory, and nothing that was allocated.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
