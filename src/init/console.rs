//! The console: standard input and output.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use microvm::guest::TERMINAL;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};

/// Waits until the console has taken what was printed: what the kernel still holds of it ends with the machine.
pub fn drain() {
    let _ = tcdrain(std::io::stdout());
}

/// Makes the container's terminal standard input, output and error. Without `keys` there is no input, and output passes
/// as it is. Does nothing in a machine without it.
pub fn take(keys: bool) {
    let mut options = File::options();
    let Ok(terminal) = options.read(true).write(true).custom_flags(libc::O_NOCTTY).open(TERMINAL) else {
        return;
    };
    let input = if keys { terminal.try_clone() } else { File::open("/dev/null") };
    if !keys && let Ok(mut modes) = tcgetattr(&terminal) {
        modes.make_raw();
        let _ = tcsetattr(&terminal, OptionalActions::Now, &modes);
    }
    let _ = dup2_stdout(&terminal).and_then(|()| dup2_stderr(&terminal));
    let _ = input.map(|input| dup2_stdin(&input));
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
