//! The socket device on the control socket: `GET /devices/vsock`.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::devices::DeviceControl;

use super::NAME;
use super::counters::VsockCounters;

/// There is nothing to change.
pub(super) struct VsockControl {
    pub cid: u32,
    pub socket: PathBuf,
    pub counters: Arc<VsockCounters>,
}

impl DeviceControl for VsockControl {
    fn id(&self) -> &str {
        NAME
    }

    fn kind(&self) -> &'static str {
        "vsock"
    }

    fn describe(&self) -> Value {
        json!({
            "cid": self.cid,
            "socket": self.socket.to_string_lossy(),
            "open_connections": self.counters.open.get(),
        })
    }
}
