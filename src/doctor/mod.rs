//! What this host offers to a VM, and what to do about what it lacks.

mod host;
mod kvm;
mod report;

use std::path::Path;

use serde::Serialize;

pub use report::write_table;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// There.
    Ok,
    /// Not there; `boot` works without it.
    Missing,
    /// Without it `boot` does not work.
    Fatal,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it, where something can be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), advice: None }
    }

    fn missing(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, state: State::Missing, found: found.into(), advice: Some(advice.into()) }
    }

    fn fatal(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { state: State::Fatal, ..Self::missing(name, found, advice) }
    }
}

/// Everything that was found. The JSON of `microvm doctor --json` is this type.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The version of this JSON.
    pub schema: &'static str,
    /// `microvm boot` of a real kernel will work here.
    pub boot: bool,
    /// One entry for each line.
    pub checks: Vec<Check>,
}

/// Looks at this host. Changes nothing.
#[must_use]
pub fn examine(kvm_device: &Path) -> Report {
    let mut checks = kvm::checks(kvm_device);
    checks.extend(host::checks());
    let boot = checks.iter().all(|c| c.state != State::Fatal);
    Report { schema: "microvm.doctor/1", boot, checks }
}
