//! The balloon on the control socket: `GET` and `PUT /devices/balloon`.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::Size;
use crate::devices::{ChangeError, DeviceControl, parse};

use super::{BalloonHandle, BalloonStats, NAME};

pub(super) struct BalloonControl(pub BalloonHandle);

/// What can be changed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    target: Size,
}

impl DeviceControl for BalloonControl {
    fn id(&self) -> &str {
        NAME
    }

    fn kind(&self) -> &'static str {
        "balloon"
    }

    fn describe(&self) -> Value {
        let status = self.0.status();
        let stat = |tag: usize| status.stats.values.get(tag).copied().flatten();
        json!({
            "target": status.target,
            "actual": status.actual,
            "active": status.active,
            "free_bytes": stat(BalloonStats::FREE),
            "total_bytes": stat(BalloonStats::TOTAL),
            "available_bytes": stat(BalloonStats::AVAILABLE),
        })
    }

    fn change(&mut self, request: Map<String, Value>) -> Result<(), ChangeError> {
        let Change { target } = parse(request)?;
        self.0.set_target(target).map_err(|e| ChangeError::Invalid(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_set_and_shown() {
        let mut control = BalloonControl(BalloonHandle::new(Size(0), Size::mib(64)));
        let request = |text: &str| serde_json::from_str(text).unwrap();
        control.change(request(r#"{"target": "32M"}"#)).unwrap();
        assert_eq!(control.describe()["target"], "32M");
        for wrong in [r#"{"target": "65M"}"#, r#"{"size": "1M"}"#, r#"{"target": true}"#, "{}"] {
            assert!(control.change(request(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(control.describe()["target"], "32M");
    }
}
