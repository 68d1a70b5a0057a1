//! Guest memory: how much, and what stands behind it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;

use super::ConfigError;
use super::size::{ParseSizeError, Size};

/// Below this no kernel fits: the first MiB holds tables, and a kernel is loaded above it.
pub(super) const MIN_SIZE: Size = Size::mib(2);
/// 4 TiB: far below the 46 bits of physical address that every KVM host gives its guests.
pub(super) const MAX_SIZE: Size = Size::mib(4 << 20);
const DEFAULT_SIZE: Size = Size::mib(256);
const PAGE_SIZE: Size = Size(4096);

/// Guest memory. In JSON also the text that `--memory` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryConfig {
    /// How much.
    pub size: Size,
    /// What it is mapped from.
    pub backing: Backing,
    /// Huge pages from the host's pool, or none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugePages>,
}

/// What guest memory is mapped from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd, which another process can share.
    Memfd,
}

/// The size of the host's huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB.
    #[serde(rename = "1G")]
    Size1G,
}

impl HugePages {
    /// The page size in bytes.
    #[must_use]
    pub const fn size(self) -> Size {
        match self {
            Self::Size2M => Size::mib(2),
            Self::Size1G => Size::mib(1024),
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: DEFAULT_SIZE, backing: Backing::default(), hugepages: None }
    }
}

impl MemoryConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let unit = self.hugepages.map_or(PAGE_SIZE, HugePages::size);
        match self.size {
            size if size < MIN_SIZE => Err(ConfigError::MemoryTooSmall(size)),
            size if size > MAX_SIZE => Err(ConfigError::MemoryTooLarge(size)),
            size if !size.0.is_multiple_of(unit.0) => Err(ConfigError::MemoryUnaligned(size, unit)),
            _ => Ok(()),
        }
    }
}

/// A `--memory` value that cannot be read.
#[derive(Debug, Error)]
pub enum ParseMemoryError {
    /// The size in front.
    #[error(transparent)]
    Size(#[from] ParseSizeError),
    /// An option behind it.
    #[error(
        "unknown option {0:?}: allowed are hugepages=2M, hugepages=1G, backing=anonymous and backing=memfd"
    )]
    Option(String),
}

/// `SIZE[,hugepages=2M|1G][,backing=anonymous|memfd]`
impl FromStr for MemoryConfig {
    type Err = ParseMemoryError;

    fn from_str(text: &str) -> Result<Self, ParseMemoryError> {
        let mut parts = text.split(',');
        let size = parts.next().unwrap_or_default().parse()?;
        let mut memory = Self { size, ..Self::default() };
        for part in parts {
            match part {
                "hugepages=2M" => memory.hugepages = Some(HugePages::Size2M),
                "hugepages=1G" => memory.hugepages = Some(HugePages::Size1G),
                "backing=anonymous" => memory.backing = Backing::Anonymous,
                "backing=memfd" => memory.backing = Backing::Memfd,
                other => return Err(ParseMemoryError::Option(other.to_string())),
            }
        }
        Ok(memory)
    }
}

impl<'de> Deserialize<'de> for MemoryConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            #[serde(default = "default_size")]
            size: Size,
            #[serde(default)]
            backing: Backing,
            hugepages: Option<HugePages>,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = MemoryConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("memory as in \"1G,hugepages=2M\", or an object with size, backing and hugepages")
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<MemoryConfig, E> {
                v.parse().map_err(E::custom)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<MemoryConfig, A::Error> {
                let Fields { size, backing, hugepages } =
                    Fields::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(MemoryConfig { size, backing, hugepages })
            }
        }
        d.deserialize_any(Visitor)
    }
}

fn default_size() -> Size {
    DEFAULT_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<(), ConfigError> {
        text.parse::<MemoryConfig>().unwrap().validate()
    }

    #[test]
    fn sizes_have_bounds() {
        assert!(matches!(check("0"), Err(ConfigError::MemoryTooSmall(_))));
        assert!(matches!(check("1M"), Err(ConfigError::MemoryTooSmall(_))));
        assert!(matches!(check("5T"), Err(ConfigError::MemoryTooLarge(_))));
        assert!(matches!(check("16777217"), Err(ConfigError::MemoryUnaligned(..))));
        assert!(matches!(check("3M,hugepages=2M"), Err(ConfigError::MemoryUnaligned(..))));
        for good in ["2M", "128M", "3G", "3584M", "4G", "1G,hugepages=1G"] {
            check(good).unwrap();
        }
    }

    #[test]
    fn json_takes_the_flags_text() {
        let json: MemoryConfig = serde_json::from_str("\"1G,backing=memfd\"").unwrap();
        assert_eq!(json, "1G,backing=memfd".parse().unwrap());
        let error = serde_json::from_str::<MemoryConfig>("7").unwrap_err().to_string();
        assert!(error.contains("1G,hugepages=2M"), "{error}");
    }

    #[test]
    fn an_unknown_option_is_named() {
        let error = "1G,shared".parse::<MemoryConfig>().unwrap_err();
        assert!(error.to_string().contains("\"shared\""));
    }
}
