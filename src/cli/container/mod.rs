//! The commands for containers, running and ended.

pub mod cp;
pub mod exec;
pub mod inspect;
pub mod logs;
pub mod rm;
pub mod stats;
pub mod stop;
mod unpack;
pub mod wait;

use super::{CliError, chain, say};

/// Does something to each of several containers, and goes on where one fails, which is told: then the exit status is 1.
fn for_each(names: &[String], mut act: impl FnMut(&str) -> Result<(), CliError>) -> u8 {
    let mut status = 0;
    for name in names {
        if let Err(e) = act(name) {
            say(&chain(&e));
            status = 1;
        }
    }
    status
}
