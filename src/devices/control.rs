//! What a device can be asked while the VM runs.

use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

/// The longest id of a device in bytes.
const MAX_ID: usize = 64;

/// A device as the control socket sees it. A device that has something to be asked registers one with
/// [`DeviceControls::add`] while the VM is built.
///
/// All of this runs on the event loop's thread, so nothing here may wait for the guest: a driver that never loads must
/// not hold anyone up. What the guest has to do is noted (a balloon's target in its configuration space), and
/// [`DeviceControl::describe`] shows how far it has come.
pub trait DeviceControl: Send {
    /// Its name in this VM, as `disk0`: letters, digits, `_`, `-` and `.`.
    fn id(&self) -> &str;

    /// What it is, as `block`.
    fn kind(&self) -> &'static str;

    /// What it is doing, for `GET /devices/ID`: a JSON object.
    fn describe(&self) -> Value;

    /// Changes what `PUT /devices/ID` asks for, and nothing if it is refused. A field that the device does not know
    /// must be refused by name: read `request` into a struct with `#[serde(deny_unknown_fields)]` ([`parse`] does).
    ///
    /// # Errors
    /// What is wrong with the request, and what is allowed.
    fn change(&mut self, request: Map<String, Value>) -> Result<(), ChangeError> {
        let _ = request;
        Err(ChangeError::Fixed)
    }
}

/// A change that a device refuses.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// It has nothing that can be changed.
    #[error("this device has nothing to change")]
    Fixed,
    /// The request is wrong: a field, or its value.
    #[error("{0}")]
    Invalid(String),
    /// The request is right, but not now.
    #[error("{0}")]
    NotNow(String),
}

/// Reads a request into the device's own type.
///
/// # Errors
/// An unknown field or a value of the wrong type, by name.
pub fn parse<T: serde::de::DeserializeOwned>(request: Map<String, Value>) -> Result<T, ChangeError> {
    serde_json::from_value(Value::Object(request)).map_err(|e| ChangeError::Invalid(e.to_string()))
}

/// A device in the list of all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceSummary {
    /// Its name in this VM.
    pub id: String,
    /// What it is.
    pub kind: &'static str,
}

/// A device cannot be registered.
#[derive(Debug, Error)]
pub enum AddDeviceError {
    /// Two devices of one name.
    #[error("two devices have the id {0}: give one of them another with id=NAME")]
    Taken(String),
    /// A name that does not fit a path.
    #[error(
        "the device id {0:?} is not 1 to {MAX_ID} letters, digits, _, - and .: give another with id=NAME"
    )]
    BadId(String),
}

/// The devices of one VM that can be asked, in the order of their registration.
#[derive(Default)]
pub struct DeviceControls(Vec<Box<dyn DeviceControl>>);

impl DeviceControls {
    /// Registers a device.
    ///
    /// # Errors
    /// Its id is taken or cannot be one.
    pub fn add(&mut self, device: Box<dyn DeviceControl>) -> Result<(), AddDeviceError> {
        let id = device.id();
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(allowed) {
            return Err(AddDeviceError::BadId(id.into()));
        }
        if self.0.iter().any(|d| d.id() == id) {
            return Err(AddDeviceError::Taken(id.into()));
        }
        self.0.push(device);
        Ok(())
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> Vec<DeviceSummary> {
        self.0.iter().map(|d| DeviceSummary { id: d.id().into(), kind: d.kind() }).collect()
    }

    /// The device of this id.
    pub fn get(&mut self, id: &str) -> Option<&mut (dyn DeviceControl + 'static)> {
        self.0.iter_mut().find(|d| d.id() == id).map(AsMut::as_mut)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Default)]
    struct Balloon {
        id: &'static str,
        target: u64,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Request {
        target: u64,
    }

    impl DeviceControl for Balloon {
        fn id(&self) -> &str {
            self.id
        }
        fn kind(&self) -> &'static str {
            "balloon"
        }
        fn describe(&self) -> Value {
            json!({ "target": self.target })
        }
        fn change(&mut self, request: Map<String, Value>) -> Result<(), ChangeError> {
            self.target = parse::<Request>(request)?.target;
            Ok(())
        }
    }

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn ids_are_unique_and_fit_a_path() {
        let mut controls = DeviceControls::default();
        let mut add = |id| controls.add(Box::new(Balloon { id, ..Balloon::default() }));
        assert!(add("balloon0").is_ok());
        assert!(matches!(add("balloon0"), Err(AddDeviceError::Taken(_))));
        for id in ["", "a/b", "a b", "ä", "a?b", "%41"] {
            assert!(matches!(add(id), Err(AddDeviceError::BadId(_))), "{id}");
        }
    }

    #[test]
    fn a_change_is_whole_or_refused_by_name() {
        let mut balloon = Balloon { id: "balloon0", ..Balloon::default() };
        balloon.change(object(json!({ "target": 5 }))).unwrap();
        let error = balloon.change(object(json!({ "target": 6, "size": 7 }))).unwrap_err();
        assert!(error.to_string().contains("unknown field `size`"), "{error}");
        assert_eq!(balloon.describe(), json!({ "target": 5 }));
    }
}
