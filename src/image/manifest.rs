//! The JSON of OCI and Docker images: what of it is used.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::digest::Digest;

/// The name a descriptor gives its image, as Docker and containerd write it.
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The same by OCI, where it is often a tag alone.
pub const OCI_NAME: &str = "org.opencontainers.image.ref.name";

/// Media types that are written; others are read, too.
pub mod media_type {
    /// A list of manifests.
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// One image.
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// Its configuration.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// A layer.
    pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
}

/// What this machine runs.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The same as images name it.
#[must_use]
pub fn machine() -> String {
    format!("linux/{}", architecture())
}

/// Something in a store, by digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// What it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Notes, as its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Whether it is a list of manifests.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            media_type::INDEX | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }

    /// How well this machine runs it, as far as the descriptor tells: the least is the best. `None`: not at all.
    #[must_use]
    pub fn rank(&self) -> Option<u8> {
        // One that does not tell comes after those that do.
        self.platform.as_ref().map_or(Some(u8::MAX), Platform::rank)
    }
}

/// What an image runs on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// As Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Which processors of the architecture: `v3`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
    /// The rest.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl Platform {
    /// As [`Descriptor::rank`]. What runs on every processor of the architecture is the best: it also runs in a guest whose
    /// processor is told to be a lesser one than the host's.
    fn rank(&self) -> Option<u8> {
        if self.os != "linux" || self.architecture != architecture() {
            return None;
        }
        variants().iter().position(|variant| *variant == self.variant).map(|place| place as u8)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

/// The variants of its architecture that this machine runs.
#[cfg(target_arch = "x86_64")]
fn variants() -> &'static [&'static str] {
    // The levels of the x86-64 psABI, by what is asked for most.
    let v2 = is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("popcnt");
    let v3 = v2 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2");
    let v3 = v3 && is_x86_feature_detected!("fma") && is_x86_feature_detected!("movbe");
    let v4 = v3 && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
    const ALL: &[&str] = &["", "v1", "v2", "v3", "v4"];
    &ALL[..2 + usize::from(v2) + usize::from(v3) + usize::from(v4)]
}

/// The variants of its architecture that this machine runs.
#[cfg(not(target_arch = "x86_64"))]
fn variants() -> &'static [&'static str] {
    &["", "v8"]
}

/// A list of manifests.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2.
    pub schema_version: u32,
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// The manifests, or further lists.
    #[serde(deserialize_with = "or_empty")]
    pub manifests: Vec<Descriptor>,
}

/// An image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, lowest first.
    #[serde(deserialize_with = "or_empty")]
    pub layers: Vec<Descriptor>,
}

/// What is to run, and on what.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// As Go names it.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// When, as RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// How it is run: Env, Entrypoint, Cmd, User, WorkingDir and so on.
    #[serde(default)]
    pub config: Option<RunConfig>,
    /// The layers.
    pub rootfs: RootFs,
}

/// How an image is run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// `USER[:GROUP]`, by name or number.
    pub user: Option<String>,
    /// `NAME=VALUE`.
    pub env: Option<Vec<String>>,
    /// What comes before the command.
    pub entrypoint: Option<Vec<String>>,
    /// The command where the user gives none.
    pub cmd: Option<Vec<String>>,
    /// The working folder.
    pub working_dir: Option<String>,
    /// The signal that asks it to end.
    pub stop_signal: Option<String>,
    /// `PORT/PROTOCOL`.
    pub exposed_ports: Option<BTreeMap<String, Value>>,
    /// Folders that are volumes.
    pub volumes: Option<BTreeMap<String, Value>>,
    /// Notes.
    pub labels: Option<BTreeMap<String, String>>,
}

/// The layers by the digests of their plain archives.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Lowest first.
    #[serde(default, deserialize_with = "or_empty")]
    pub diff_ids: Vec<Digest>,
}

/// Go writes an empty list as `null`.
fn or_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// One image of a `manifest.json`, as `docker save` writes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DockerImage {
    /// The path of its configuration in the archive.
    pub config: String,
    /// Its names.
    #[serde(default)]
    pub repo_tags: Option<Vec<String>>,
    /// The paths of its layers in the archive, lowest first.
    pub layers: Vec<String>,
}
