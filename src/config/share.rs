//! A folder of the host's that the guest sees.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;

use super::ConfigError;

/// The most bytes of a tag (virtio 1.3 §5.11.4).
pub const MAX_TAG: usize = 36;

/// The most shares of a VM: each has threads and descriptors of its own.
pub const MAX_SHARES: usize = 8;

/// A shared folder. In JSON also the text that `--share` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShareConfig {
    /// The folder on the host.
    pub path: PathBuf,
    /// What the guest mounts it by.
    pub tag: String,
    /// Nothing in it can be changed by the guest.
    pub readonly: bool,
    /// The user that owns in the guest what this process's user owns on the host.
    pub uid: u32,
    /// The same for the group.
    pub gid: u32,
}

impl ShareConfig {
    /// A share that can be written, whose files are root's in the guest.
    #[must_use]
    pub fn new(path: PathBuf, tag: String) -> Self {
        Self { path, tag, readonly: false, uid: 0, gid: 0 }
    }

    /// Reads `PATH,tag=TAG[,readonly][,uid=N][,gid=N]`. A path with a comma can be given in a `--config` only.
    ///
    /// # Errors
    /// The option that is unknown, missing, wrong or there twice.
    pub fn parse(text: &OsStr) -> Result<Self, ParseShareError> {
        let mut parts = text.as_bytes().split(|b| *b == b',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(ParseShareError::NoPath);
        }
        let (mut tag, mut uid, mut gid, mut readonly) = (None, None, None, None);
        for part in parts {
            let option = String::from_utf8_lossy(part).into_owned();
            let is_again = match option.split_once('=') {
                None if option == "readonly" => readonly.replace(true).is_some(),
                Some(("tag", text)) => tag.replace(text.to_string()).is_some(),
                Some(("uid", number)) => uid.replace(parse_id(&option, number)?).is_some(),
                Some(("gid", number)) => gid.replace(parse_id(&option, number)?).is_some(),
                _ => return Err(ParseShareError::Option(option)),
            };
            if is_again {
                return Err(ParseShareError::Twice(option));
            }
        }
        Ok(Self {
            path: OsStr::from_bytes(path).into(),
            tag: tag.ok_or(ParseShareError::NoTag)?,
            readonly: readonly.unwrap_or(false),
            uid: uid.unwrap_or(0),
            gid: gid.unwrap_or(0),
        })
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if self.path.as_os_str().is_empty() {
            return Err(ConfigError::EmptyPath("--share (shares.path in a --config)"));
        }
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if self.tag.is_empty() || self.tag.len() > MAX_TAG || !self.tag.bytes().all(good) {
            return Err(ConfigError::ShareTag { path: self.path.clone(), tag: self.tag.clone() });
        }
        // It means "no id" to Linux.
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err(ConfigError::ShareId { path: self.path.clone() });
        }
        Ok(())
    }
}

/// Checks all shares, and that no two have one tag.
pub(super) fn validate(shares: &[ShareConfig]) -> Result<(), ConfigError> {
    if shares.len() > MAX_SHARES {
        return Err(ConfigError::TooManyShares(shares.len()));
    }
    for (place, share) in shares.iter().enumerate() {
        share.validate()?;
        if shares[..place].iter().any(|before| before.tag == share.tag) {
            return Err(ConfigError::ShareTwice { path: share.path.clone(), tag: share.tag.clone() });
        }
    }
    Ok(())
}

fn parse_id(option: &str, number: &str) -> Result<u32, ParseShareError> {
    // Rust would take a sign.
    let parsed = number.parse().ok().filter(|id| *id != u32::MAX && !number.starts_with('+'));
    parsed.ok_or_else(|| ParseShareError::Id(option.into()))
}

