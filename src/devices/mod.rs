//! The devices that a guest sees.

mod control;
pub mod legacy;
pub mod rate_limiter;
pub(crate) mod timer;
pub mod virtio;

pub use control::{AddDeviceError, ChangeError, DeviceControl, DeviceControls, DeviceSummary, parse};
