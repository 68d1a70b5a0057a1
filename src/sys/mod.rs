//! The operating system's sharp edges, each behind a safe function.

pub mod background_close;
pub mod confinement;
pub mod daemon;
pub mod data;
pub mod event;
pub mod exec_watch;
pub mod file_io;
pub mod fork;
pub mod guest_iovec;
pub mod interface;
pub mod link_changes;
pub mod lock;
pub mod loop_device;
pub mod mapping;
pub mod names;
pub mod program;
pub mod signals;
pub mod socket_file;
pub mod syscalls;
pub mod tap;
pub mod terminal;
pub mod umask;
pub mod uring;
pub mod vhost;
pub mod violation;
pub mod watch;
