//! One repository at a registry (OCI distribution specification, v1.1; Docker's registry API v2).

use std::io::Read;
use std::net::IpAddr;
use std::sync::Mutex;

use microvm::image::{Descriptor, Digest, MAX_JSON, PullOptions, Reference};
use ureq::http::header::{ACCEPT, CONTENT_RANGE, HeaderMap, RANGE};
use ureq::http::{HeaderValue, Response, StatusCode, Uri};
use ureq::{Body, Error, ResponseExt};

use super::auth::Login;
use super::credentials;
use super::error::PullError;
use super::http::{Http, Request, host, is_same_origin};

/// The kinds of manifests that are understood.
const MANIFESTS: HeaderValue = HeaderValue::from_static(
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json",
);

/// A repository.
pub struct Registry {
    http: Http,
    /// `https://HOST`.
    base: String,
    reference: Reference,
    /// What it has asked for, once it has asked.
    login: Mutex<Option<HeaderValue>>,
}

/// A part of a blob, from the byte that was asked for, or the whole.
pub struct Piece {
    /// Where it starts.
    pub start: u64,
    pub body: Box<dyn Read>,
}

impl Registry {
    /// Finds out how the registry is spoken to.
    pub fn connect(reference: &Reference, options: &PullOptions) -> Result<Self, PullError> {
        // The registry of Docker Hub has a name of its own.
        let host =
            if reference.registry == "docker.io" { "registry-1.docker.io" } else { &reference.registry };
        let local = is_local(host);
        let http = Http::new(options.timeout, local);
        let plain = options.plain_http || local && speaks_plainly(&http, host)?;
        let base = format!("{}://{host}", if plain { "http" } else { "https" });
        Ok(Self { http, base, reference: reference.clone(), login: Mutex::new(None) })
    }

    /// A manifest or a list of them, by tag or digest. A digest is checked.
    pub fn manifest(&self, name: &str) -> Result<Vec<u8>, PullError> {
        let headers = HeaderMap::from_iter([(ACCEPT, MANIFESTS)]);
        let response = self.get(&format!("manifests/{name}"), &headers)?;
        let uri = response.get_uri().clone();
        let told = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let wanted = name.parse().ok().or_else(|| told.and_then(|text| text.parse::<Digest>().ok()));
        let what = || format!("the manifest {name}");
        let bytes = match response.status() {
            StatusCode::OK => read(&uri, response, what(), MAX_JSON)?,
            StatusCode::NOT_FOUND => {
                let what = if name.contains(':') { "digest" } else { "image or tag" };
                return Err(PullError::NotFound { host: host(&uri), what });
            }
            status => return Err(PullError::Status { host: host(&uri), status: status.as_u16() }),
        };
        match wanted {
            Some(wanted) => check(what(), &wanted, bytes),
            None => Ok(bytes),
        }
    }

    /// A small blob, whose digest is checked.
    pub fn small(&self, descriptor: &Descriptor) -> Result<Vec<u8>, PullError> {
        let name = descriptor.digest.to_string();
        if descriptor.size > MAX_JSON {
            return Err(PullError::TooLarge { name, limit: MAX_JSON });
        }
        let mut bytes = Vec::new();
        // One more byte tells that there are more.
        let piece = self.piece(descriptor, 0)?;
        let read = piece.body.take(descriptor.size + 1).read_to_end(&mut bytes);
        read.map_err(|e| PullError::Unreachable { host: host(&self.uri()), reason: e.to_string() })?;
        sized(descriptor, check(name, &descriptor.digest, bytes)?)
    }

