//! Where a console of the guest's goes on the host.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, VmConfig};

/// The host's end of a console: of the serial port (COM1) or of the virtio console (hvc0).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostEnd {
    /// Standard input and output; raw mode when standard input is a terminal.
    Stdio,
    /// No such console at all.
    Null,
    /// Output only, into a new or emptied file.
    File(PathBuf),
}

impl HostEnd {
    /// Reads what `--serial` and `--console` take.
    ///
    /// # Errors
    /// None of the allowed words; says which these are.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        match (text.as_bytes(), text.as_bytes().strip_prefix(b"file=")) {
            (b"stdio", _) => Ok(Self::Stdio),
            (b"null", _) => Ok(Self::Null),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(OsStr::from_bytes(path).into())),
            _ => Err("allowed are stdio, null and file=PATH".into()),
        }
    }

    pub(super) fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::File(path) => Some(path),
            Self::Stdio | Self::Null => None,
        }
    }
}

impl VmConfig {
    /// Where the serial port goes. Where nobody says, it leaves standard input and output to a virtio console that has
    /// them.
    #[must_use]
    pub fn serial_end(&self) -> &HostEnd {
        let default = if self.console_end() == &HostEnd::Stdio { &HostEnd::Null } else { &HostEnd::Stdio };
        self.serial.as_ref().unwrap_or(default)
    }

    /// Where the virtio console goes. There is none where nobody asks for it.
    #[must_use]
    pub fn console_end(&self) -> &HostEnd {
        self.console.as_ref().unwrap_or(&HostEnd::Null)
    }

    /// Two consoles cannot share an end.
    pub(super) fn validate_consoles(&self) -> Result<(), ConfigError> {
        match (self.console_end(), self.serial_end()) {
            (HostEnd::Stdio, HostEnd::Stdio) => Err(ConfigError::TwoOnStdio),
            (HostEnd::File(console), HostEnd::File(serial)) if console == serial => {
                Err(ConfigError::TwoInFile(console.clone()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_words_are_allowed() {
        assert_eq!(HostEnd::parse("stdio".as_ref()), Ok(HostEnd::Stdio));
        assert_eq!(HostEnd::parse("null".as_ref()), Ok(HostEnd::Null));
        assert_eq!(HostEnd::parse("file=a=b".as_ref()), Ok(HostEnd::File("a=b".into())));
        for wrong in ["", "file", "file=", "tty", "Stdio", "stdio "] {
            assert!(HostEnd::parse(wrong.as_ref()).unwrap_err().contains("file=PATH"), "{wrong:?}");
        }
    }

    #[test]
    fn one_console_has_standard_input_and_output() {
        use HostEnd::{File, Null, Stdio};
        let file = |path: &str| File(path.into());
        for (serial, console, ends) in [
            (None, None, Some((Stdio, Null))),
            (None, Some(Stdio), Some((Null, Stdio))),
            (None, Some(file("a")), Some((Stdio, file("a")))),
            (Some(Null), None, Some((Null, Null))),
            (Some(file("a")), Some(Stdio), Some((file("a"), Stdio))),
            (Some(file("a")), Some(file("b")), Some((file("a"), file("b")))),
            (Some(Stdio), Some(Stdio), None),
            (Some(file("a")), Some(file("a")), None),
        ] {
            let config = VmConfig { serial, console, ..VmConfig::new("k".into()) };
            let found = (config.serial_end().clone(), config.console_end().clone());
            assert_eq!(config.validate().is_ok().then_some(found), ends, "{config:?}");
        }
    }
}
