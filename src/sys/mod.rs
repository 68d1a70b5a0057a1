//! The operating system's sharp edges, each behind a safe function.

pub mod guest_iovec;
pub mod mapping;
pub mod signals;
pub mod tap;
pub mod terminal;
