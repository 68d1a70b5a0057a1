//! The console: standard input and output.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::tcdrain;

/// Waits until the console has taken what was printed: what the kernel still holds of it ends with the machine.
pub fn drain() {
    let _ = tcdrain(std::io::stdout());
}

/// Opens the console again. The kernel opened it before there were modules: where the only one is virtio's there was
/// nothing to open, and where that is the last of two it was the other one.
pub fn reopen() {
    let mut options = File::options();
    let console = options.read(true).write(true).custom_flags(libc::O_NOCTTY).open("/dev/console");
    // A guest without any goes on without.
    if let Ok(console) = console {
        let _ =
            dup2_stdin(&console).and_then(|()| dup2_stdout(&console)).and_then(|()| dup2_stderr(&console));
    }
}
