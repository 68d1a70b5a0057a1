//! A share on the control socket: `GET /devices/share0`.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::devices::DeviceControl;

use super::counters::ShareCounters;

/// There is nothing to change.
pub(super) struct ShareControl {
    pub id: String,
    pub tag: String,
    pub path: PathBuf,
    pub readonly: bool,
    pub counters: ShareCounters,
}

impl DeviceControl for ShareControl {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> &'static str {
        "share"
    }

    fn describe(&self) -> Value {
        json!({
            "tag": self.tag,
            "path": self.path.to_string_lossy(),
            "readonly": self.readonly,
            "known_files": self.counters.inodes.get(),
            "open_files": self.counters.open.get(),
        })
    }
}
