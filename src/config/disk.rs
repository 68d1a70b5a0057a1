//! A disk: the raw file or block device behind it, and how it is read and written.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;

use super::ConfigError;
use super::size::{ParseSizeError, Size};

/// The longest name of a disk: what `VIRTIO_BLK_T_GET_ID` has room for (virtio 1.3 §5.2.6).
pub const MAX_DISK_ID: usize = 20;

/// The most files of one disk: as many as a guest's Linux makes partitions of it (`DISK_MAX_PARTS`, without the whole).
pub const MAX_PIECES: usize = 255;

/// A disk. In JSON also the text that `--disk` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskConfig {
    /// A raw image or a block device. Its format is never guessed.
    pub path: PathBuf,
    /// Files that the disk goes on with behind that one, as if all of them were one. The guest may not write then.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<PathBuf>,
    /// The guest may not write.
    pub readonly: bool,
    /// Its name: in the guest the serial number, on the host in logs and counters. By default `disk` and its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Go round the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// What reads and writes it; by default io_uring where the host lets us, else threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<DiskEngine>,
    /// The most requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// The most bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,
}

/// What reads and writes a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskEngine {
    /// io_uring.
    Uring,
    /// A pool of threads.
    Threads,
}

impl DiskConfig {
    /// A disk with the default of everything but its path.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        let (id, engine, iops, bandwidth) = (None, None, None, None);
        Self { path, more: Vec::new(), readonly: false, id, direct: false, engine, iops, bandwidth }
    }

    /// `PATH[,readonly][,id=ID][,direct][,engine=uring|threads][,iops=N][,bandwidth=SIZE]`
    ///
    /// # Errors
    /// The first option that is none.
    pub fn parse(text: &OsStr) -> Result<Self, ParseDiskError> {
        let mut parts = text.as_bytes().split(|b| *b == b',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(ParseDiskError::NoPath);
        }
        let mut disk = Self::new(OsStr::from_bytes(path).into());
        for part in parts {
            disk.set(&String::from_utf8_lossy(part))?;
        }
        Ok(disk)
    }

    fn set(&mut self, option: &str) -> Result<(), ParseDiskError> {
        match option.split_once('=') {
            None if option == "readonly" => self.readonly = true,
            None if option == "direct" => self.direct = true,
            Some(("id", id)) => self.id = Some(id.into()),
            Some(("engine", "uring")) => self.engine = Some(DiskEngine::Uring),
            Some(("engine", "threads")) => self.engine = Some(DiskEngine::Threads),
            Some(("engine", other)) => return Err(ParseDiskError::Engine(other.into())),
            Some(("iops", number)) => self.iops = Some(parse_number(number)?),
            Some(("bandwidth", size)) => self.bandwidth = Some(size.parse()?),
            _ => return Err(ParseDiskError::Option(option.into())),
        }
        Ok(())
    }

    /// Its name, as the disk at `place`.
    #[must_use]
    pub fn name(&self, place: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{place}"))
    }

    /// Its files, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.path).chain(&self.more)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if self.pieces().any(|path| path.as_os_str().is_empty()) {
            return Err(ConfigError::EmptyPath("--disk (disks.path and disks.more in a --config)"));
        }
        match 1 + self.more.len() {
            2.. if !self.readonly => return Err(ConfigError::DiskPiecesWritable(self.path.clone())),
            pieces if pieces > MAX_PIECES => {
                return Err(ConfigError::DiskPieces { path: self.path.clone(), pieces });
            }
            _ => {}
        }
        if let Some(id) = &self.id {
            let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            if id.is_empty() || id.len() > MAX_DISK_ID || !id.bytes().all(good) {
                return Err(ConfigError::DiskId { path: self.path.clone(), id: id.clone() });
            }
        }
        let zero = |option| Err(ConfigError::DiskLimit { path: self.path.clone(), option });
        match (self.iops, self.bandwidth) {
            (Some(0), _) => zero("iops"),
            (_, Some(Size(0))) => zero("bandwidth"),
            _ => Ok(()),
        }
    }
}

/// Checks all disks, and that no two have one name.
pub(super) fn validate(disks: &[DiskConfig], root: bool) -> Result<(), ConfigError> {
    if root && disks.is_empty() {
        return Err(ConfigError::RootWithoutDisk);
    }
    let names: Vec<_> = disks.iter().enumerate().map(|(place, disk)| disk.name(place)).collect();
    for (place, disk) in disks.iter().enumerate() {
        disk.validate()?;
        if names[..place].contains(&names[place]) {
            return Err(ConfigError::DiskTwice { path: disk.path.clone(), id: names[place].clone() });
        }
    }
    Ok(())
}

fn parse_number(text: &str) -> Result<u64, ParseDiskError> {
    // Rust would take a sign.
    let number = text.parse().ok().filter(|_| !text.starts_with('+'));
    number.ok_or_else(|| ParseDiskError::Iops(text.into()))
}

