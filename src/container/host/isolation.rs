//! What is between a program and its host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What is between a program and its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Another root folder alone: the floor to compare with.
    Process,
    /// An ordinary container on the host's kernel.
    Container,
    /// A virtual machine with a kernel of its own.
    #[default]
    Vm,
}

impl Isolation {
    /// All, the least first.
    pub const ALL: [Self; 3] = [Self::Process, Self::Container, Self::Vm];

    /// As flags have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Container => "container",
            Self::Vm => "vm",
        }
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No isolation.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("allowed are vm, container and process")]
pub struct ParseIsolationError;

impl FromStr for Isolation {
    type Err = ParseIsolationError;

    fn from_str(text: &str) -> Result<Self, ParseIsolationError> {
        Self::ALL.into_iter().find(|isolation| isolation.name() == text).ok_or(ParseIsolationError)
    }
}
