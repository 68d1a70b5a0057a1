//! HTTP as registries need it: requests that are tried again, redirects, and who gets the login.

use std::io::ErrorKind;
use std::thread;
use std::time::{Duration, SystemTime};

use ureq::http::header::{HeaderMap, LOCATION, RETRY_AFTER};
use ureq::http::{HeaderValue, Response, StatusCode, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, Error};

use super::error::PullError;

/// How often a request is tried in all.
pub const TRIES: u32 = 4;
/// What is waited before the second try; twice that before the third, and so on.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest that a server may have us wait.
const MAX_WAIT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 5;

const USER_AGENT: &str = concat!("microvm/", env!("CARGO_PKG_VERSION"));

/// Makes requests.
pub struct Http {
    agent: Agent,
    timeout: Duration,
}

/// One thing that is asked for.
#[derive(Default)]
pub struct Request {
    /// What is asked for.
    pub uri: Uri,
    /// The value of `Authorization`, for the host of `uri` alone.
    pub authorization: Option<HeaderValue>,
    /// Further headers.
    pub headers: HeaderMap,
    /// A form to be posted.
    pub form: Option<String>,
}

/// Scheme, host and port: who gets a login.
fn origin(uri: &Uri) -> (Option<&str>, Option<&str>, u16) {
    let default = if uri.scheme_str() == Some("http") { 80 } else { 443 };
    (uri.scheme_str(), uri.host(), uri.port_u16().unwrap_or(default))
}

/// Whether what is for the one may be told the other.
pub fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    origin(one) == origin(other)
}

/// A host with its port, as errors name it.
pub fn host(uri: &Uri) -> String {
    uri.authority().map_or_else(String::new, |authority| {
        // What stands in front of @ may be a secret.
        authority.as_str().rsplit('@').next().unwrap_or_default().to_string()
    })
}

impl Http {
    /// `direct`: proxies that the environment names are for other machines than this.
    pub fn new(timeout: Duration, direct: bool) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .user_agent(USER_AGENT)
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout))
            .timeout_recv_response(Some(timeout))
            .timeout_per_read(Some(timeout))
            .timeout_per_write(Some(timeout))
            .max_idle_connections_per_host(4);
        let config = if direct { config.proxy(None) } else { config };
        Self { agent: config.build().into(), timeout }
    }

    /// Asks once.
    pub fn once(&self, request: &Request) -> Result<Response<Body>, Error> {
        let own = request.authorization.iter().map(|value| ("authorization", value));
        let all = request.headers.iter().map(|(name, value)| (name.as_str(), value)).chain(own);
        match &request.form {
            None => all.fold(self.agent.get(&request.uri), |r, (name, value)| r.header(name, value)).call(),
            Some(form) => {
                let post = self.agent.post(&request.uri).content_type("application/x-www-form-urlencoded");
                all.fold(post, |r, (name, value)| r.header(name, value)).send(form)
            }
        }
    }

    /// Asks until there is an answer that is neither a redirect nor a failure that may pass.
    pub fn ask(&self, mut request: Request) -> Result<Response<Body>, PullError> {
        let mut redirects = 0;
        let mut tries = 1;
        loop {
            let wait = match self.once(&request) {
                Ok(response) if response.status().is_redirection() => {
                    redirects += 1;
                    self.follow(&mut request, &response, redirects)?;
                    continue;
                }
                Ok(response) if may_pass(response.status()) => match wait(&response, tries) {
                    Some(wait) => wait,
                    None => return Err(gave_up(&request.uri, &response)),
                },
                Ok(response) => return Ok(response),
                Err(error) if tries == TRIES || !is_passing(&error) => {
                    return Err(self.unreachable(&request.uri, &error));
                }
                Err(_) => backoff(tries),
            };
            tries += 1;
            thread::sleep(wait);
        }
    }

    fn follow(
        &self,
        request: &mut Request,
        response: &Response<Body>,
        redirects: usize,
    ) -> Result<(), PullError> {
        let place =
            response.headers().get(LOCATION).and_then(|place| place.to_str().ok()).unwrap_or_default();
        let refused = |reason| PullError::Redirect {
            host: host(&request.uri),
            // The rest may be a signature.
            place: place.chars().take_while(|c| *c != '?').take(200).collect(),
            reason,
        };
        if redirects > MAX_REDIRECTS {
            return Err(refused("after too many other places"));
        }
        let target = resolve(&request.uri, place).ok_or_else(|| refused("which is no place"))?;
        if request.uri.scheme_str() == Some("https") && target.scheme_str() != Some("https") {
            return Err(refused("which is not encrypted"));
        }
        if !is_same_origin(&target, &request.uri) {
            request.authorization = None;
        }
        request.uri = target;
        Ok(())
    }

    /// What a failed request is to the user.
    pub fn unreachable(&self, uri: &Uri, error: &Error) -> PullError {
        let reason = match error {
            // What does not hold of the encryption is bad data to it.
            Error::Io(e) if e.kind() == ErrorKind::InvalidData => {
                format!("{e} (SSL_CERT_FILE names further authorities, --plain-http goes without encryption)")
            }
            Error::Io(e) => e.to_string(),
            Error::Timeout(_) => format!("no answer for {:?} (--timeout)", self.timeout),
            Error::HostNotFound => "there is no host of that name".into(),
            other => other.to_string(),
        };
        PullError::Unreachable { host: host(uri), reason }
    }
}

