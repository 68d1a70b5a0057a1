//! What `docker login` and `podman login` have left: user names and passwords, by registry.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use microvm::image::Reference;
use serde::Deserialize;

use super::error::PullError;

/// What Docker calls Docker Hub.
const HUB: &str = "https://index.docker.io/v1/";

/// What a user may prove to be somebody with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Secret {
    /// A user and a password.
    Password { user: String, password: String },
    /// What a token is got with.
    Identity(String),
    /// A token.
    Registry(String),
}

/// A secret and the file it is from.
#[derive(Debug)]
pub struct Found {
    pub path: PathBuf,
    pub secret: Secret,
}

/// Docker's `config.json`, and podman's `auth.json`, which is the same.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// What a program that keeps credentials answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The credentials for an image's registry.
///
/// # Errors
/// A file that is there cannot be used.
pub fn find(reference: &Reference) -> Result<Option<Found>, PullError> {
    for path in files() {
        let bad = |reason: String| PullError::Config { path: path.clone(), reason };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            Err(e) => return Err(bad(e.to_string())),
        };
        let config: Config = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if let Some(secret) = config.secret(reference).map_err(bad)? {
            return Ok(Some(Found { path, secret }));
        }
    }
    Ok(None)
}

/// Docker's first, as it is the one that is named in docs and errors.
fn files() -> Vec<PathBuf> {
    let folder = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let docker = folder("DOCKER_CONFIG").or_else(|| Some(folder("HOME")?.join(".docker")));
    let podman = folder("REGISTRY_AUTH_FILE")
        .or_else(|| Some(folder("XDG_RUNTIME_DIR")?.join("containers/auth.json")));
    docker.map(|folder| folder.join("config.json")).into_iter().chain(podman).collect()
}

impl Config {
    fn secret(&self, reference: &Reference) -> Result<Option<Secret>, String> {
        let helper = self.cred_helpers.iter().find(|(key, _)| bare(key) == reference.registry);
        if let Some(name) = helper.map(|(_, name)| name).or(self.creds_store.as_ref())
            && let Some(secret) = ask(name, &reference.registry)?
        {
            return Ok(Some(secret));
        }
        // The entry of the repository, of what it is in, and so on to the registry.
        let mut wanted = reference.name();
        loop {
            let found = self.auths.iter().find(|(key, _)| bare(key) == wanted);
            if let Some(secret) = found.map(|(_, entry)| entry.secret()).transpose()?.flatten() {
                return Ok(Some(secret));
            }
            match wanted.rfind('/') {
                Some(slash) => wanted.truncate(slash),
                None => return Ok(None),
            }
        }
    }
}

/// A key as a registry's name: older Docker writes URLs.
fn bare(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    if matches!(key, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { key }
}

impl Entry {
    /// `None`: a program keeps it.
    fn secret(&self) -> Result<Option<Secret>, String> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&self.registrytoken) {
            return Ok(Some(Secret::Registry(token)));
        }
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Some(Secret::Identity(token)));
        }
        let Some(auth) = filled(&self.auth) else {
            let pair = filled(&self.username).zip(self.password.clone());
            return Ok(pair.map(|(user, password)| Secret::Password { user, password }));
        };
        let decoded =
            BASE64_STANDARD.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
        let (user, password) = pair.ok_or("an entry's auth is not USER:PASSWORD in base64")?;
        Ok(Some(Secret::Password { user: user.into(), password: password.into() }))
    }
}

/// Asks `docker-credential-NAME`. `None`: it has nothing for this registry.
fn ask(name: &str, registry: &str) -> Result<Option<Secret>, String> {
    let program = format!("docker-credential-{name}");
    if Path::new(&program).components().count() != 1 {
        return Err(format!("{name:?} is no name of a program that keeps credentials"));
    }
    let server = if registry == "docker.io" { HUB } else { registry };
    let run = || -> io::Result<_> {
        let mut command = Command::new(&program);
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        if let Some(mut input) = child.stdin.take() {
            // One that does not read it says why on its output.
            let _ = writeln!(input, "{server}");
        }
        child.wait_with_output()
    };
    let output = run().map_err(|e| format!("{program}: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stdout).trim().to_string();
        // What they all say, and what Docker looks for.
        return if said.contains("credentials not found") {
            Ok(None)
        } else {
            Err(format!("{program}: {said}"))
        };
    }
    let answer: Answer = serde_json::from_slice(&output.stdout).map_err(|e| format!("{program}: {e}"))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Secret::Identity(answer.secret),
        _ => Secret::Password { user: answer.username, password: answer.secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(config: &str, image: &str) -> Option<Secret> {
        let config: Config = serde_json::from_str(config).unwrap();
        config.secret(&image.parse().unwrap()).unwrap()
    }

    fn password(user: &str, password: &str) -> Option<Secret> {
        Some(Secret::Password { user: user.into(), password: password.into() })
    }

    #[test]
    fn keys_are_of_any_age() {
        // "u:p:q"
        for key in ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "https://docker.io"] {
            let config = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpwOnE="}}}}}}"#);
            assert_eq!(secret(&config, "alpine"), password("u", "p:q"), "{key}");
            assert_eq!(secret(&config, "example.com/alpine"), None, "{key}");
        }
        let config = r#"{"auths":{"http://localhost:5000/v2/":{"username":"u","password":"p"}}}"#;
        assert_eq!(secret(config, "localhost:5000/a/b"), password("u", "p"));
        assert_eq!(secret(config, "localhost:5001/a/b"), None);
    }

    #[test]
    fn the_nearest_entry_counts() {
        let config = r#"{"auths":{"example.com":{"auth":"dTpw"},"example.com/a":{"auth":"YTpi"},"x":{}}}"#;
        assert_eq!(secret(config, "example.com/a/b"), password("a", "b"));
        assert_eq!(secret(config, "example.com/ab"), password("u", "p"));
    }

    #[test]
    fn tokens_are_told_apart() {
        let config = r#"{"auths":{"a.b":{"auth":"dTpw","identitytoken":"t"},"c.d":{"registrytoken":"r"}}}"#;
        assert_eq!(secret(config, "a.b/x"), Some(Secret::Identity("t".into())));
        assert_eq!(secret(config, "c.d/x"), Some(Secret::Registry("r".into())));
        let config: Config = serde_json::from_str(r#"{"auths":{"a.b":{"auth":"?"}}}"#).unwrap();
        assert!(config.secret(&"a.b/x".parse().unwrap()).is_err());
    }
}
