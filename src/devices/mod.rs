//! The devices that a guest sees.

pub mod legacy;
pub mod virtio;
