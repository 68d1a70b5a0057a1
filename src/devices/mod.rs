//! The devices that a guest sees.

pub mod legacy;
pub mod rate_limiter;
mod timer;
pub mod virtio;