/// Whether the same request may have better luck at once. Where nobody listens or answers in time, or somebody else than
/// the certificate says, it has not.
fn is_passing(error: &Error) -> bool {
    match error {
        Error::Io(e) => !matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::InvalidData),
        error => matches!(error, Error::ConnectionFailed),
    }
}

fn may_pass(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502..=504)
}

/// What is waited before a try after the `tries`th.
pub fn backoff(tries: u32) -> Duration {
    FIRST_WAIT * 2u32.saturating_pow(tries.saturating_sub(1))
}

/// How long the server, or else our own patience, says to wait. `None`: too long.
fn wait(response: &Response<Body>, tries: u32) -> Option<Duration> {
    if tries == TRIES {
        return None;
    }
    match retry_after(response.headers()) {
        Some(wait) if wait > MAX_WAIT => None,
        Some(wait) => Some(wait.max(FIRST_WAIT)),
        None => Some(backoff(tries)),
    }
}

/// Seconds, or a date (RFC 9110, 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

fn gave_up(uri: &Uri, response: &Response<Body>) -> PullError {
    let status = response.status();
    if status != StatusCode::TOO_MANY_REQUESTS {
        return PullError::Status { host: host(uri), status: status.as_u16() };
    }
    let again = retry_after(response.headers());
    let again = again.map_or_else(String::new, |wait| format!(", and none for {} s", wait.as_secs()));
    PullError::TooMany { host: host(uri), again }
}

/// Where a `Location` leads from `base` (RFC 3986, 5.2, for what servers write).
fn resolve(base: &Uri, place: &str) -> Option<Uri> {
    let place = place.split('#').next()?;
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let whole = if place.starts_with("http://") || place.starts_with("https://") {
        place.to_string()
    } else if place.starts_with("//") {
        format!("{scheme}:{place}")
    } else if place.starts_with('/') {
        format!("{scheme}://{authority}{place}")
    } else if place.is_empty() || place.split(['/', '?']).next()?.contains(':') {
        return None;
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{place}")
    };
    whole.parse().ok().filter(|uri: &Uri| uri.host().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved() {
        let base: Uri = "https://a:5000/v2/x/blobs/y?z".parse().unwrap();
        for (place, whole) in [
            ("http://b/c?d#e", "http://b/c?d"),
            ("//b/c", "https://b/c"),
            ("/c?d", "https://a:5000/c?d"),
            ("c", "https://a:5000/v2/x/blobs/c"),
        ] {
            assert_eq!(resolve(&base, place).unwrap(), whole, "{place}");
        }
        for bad in ["", "ftp://b/c", "file:///etc/passwd", "https://", "http:// b/"] {
            assert_eq!(resolve(&base, bad), None, "{bad}");
        }
    }

    #[test]
    fn a_redirect_keeps_to_encryption_and_the_login_to_its_host() {
        let http = Http::new(Duration::from_secs(1), true);
        let follow = |place: &str| {
            let authorization = Some(HeaderValue::from_static("secret"));
            let uri = "https://a/v2/".parse().unwrap();
            let mut request = Request { uri, authorization, ..Request::default() };
            let response =
                Response::builder().header(LOCATION, place).body(Body::builder().data("")).unwrap();
            http.follow(&mut request, &response, 1).map(|()| request.authorization.is_some())
        };
        for (place, with_login) in [("/x", true), ("https://a:443/x", true), ("https://b/x", false)] {
            assert_eq!(follow(place).unwrap(), with_login, "{place}");
        }
        assert!(!follow("https://a:5000/x").unwrap());
        assert!(follow("http://a/x").unwrap_err().to_string().contains("not encrypted"));
    }

    #[test]
    fn an_origin_has_a_port() {
        let origin_of = |text: &str| {
            let uri: Uri = text.parse().unwrap();
            let (scheme, host, port) = origin(&uri);
            (scheme.unwrap().to_string(), host.unwrap().to_string(), port)
        };
        assert_eq!(origin_of("https://a/x"), origin_of("https://a:443/y"));
        assert_ne!(origin_of("https://a/x"), origin_of("http://a/x"));
        assert_ne!(origin_of("http://a:1/x"), origin_of("http://a:2/x"));
    }

    #[test]
    fn a_server_may_ask_for_time() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(of("soon"), None);
    }
}
