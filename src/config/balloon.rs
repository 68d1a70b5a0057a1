//! The memory balloon.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;

use super::size::{ParseSizeError, Size};

/// A day: longer than anybody waits for statistics.
const MAX_STATS: u32 = 24 * 3600;

/// A memory balloon. In JSON also the text that `--balloon` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonConfig {
    /// How large it is asked to be when the guest starts.
    pub size: Size,
    /// The guest takes pages back from it before it kills a process for want of memory.
    pub deflate_on_oom: bool,
    /// The guest tells which pages it does not use, and the host has them back.
    pub free_page_reporting: bool,
    /// The guest tells how it uses its memory, every so many seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<u32>,
}

/// A `--balloon` value that cannot be read.
#[derive(Debug, Error)]
pub enum ParseBalloonError {
    /// The size in front.
    #[error(transparent)]
    Size(#[from] ParseSizeError),
    /// The statistics' interval.
    #[error("stats={0:?}: give a number of seconds from 1 to {MAX_STATS}")]
    Stats(String),
    /// An option behind it.
    #[error("unknown option {0:?}: allowed are deflate-on-oom, free-page-reporting and stats=SECONDS")]
    Option(String),
}

/// `SIZE[,deflate-on-oom][,free-page-reporting][,stats=SECONDS]`
impl FromStr for BalloonConfig {
    type Err = ParseBalloonError;

    fn from_str(text: &str) -> Result<Self, ParseBalloonError> {
        let mut parts = text.split(',');
        let size = parts.next().unwrap_or_default().parse()?;
        let mut balloon = Self { size, deflate_on_oom: false, free_page_reporting: false, stats: None };
        for part in parts {
            match (part, part.strip_prefix("stats=")) {
                ("deflate-on-oom", _) => balloon.deflate_on_oom = true,
                ("free-page-reporting", _) => balloon.free_page_reporting = true,
                (_, Some(seconds)) => balloon.stats = Some(parse_stats(seconds)?),
                (other, None) => return Err(ParseBalloonError::Option(other.to_string())),
            }
        }
        Ok(balloon)
    }
}

fn parse_stats(text: &str) -> Result<u32, ParseBalloonError> {
    // Rust would take a sign.
    let parsed = text.parse().ok().filter(|_| !text.starts_with('+'));
    parsed.filter(is_interval).ok_or_else(|| ParseBalloonError::Stats(text.to_string()))
}

fn is_interval(seconds: &u32) -> bool {
    (1..=MAX_STATS).contains(seconds)
}

impl<'de> Deserialize<'de> for BalloonConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            #[serde(default = "no_size")]
            size: Size,
            #[serde(default)]
            deflate_on_oom: bool,
            #[serde(default)]
            free_page_reporting: bool,
            stats: Option<u32>,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = BalloonConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a balloon as in \"64M,stats=5\", or an object with size, deflate_on_oom, free_page_reporting and stats",
                )
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<BalloonConfig, E> {
                v.parse().map_err(E::custom)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<BalloonConfig, A::Error> {
                let Fields { size, deflate_on_oom, free_page_reporting, stats } =
                    Fields::deserialize(de::value::MapAccessDeserializer::new(map))?;
                if let Some(seconds) = stats.filter(|s| !is_interval(s)) {
                    return Err(de::Error::custom(ParseBalloonError::Stats(seconds.to_string())));
                }
                Ok(BalloonConfig { size, deflate_on_oom, free_page_reporting, stats })
            }
        }
        d.deserialize_any(Visitor)
    }
}

fn no_size() -> Size {
    Size(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_say_the_same() {
        let text = "64M,deflate-on-oom,free-page-reporting,stats=5";
        let balloon: BalloonConfig = text.parse().unwrap();
        assert_eq!((balloon.size, balloon.stats), (Size::mib(64), Some(5)));
        assert!(balloon.deflate_on_oom && balloon.free_page_reporting);
        let json = serde_json::to_string(&balloon).unwrap();
        assert_eq!(serde_json::from_str::<BalloonConfig>(&json).unwrap(), balloon);
        assert_eq!(serde_json::from_str::<BalloonConfig>(&format!("{text:?}")).unwrap(), balloon);
        assert_eq!(serde_json::from_str::<BalloonConfig>("{}").unwrap(), "0".parse().unwrap());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, word) in [
            ("", "size"),
            ("64M,oom", "\"oom\""),
            ("0,stats=0", "1 to"),
            ("0,stats=+5", "1 to"),
            ("0,stats=x", "1 to"),
        ] {
            let error = text.parse::<BalloonConfig>().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(serde_json::from_str::<BalloonConfig>(r#"{"stats": 0}"#).is_err());
    }
}