/// A `--share` value that cannot be read.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ParseShareError {
    /// Nothing in front.
    #[error(
        "there is no path in front: write PATH,tag=TAG[,OPTION…] (a path with a comma can be given in a --config)"
    )]
    NoPath,
    /// The guest would have nothing to mount it by.
    #[error("tag=TAG is missing: the guest mounts the folder by it (mount -t virtiofs TAG /mnt)")]
    NoTag,
    /// An option that is none.
    #[error(
        "unknown option {0:?}: allowed are tag=TAG, readonly, uid=N and gid=N (a path with a comma can be given in a \
         --config)"
    )]
    Option(String),
    /// One option twice.
    #[error("{0:?} stands behind another value of the same option: give each once")]
    Twice(String),
    /// No id.
    #[error("{0}: an id is a number from 0 to 4294967294")]
    Id(String),
}

impl<'de> Deserialize<'de> for ShareConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            path: PathBuf,
            tag: String,
            #[serde(default)]
            readonly: bool,
            #[serde(default)]
            uid: u32,
            #[serde(default)]
            gid: u32,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ShareConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a share as in \"src,tag=src\", or an object with path, tag, readonly, uid and gid",
                )
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<ShareConfig, E> {
                ShareConfig::parse(OsStr::new(v)).map_err(|e| E::custom(format!("share {v:?}: {e}")))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<ShareConfig, A::Error> {
                let f = Fields::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let Fields { path, tag, readonly, uid, gid } = f;
                Ok(ShareConfig { path, tag, readonly, uid, gid })
            }
        }
        d.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ShareConfig, ParseShareError> {
        ShareConfig::parse(OsStr::new(text))
    }

    #[test]
    fn all_options() {
        let share = parse("/srv/data,readonly,uid=999,tag=data,gid=998").unwrap();
        assert_eq!((share.tag.as_str(), share.readonly, share.uid, share.gid), ("data", true, 999, 998));
        let json = serde_json::to_string(&share).unwrap();
        assert_eq!(serde_json::from_str::<ShareConfig>(&json).unwrap(), share);
        assert_eq!(
            serde_json::from_str::<ShareConfig>("\"src,tag=a\"").unwrap(),
            parse("src,tag=a").unwrap()
        );
        let short = serde_json::from_str::<ShareConfig>(r#"{"path": "src", "tag": "a"}"#).unwrap();
        assert_eq!(short, ShareConfig::new("src".into(), "a".into()));
    }

    #[test]
    fn what_is_no_option_is_named() {
        for (text, words) in [
            ("", "no path"),
            (",tag=a", "no path"),
            ("a", "tag=TAG is missing"),
            ("a,tag=a,ro", "\"ro\""),
            ("a,tag=a,readonly=1", "\"readonly=1\""),
            ("a,tag=a,", "\"\""),
            ("a,tag=a,tag=b", "\"tag=b\" stands behind"),
            ("a,tag=a,readonly,readonly", "\"readonly\" stands behind"),
            ("a,tag=a,uid=+1", "uid=+1"),
            ("a,tag=a,uid=4294967295", "uid=4294967295"),
            ("a,tag=a,gid=wheel", "gid=wheel"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn tags_are_short_and_differ() {
        let check = |texts: &[&str]| {
            let shares: Vec<_> = texts.iter().map(|t| parse(t).unwrap()).collect();
            validate(&shares)
        };
        let longest = "a,tag=123456789012345678901234567890123456";
        check(&[longest, "a,tag=b"]).unwrap();
        for bad in [&format!("{longest}7"), "a,tag=", "a,tag=ä", "a,tag=a/b"] {
            assert!(matches!(check(&[bad]), Err(ConfigError::ShareTag { .. })), "{bad}");
        }
        assert!(matches!(check(&["a,tag=x", "b,tag=x"]), Err(ConfigError::ShareTwice { .. })));
        let many: Vec<_> = (0..9).map(|n| format!("a,tag=t{n}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert!(matches!(check(&many), Err(ConfigError::TooManyShares(9))));
        check(&many[..8]).unwrap();
        let mut share = parse("a,tag=x").unwrap();
        share.uid = u32::MAX;
        assert!(matches!(validate(&[share]), Err(ConfigError::ShareId { .. })));
    }
}