    /// A blob from a byte on, if the registry can start there. `start` beyond its end gives nothing.
    pub fn piece(&self, descriptor: &Descriptor, start: u64) -> Result<Piece, PullError> {
        let range = HeaderValue::from_str(&format!("bytes={start}-")).ok().filter(|_| start > 0);
        let headers = range.map(|range| (RANGE, range)).into_iter().collect();
        let response = self.get(&format!("blobs/{}", descriptor.digest), &headers)?;
        let uri = response.get_uri().clone();
        let start = match response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if starts_at(&response, start) => start,
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Ok(Piece { start, body: Box::new(std::io::empty()) });
            }
            StatusCode::NOT_FOUND => return Err(PullError::NotFound { host: host(&uri), what: "layer" }),
            status => return Err(PullError::Status { host: host(&uri), status: status.as_u16() }),
        };
        Ok(Piece { start, body: Box::new(response.into_body().into_reader()) })
    }

    /// Who is asked.
    pub fn uri(&self) -> Uri {
        self.base.parse().unwrap_or_default()
    }

    fn get(&self, path: &str, headers: &HeaderMap) -> Result<Response<Body>, PullError> {
        let uri: Uri =
            format!("{}/v2/{}/{path}", self.base, self.reference.repository).parse().map_err(|_| {
                PullError::Unreachable { host: self.base.clone(), reason: "no such address".into() }
            })?;
        for _ in 0..3 {
            let authorization = self.login.lock().map_or(None, |login| login.clone());
            let request = Request {
                uri: uri.clone(),
                authorization: authorization.clone(),
                headers: headers.clone(),
                form: None,
            };
            let response = self.http.ask(request)?;
            let refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            // Where the registry has sent us has no claim to its credentials.
            if !refused || !is_same_origin(&uri, response.get_uri()) {
                return Ok(response);
            }
            self.log_in(&uri, &response, authorization)?;
        }
        Err(self.denied(&uri)?)
    }

    /// Answers a challenge, unless another thread has done so meanwhile.
    fn log_in(
        &self,
        uri: &Uri,
        refusal: &Response<Body>,
        before: Option<HeaderValue>,
    ) -> Result<(), PullError> {
        if refusal.status() == StatusCode::FORBIDDEN {
            return Err(self.denied(uri)?);
        }
        let credentials = credentials::find(&self.reference)?;
        let Ok(mut login) = self.login.lock() else { return Err(PullError::Stopped) };
        if *login == before {
            let repository = &self.reference.repository;
            let asking = Login { http: &self.http, repository, credentials: credentials.as_ref() };
            let answer = asking.answer(uri, refusal)?;
            // The same again is of no use, as a password is.
            if Some(&answer) == before.as_ref() {
                return Err(asking.refused(uri));
            }
            *login = Some(answer);
        }
        Ok(())
    }

    fn denied(&self, uri: &Uri) -> Result<PullError, PullError> {
        let credentials = credentials::find(&self.reference)?;
        let repository = &self.reference.repository;
        Ok(Login { http: &self.http, repository, credentials: credentials.as_ref() }.refused(uri))
    }
}

/// Whether a host is this machine itself, whose network nobody listens to.
fn is_local(host: &str) -> bool {
    let name = host.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map_or(host, |(name, _)| name);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Whether a registry of this machine speaks HTTP without TLS: one with TLS answers such a request with 400, or with what
/// is no HTTP.
fn speaks_plainly(http: &Http, host: &str) -> Result<bool, PullError> {
    let uri: Uri = format!("http://{host}/v2/")
        .parse()
        .map_err(|_| PullError::Unreachable { host: host.into(), reason: "no such address".into() })?;
    match http.once(&Request { uri: uri.clone(), ..Request::default() }) {
        Ok(response) => Ok(response.status() != StatusCode::BAD_REQUEST),
        Err(Error::Protocol(_) | Error::Http(_)) => Ok(false),
        Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(false),
        Err(error) => Err(http.unreachable(&uri, &error)),
    }
}

/// Whether a part of a blob is the part that was asked for: `bytes START-END/SIZE`.
fn starts_at(response: &Response<Body>, start: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let told = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
    told == Some(start)
}

fn read(uri: &Uri, response: Response<Body>, name: String, limit: u64) -> Result<Vec<u8>, PullError> {
    let mut bytes = Vec::new();
    let read = response.into_body().into_reader().take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|e| PullError::Unreachable { host: host(uri), reason: e.to_string() })?;
    if bytes.len() as u64 > limit {
        return Err(PullError::TooLarge { name, limit });
    }
    Ok(bytes)
}

fn check(name: String, wanted: &Digest, bytes: Vec<u8>) -> Result<Vec<u8>, PullError> {
    match Digest::of(&bytes) {
        found if found == *wanted => Ok(bytes),
        found => Err(PullError::Digest { name, found }),
    }
}

/// Checks the length that a descriptor gives.
pub fn sized(descriptor: &Descriptor, bytes: Vec<u8>) -> Result<Vec<u8>, PullError> {
    if bytes.len() as u64 == descriptor.size {
        return Ok(bytes);
    }
    let found = bytes.len().to_string();
    Err(PullError::Size { name: descriptor.digest.to_string(), size: descriptor.size, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_told_from_others() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:80", "127.8.9.10", "[::1]", "[::1]:5000"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["localhost.example.com", "128.0.0.1", "127.0.0.1.example.com", "[::2]:5000", "10.0.0.1"]
        {
            assert!(!is_local(host), "{host}");
        }
    }
}
