//! The devices that a guest sees.

mod control;
pub mod legacy;
pub mod virtio;

pub use control::{AddDeviceError, ChangeError, DeviceControl, DeviceControls, DeviceSummary, parse};
