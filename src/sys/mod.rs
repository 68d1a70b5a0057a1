//! The operating system's sharp edges, each behind a safe function.

pub mod confinement;
pub mod mapping;
pub mod signals;
pub mod syscalls;
pub mod terminal;
pub mod violation;
