//! Logs in as a registry's challenge says: `Basic`, or a token from elsewhere (`Bearer`; distribution's spec/auth).

use std::io::Read;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http_auth::{ChallengeRef, parse_challenges};
use microvm::image::MAX_JSON;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use ureq::Body;
use ureq::http::header::WWW_AUTHENTICATE;
use ureq::http::{HeaderValue, Response, StatusCode, Uri};

use super::credentials::{Found, Secret};
use super::error::PullError;
use super::http::{Http, Request, host};

/// Who asks, and with what.
pub struct Login<'a> {
    pub http: &'a Http,
    /// The repository, for reading.
    pub repository: &'a str,
    pub credentials: Option<&'a Found>,
}

/// A token server's answer.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Login<'_> {
    /// The value of `Authorization` that answers a refusal (401).
    pub fn answer(&self, uri: &Uri, refusal: &Response<Body>) -> Result<HeaderValue, PullError> {
        let all = refusal.headers().get_all(WWW_AUTHENTICATE);
        let all: Vec<&str> = all.iter().filter_map(|value| value.to_str().ok()).collect();
        let parsed: Vec<_> = all.iter().filter_map(|text| parse_challenges(text).ok()).flatten().collect();
        let find =
            |scheme: &str| parsed.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        if let Some(challenge) = find("bearer") {
            return self.bearer(uri, challenge);
        }
        if find("basic").is_some() {
            return match self.credentials.map(|found| &found.secret) {
                Some(Secret::Password { .. }) => self.basic(uri),
                _ => Err(PullError::Login { host: host(uri) }),
            };
        }
        let challenge = all.join(", ").chars().take(200).collect();
        Err(PullError::Challenge { host: host(uri), challenge })
    }

    fn basic(&self, uri: &Uri) -> Result<HeaderValue, PullError> {
        let login = PullError::Login { host: host(uri) };
        let Some(Secret::Password { user, password }) = self.credentials.map(|found| &found.secret) else {
            return Err(login);
        };
        let value = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
        secret(&value).ok_or(login)
    }

    fn bearer(&self, uri: &Uri, challenge: &ChallengeRef) -> Result<HeaderValue, PullError> {
        let param = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        if let Some(Secret::Registry(token)) = self.credentials.map(|found| &found.secret) {
            return self.as_bearer(uri, token);
        }
        let bad = || PullError::Challenge { host: host(uri), challenge: "a token of nowhere".into() };
        let realm: Uri = param("realm").and_then(|realm| realm.parse().ok()).ok_or_else(bad)?;
        // Neither a password nor a token goes unencrypted where the registry itself is not.
        if uri.scheme_str() == Some("https") && realm.scheme_str() != Some("https") || realm.host().is_none()
        {
            return Err(bad());
        }
        let scope = param("scope").unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let mut query = format!("scope={}", encoded(&scope));
        if let Some(service) = param("service") {
            query += &format!("&service={}", encoded(&service));
        }
        let response = self.http.ask(self.token_request(&realm, query)?)?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(self.refused(uri));
            }
            status => return Err(PullError::Status { host: host(&realm), status: status.as_u16() }),
        }
        let mut text = String::new();
        let mut body = response.into_body().into_reader().take(MAX_JSON);
        let read = body.read_to_string(&mut text);
        read.map_err(|e| PullError::Unreachable { host: host(&realm), reason: e.to_string() })?;
        let token: Token =
            serde_json::from_str(&text).map_err(|source| PullError::Json { name: "the token", source })?;
        self.as_bearer(uri, &token.token.or(token.access_token).unwrap_or_default())
    }

    fn token_request(&self, realm: &Uri, query: String) -> Result<Request, PullError> {
        if let Some(Secret::Identity(token)) = self.credentials.map(|found| &found.secret) {
            let token = encoded(token);
            let form = format!("grant_type=refresh_token&client_id=microvm&refresh_token={token}&{query}");
            return Ok(Request { uri: realm.clone(), form: Some(form), ..Request::default() });
        }
        let authorization = self.credentials.map(|_| self.basic(realm)).transpose()?;
        let joint = if realm.query().is_some() { '&' } else { '?' };
        let uri = format!("{realm}{joint}{query}").parse();
        let uri =
            uri.map_err(|_| PullError::Challenge { host: host(realm), challenge: realm.to_string() })?;
        Ok(Request { uri, authorization, ..Request::default() })
    }

    fn as_bearer(&self, uri: &Uri, token: &str) -> Result<HeaderValue, PullError> {
        let value = Some(token).filter(|token| !token.is_empty());
        value.and_then(|token| secret(&format!("Bearer {token}"))).ok_or_else(|| self.refused(uri))
    }

    /// The error where a login does not help.
    pub fn refused(&self, uri: &Uri) -> PullError {
        let host = host(uri);
        match self.credentials {
            Some(found) => PullError::Credentials { host, path: found.path.clone() },
            None => PullError::Login { host },
        }
    }
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// A header's value that no log shows.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