/// A `--disk` value that cannot be read.
#[derive(Debug, Error)]
pub enum ParseDiskError {
    /// Nothing in front.
    #[error(
        "there is no path in front: write PATH[,OPTION…] (a path with a comma can be given in a --config)"
    )]
    NoPath,
    /// An option that is none.
    #[error(
        "unknown option {0:?}: allowed are readonly, id=ID, direct, engine=uring, engine=threads, iops=N and \
         bandwidth=SIZE (a path with a comma can be given in a --config)"
    )]
    Option(String),
    /// No such engine.
    #[error("engine={0}: allowed are engine=uring and engine=threads")]
    Engine(String),
    /// No number.
    #[error("iops={0}: allowed are whole numbers from 1, as in iops=1000")]
    Iops(String),
    /// No size.
    #[error("bandwidth: {0}")]
    Bandwidth(#[from] ParseSizeError),
}

impl<'de> Deserialize<'de> for DiskConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            path: PathBuf,
            #[serde(default)]
            more: Vec<PathBuf>,
            #[serde(default)]
            readonly: bool,
            id: Option<String>,
            #[serde(default)]
            direct: bool,
            engine: Option<DiskEngine>,
            iops: Option<u64>,
            bandwidth: Option<Size>,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = DiskConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a disk as in \"root.img,readonly\", or an object with path, more, readonly, id, direct, engine, iops and bandwidth")
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<DiskConfig, E> {
                DiskConfig::parse(OsStr::new(v)).map_err(|e| E::custom(format!("disk {v:?}: {e}")))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<DiskConfig, A::Error> {
                let f = Fields::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let Fields { path, more, readonly, id, direct, engine, iops, bandwidth } = f;
                Ok(DiskConfig { path, more, readonly, id, direct, engine, iops, bandwidth })
            }
        }
        d.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DiskConfig, ParseDiskError> {
        DiskConfig::parse(OsStr::new(text))
    }

    #[test]
    fn all_options() {
        let disk = parse("a.img,readonly,id=data,direct,engine=threads,iops=10,bandwidth=1M").unwrap();
        assert!(disk.readonly && disk.direct);
        assert_eq!((disk.id.as_deref(), disk.engine), (Some("data"), Some(DiskEngine::Threads)));
        assert_eq!((disk.iops, disk.bandwidth), (Some(10), Some(Size::mib(1))));
        let json = serde_json::to_string(&disk).unwrap();
        assert_eq!(serde_json::from_str::<DiskConfig>(&json).unwrap(), disk);
        assert_eq!(serde_json::from_str::<DiskConfig>("\"a.img\"").unwrap(), parse("a.img").unwrap());
    }

    #[test]
    fn what_is_no_option_is_named() {
        for (text, words) in [
            ("", "no path"),
            (",readonly", "no path"),
            ("a,ro", "\"ro\""),
            ("a,readonly=1", "\"readonly=1\""),
            ("a,", "\"\""),
            ("a,engine=aio", "engine=aio"),
            ("a,iops=+5", "iops=+5"),
            ("a,iops=-1", "iops=-1"),
            ("a,bandwidth=fast", "\"fast\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn names_are_short_and_differ() {
        let check = |texts: &[&str]| {
            let disks: Vec<_> = texts.iter().map(|t| parse(t).unwrap()).collect();
            validate(&disks, true)
        };
        check(&["a", "b,id=12345678901234567890"]).unwrap();
        assert!(matches!(check(&[]), Err(ConfigError::RootWithoutDisk)));
        assert!(matches!(check(&["a,id=123456789012345678901"]), Err(ConfigError::DiskId { .. })));
        assert!(matches!(check(&["a,id="]), Err(ConfigError::DiskId { .. })));
        assert!(matches!(check(&["a,iops=0"]), Err(ConfigError::DiskLimit { .. })));
        assert!(matches!(check(&["a,bandwidth=0"]), Err(ConfigError::DiskLimit { .. })));
        assert!(matches!(check(&["a,id=disk1", "b"]), Err(ConfigError::DiskTwice { .. })));
    }

    #[test]
    fn a_disk_of_several_files_is_read_only() {
        let check = |more: &[&str], readonly| {
            let text = serde_json::json!({ "path": "a", "more": more, "readonly": readonly }).to_string();
            let disk: DiskConfig = serde_json::from_str(&text).unwrap();
            let again = serde_json::to_string(&disk).unwrap();
            assert_eq!(serde_json::from_str::<DiskConfig>(&again).unwrap(), disk);
            disk.validate()
        };
        check(&[], false).unwrap();
        check(&["b", "c"], true).unwrap();
        check(&["b"; MAX_PIECES - 1], true).unwrap();
        assert!(matches!(check(&["b"], false), Err(ConfigError::DiskPiecesWritable(path)) if path == *"a"));
        assert!(matches!(check(&["b", ""], true), Err(ConfigError::EmptyPath(_))));
        assert!(matches!(check(&["b"; MAX_PIECES], true), Err(ConfigError::DiskPieces { pieces: 256, .. })));
    }
}
