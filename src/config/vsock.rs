//! The socket device: the guest's address, and where the host's programs meet it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::ConfigError;

/// The most bytes of a socket's path: `sun_path` has 108 with a NUL, and `_4294967295` is put behind it for the guest's
/// own connections.
pub const MAX_SOCKET_PATH: usize = 107 - "_4294967295".len();

/// A socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID, from 3 on: those below are reserved (virtio 1.3 §5.10.4).
    pub cid: u32,
    /// The Unix socket on which programs of the host reach the guest.
    pub socket: PathBuf,
}

impl VsockConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let len = self.socket.as_os_str().len();
        match self.cid {
            0 | 1 | 2 | u32::MAX => Err(ConfigError::VsockCid(self.cid)),
            _ if len == 0 => Err(ConfigError::EmptyPath("--vsock socket=PATH (vsock.socket in a --config)")),
            _ if len > MAX_SOCKET_PATH => Err(ConfigError::VsockPath(self.socket.clone(), len)),
            _ => Ok(()),
        }
    }

    /// Reads `cid=N,socket=PATH`. A path with a comma can be given in a `--config` only.
    ///
    /// # Errors
    /// The option that is unknown, missing or wrong.
    pub fn parse(text: &OsStr) -> Result<Self, ParseVsockError> {
        let (mut cid, mut socket) = (None, None);
        for part in text.as_bytes().split(|b| *b == b',') {
            let is_again = if let Some(value) = part.strip_prefix(b"cid=") {
                cid.replace(parse_cid(value)?).is_some()
            } else if let Some(path) = part.strip_prefix(b"socket=") {
                socket.replace(Path::new(OsStr::from_bytes(path)).to_path_buf()).is_some()
            } else {
                return Err(ParseVsockError::Option(String::from_utf8_lossy(part).into_owned()));
            };
            if is_again {
                return Err(ParseVsockError::Twice(String::from_utf8_lossy(part).into_owned()));
            }
        }
        Ok(Self {
            cid: cid.ok_or(ParseVsockError::Missing("cid=N"))?,
            socket: socket.ok_or(ParseVsockError::Missing("socket=PATH"))?,
        })
    }
}

fn parse_cid(text: &[u8]) -> Result<u32, ParseVsockError> {
    let text = String::from_utf8_lossy(text);
    // Rust would take a sign.
    let parsed = text.parse().ok().filter(|_| !text.starts_with('+'));
    parsed.ok_or_else(|| ParseVsockError::Cid(text.into_owned()))
}

/// A `--vsock` value that cannot be read.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ParseVsockError {
    /// An option that there is not.
    #[error("unknown option {0:?}: allowed are cid=N and socket=PATH")]
    Option(String),
    /// One option twice.
    #[error("{0:?} stands behind another value of the same option: give each once")]
    Twice(String),
    /// An option that must be there.
    #[error("{0} is missing: write cid=N,socket=PATH")]
    Missing(&'static str),
    /// Not a number of 32 bits.
    #[error("cid={0}: a CID is a number from 3 to 4294967294")]
    Cid(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<VsockConfig, ParseVsockError> {
        VsockConfig::parse(OsStr::new(text))
    }

    #[test]
    fn reads_both_options_in_any_order() {
        let expected = VsockConfig { cid: 7, socket: "/run/v.sock".into() };
        assert_eq!(parse("cid=7,socket=/run/v.sock").unwrap(), expected);
        assert_eq!(parse("socket=/run/v.sock,cid=7").unwrap(), expected);
        assert!(expected.validate().is_ok());
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, words) in [
            ("", "unknown option \"\""),
            ("cid=3", "socket=PATH is missing"),
            ("socket=v", "cid=N is missing"),
            ("cid=+3,socket=v", "cid=+3"),
            ("cid=4294967296,socket=v", "3 to 4294967294"),
            ("cid=3,socket=v,cid=4", "\"cid=4\" stands behind"),
            ("cid=3,socket=v,uds=w", "unknown option \"uds=w\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn reserved_cids_are_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            let config = VsockConfig { cid, socket: "v".into() };
            assert!(matches!(config.validate(), Err(ConfigError::VsockCid(_))), "{cid}");
        }
        assert!(VsockConfig { cid: 3, socket: "v".into() }.validate().is_ok());
    }

    #[test]
    fn the_path_has_room_for_a_port() {
        let config = |len| VsockConfig { cid: 3, socket: "x".repeat(len).into() };
        assert!(config(MAX_SOCKET_PATH).validate().is_ok());
        assert!(matches!(config(MAX_SOCKET_PATH + 1).validate(), Err(ConfigError::VsockPath(..))));
        assert!(matches!(config(0).validate(), Err(ConfigError::EmptyPath(_))));
    }
}
