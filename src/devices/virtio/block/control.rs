//! A disk on the control socket: `GET` and `PUT /devices/ID`.

use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use crate::config::Size;
use crate::devices::{ChangeError, DeviceControl, parse};

use super::SECTOR;
use super::worker::Shared;

pub(super) struct BlockControl(pub Arc<Shared>);

/// What can be changed. A field that is left out stays as it is; `null` takes a limit away.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    #[serde(default, deserialize_with = "given")]
    iops: Option<Option<u64>>,
    #[serde(default, deserialize_with = "given")]
    bandwidth: Option<Option<Size>>,
}

/// Tells `null` from a field that is left out.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(d: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(d).map(Some)
}

fn refuse_zero(name: &str, value: Option<Option<u64>>) -> Result<(), ChangeError> {
    match value {
        Some(Some(0)) => Err(ChangeError::Invalid(format!(
            "{name}=0: nothing would ever be read; allowed is 1 or more, or null for no limit"
        ))),
        _ => Ok(()),
    }
}

impl DeviceControl for BlockControl {
    fn id(&self) -> &str {
        &self.0.id
    }

    fn kind(&self) -> &'static str {
        "block"
    }

    fn describe(&self) -> Value {
        let (iops, bandwidth) = self.0.limits();
        json!({
            "size": Size(self.0.image.sectors.saturating_mul(SECTOR)),
            "readonly": self.0.image.readonly,
            "iops": iops,
            "bandwidth": bandwidth.map(Size),
        })
    }

    fn change(&mut self, request: Map<String, Value>) -> Result<(), ChangeError> {
        let change: Change = parse(request)?;
        let bandwidth = change.bandwidth.map(|size| size.map(|size| size.0));
        refuse_zero("iops", change.iops)?;
        refuse_zero("bandwidth", bandwidth)?;
        let before = self.0.limits();
        self.0.set_limits((change.iops.unwrap_or(before.0), bandwidth.unwrap_or(before.1)));
        Ok(())
    }
}
