//! `microvm`: parse the command line, run the subcommand, print the error chain, choose the exit status.

use std::io;
use std::process::ExitCode;

use microvm::cli::{self, CliError};
use microvm::metrics::Clock;
use microvm::sys::{confinement, signals};

fn main() -> ExitCode {
    // First of all, so that the timeline starts as close to exec as user space can see.
    let clock = Clock::start();
    confinement::share_one_arena();
    // A file that reaches the user's size limit then fails with an error instead of ending us.
    signals::ignore(libc::SIGXFSZ);
    match cli::run(clock) {
        Ok(status) => ExitCode::from(status),
        // Nobody reads any more, as behind `| head`.
        Err(CliError::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(1),
        Err(error) => {
            cli::say(&cli::chain(&error));
            ExitCode::from(error.exit_status())
        }
    }
}
