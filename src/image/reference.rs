//! Names of images, as Docker writes them: `alpine` is `docker.io/library/alpine:latest`.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::digest::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
/// What official images are under, at Docker Hub.
const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A whole name: `REGISTRY/REPOSITORY[:TAG][@DIGEST]`. One without a digest has a tag.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// Host and port.
    pub registry: String,
    /// The path at the registry.
    pub repository: String,
    /// The tag.
    pub tag: Option<String>,
    /// The digest of the manifest.
    pub digest: Option<Digest>,
}

/// A name that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is not an image's name: {reason}")]
pub struct ParseReferenceError {
    text: String,
    reason: &'static str,
}

impl Reference {
    /// `REGISTRY/REPOSITORY`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// What tells the image: the digest alone where there is one, as a tag beside it says nothing more.
    #[must_use]
    pub fn pinned(&self) -> Self {
        let tag = self.tag.clone().filter(|_| self.digest.is_none());
        Self { tag, ..self.clone() }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        self.tag.iter().try_for_each(|tag| write!(f, ":{tag}"))?;
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, ParseReferenceError> {
        let bad = |reason| ParseReferenceError { text: text.chars().take(100).collect(), reason };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|_| bad("after @ stands sha256: and 64 digits"))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon before a slash is a port's.
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if !tag.is_none_or(is_tag) {
            return Err(bad("a tag is letters, digits, _, . and -, at most 128"));
        }
        let (registry, repository) = match path.split_once('/') {
            Some((host, path)) if looks_like_host(host) => (host, path),
            _ => (DEFAULT_REGISTRY, path),
        };
        if !is_host(registry) {
            return Err(bad("in front of the first slash stands HOST or HOST:PORT"));
        }
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let official = registry == DEFAULT_REGISTRY && !repository.contains('/');
        let repository = format!("{}{repository}", if official { OFFICIAL } else { "" });
        if !repository.split('/').all(is_component) {
            return Err(bad("a repository is lower-case letters and digits with . _ - between them"));
        }
        if registry.len() + repository.len() > MAX_NAME {
            return Err(bad("it is longer than 255 characters"));
        }
        let tag = tag.or(if digest.is_none() { Some(DEFAULT_TAG) } else { None });
        Ok(Self { registry: registry.into(), repository, tag: tag.map(String::from), digest })
    }
}

/// Docker's rule: what is in front of the first slash is a host if it has a dot or a port, or is localhost.
fn looks_like_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost"
}

/// A name, an address or an IPv6 address in brackets, with or without a port.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let letter = |b: u8| b.is_ascii_alphanumeric();
    let is_label = |label: &str| {
        let (first, last) = (label.bytes().next(), label.bytes().last());
        first.is_some_and(letter) && last.is_some_and(letter) && label.bytes().all(|b| letter(b) || b == b'-')
    };
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_known = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(is_label),
    };
    is_known && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

fn is_tag(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=MAX_TAG).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with(['.', '-'])
}

/// `[a-z0-9]+` with `.`, `_`, `__` or dashes in between.
fn is_component(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let known = |s: &str| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    text.bytes().next().is_some_and(letter)
        && text.bytes().last().is_some_and(letter)
        && separators.into_iter().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed_as_docker_does() {
        let digest = Digest::of(b"");
        for (short, whole) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20"),
            ("user/app", "docker.io/user/app:latest"),
            ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:1", "localhost:5000/app:1"),
            ("[::1]:5000/a/b", "[::1]:5000/a/b:latest"),
            ("ghcr.io/a/b-c__d.e:V1.2-x", "ghcr.io/a/b-c__d.e:V1.2-x"),
            (&format!("alpine@{digest}"), &format!("docker.io/library/alpine@{digest}")),
            (&format!("alpine:1@{digest}"), &format!("docker.io/library/alpine:1@{digest}")),
        ] {
            let parsed: Reference = short.parse().unwrap();
            assert_eq!(parsed.to_string(), whole);
            assert_eq!(whole.parse::<Reference>().unwrap(), parsed);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in [
            "",
            ":x",
            "Alpine",
            "a//b",
            "a/",
            "-a",
            "a-",
            "a:",
            "a:-x",
            "a b",
            "a@sha256:0",
            "a@md5:00",
            "../a",
            "a/../b",
            "é",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        assert!("a".repeat(256).parse::<Reference>().is_err());
        assert!(format!("a:{}", "x".repeat(129)).parse::<Reference>().is_err());
    }
}
