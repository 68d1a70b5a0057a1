//! A card on the control socket: `GET /devices/net0`.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::devices::DeviceControl;

use super::card::Shared;

/// There is nothing to change.
pub(super) struct NetControl(pub Arc<Shared>);

impl DeviceControl for NetControl {
    fn id(&self) -> &str {
        &self.0.id
    }

    fn kind(&self) -> &'static str {
        "net"
    }

    fn describe(&self) -> Value {
        json!({
            "backend": self.0.name,
            "vhost": self.0.is_vhost,
            "mac": self.0.mac.to_string(),
            "link": if self.0.has_link() { "up" } else { "down" },
        })
    }
}
