//! HTTP/1.1 as the control socket speaks it (RFC 9110, RFC 9112): bytes to a request, a response to bytes.
//!
//! Everything here is a pure function over bytes. What is not needed is refused by name rather than half understood:
//! chunked bodies, expectations, several or odd lengths.

/// The longest request line and headers together in bytes.
pub const MAX_HEAD: usize = 8 << 10;
/// The longest body in bytes.
pub const MAX_BODY: usize = 64 << 10;
/// The most headers of one request.
const MAX_HEADERS: usize = 64;

/// A whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// As it was written: methods are case-sensitive.
    pub method: String,
    /// The path, with the query behind it if there is one.
    pub path: String,
    /// The body; empty where there is none.
    pub body: Vec<u8>,
    /// The client would rather have JSON than text.
    pub wants_json: bool,
    /// The connection stays open after the response.
    pub keep_alive: bool,
}

/// What some bytes are.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a request.
    Partial {
        /// The client waits for `100 Continue` before it sends the body.
        expects_continue: bool,
    },
    /// A request, and how many bytes it took.
    Complete(Request, usize),
}

/// Why bytes are no request that is served. The connection is closed after that: where the next request would start
/// is not known.
#[derive(Debug, PartialEq, Eq)]
pub struct Reject {
    /// The HTTP status.
    pub status: u16,
    /// What is wrong, and what is allowed.
    pub message: String,
}

fn reject<T>(status: u16, message: impl Into<String>) -> Result<T, Reject> {
    Err(Reject { status, message: message.into() })
}

/// Reads one request from the start of `input`.
///
/// # Errors
/// The bytes are no HTTP, or a request that is not served.
pub fn parse(input: &[u8]) -> Result<Parsed, Reject> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let too_long = || reject(431, format!("the request line and headers are longer than {MAX_HEAD} bytes"));
    let head_len = match head.parse(input) {
        Ok(httparse::Status::Complete(len)) if len > MAX_HEAD => return too_long(),
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if input.len() >= MAX_HEAD => return too_long(),
        Ok(httparse::Status::Partial) => return Ok(Parsed::Partial { expects_continue: false }),
        Err(httparse::Error::TooManyHeaders) => {
            return reject(431, format!("more than {MAX_HEADERS} headers"));
        }
        Err(httparse::Error::Version) => return reject(505, "only HTTP/1.0 and HTTP/1.1 are spoken here"),
        Err(e) => return reject(400, format!("not an HTTP request: {e}")),
    };
    let head = Head { headers: head.headers, method: head.method, path: head.path, version: head.version };
    let body_len = head.body_len()?;
    let expects_continue = head.expects_continue()?;
    let request = head.request()?;
    match input[head_len..].get(..body_len) {
        None => Ok(Parsed::Partial { expects_continue }),
        Some(body) => Ok(Parsed::Complete(Request { body: body.to_vec(), ..request }, head_len + body_len)),
    }
}

/// The request line and the headers.
struct Head<'h, 'b> {
    headers: &'h [httparse::Header<'b>],
    method: Option<&'b str>,
    path: Option<&'b str>,
    version: Option<u8>,
}

impl Head<'_, '_> {
    /// The values of a header; its name has no case.
    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
    }

    /// Whether a list in a header has `word`.
    fn has(&self, name: &str, word: &str) -> bool {
        let words = self.values(name).flat_map(|v| v.split(|b| *b == b','));
        words.into_iter().any(|w| w.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
    }

    fn body_len(&self) -> Result<usize, Reject> {
        let mut lengths = self.values("content-length");
        let (first, second) = (lengths.next(), lengths.next());
        if self.values("transfer-encoding").next().is_some() {
            return match first {
                // Two ways to tell where the body ends: the oldest trick there is.
                Some(_) => reject(400, "both Content-Length and Transfer-Encoding"),
                None if self.has("transfer-encoding", "chunked") => {
                    reject(411, "chunked bodies are not read: send Content-Length")
                }
                None => reject(501, "no transfer coding is understood: send Content-Length"),
            };
        }
        let Some(text) = first else { return Ok(0) };
        if second.is_some() {
            return reject(400, "more than one Content-Length");
        }
        if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
            return reject(400, "Content-Length is not a number");
        }
        // All digits: what does not fit is only too large.
        let len = std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()).unwrap_or(usize::MAX);
        if len > MAX_BODY {
            return reject(413, format!("the body is longer than {MAX_BODY} bytes"));
        }
        Ok(len)
    }

    fn expects_continue(&self) -> Result<bool, Reject> {
        match self.values("expect").next() {
            None => Ok(false),
            Some(value) if value.eq_ignore_ascii_case(b"100-continue") => Ok(self.version == Some(1)),
            Some(_) => reject(417, "the only expectation that is met is 100-continue"),
        }
    }

    fn request(&self) -> Result<Request, Reject> {
        // RFC 9112, 3.2: exactly one Host in HTTP/1.1.
        let hosts = self.values("host").count();
        if hosts > 1 || (hosts == 0 && self.version == Some(1)) {
            return reject(400, format!("{hosts} Host headers: HTTP/1.1 asks for one"));
        }
        Ok(Request {
            method: self.method.unwrap_or_default().to_string(),
            path: origin_form(self.path.unwrap_or_default()).to_string(),
            body: Vec::new(),
            wants_json: self.values("accept").any(|v| v.starts_with(b"application/json")),
            keep_alive: match self.version {
                Some(0) => self.has("connection", "keep-alive"),
                _ => !self.has("connection", "close"),
            },
        })
    }
}

/// The path of a target: a server must take `http://host/path`, too (RFC 9112, 3.2.2).
fn origin_form(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else { return target };
    rest.find('/').map_or("/", |at| &rest[at..])
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The `Content-Type`.
    pub content_type: &'static str,
    /// The `Allow` header of a 405.
    pub allow: Option<&'static str>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// A JSON document and a line feed.
    #[must_use]
    pub fn json(status: u16, value: &serde_json::Value) -> Self {
        let body = format!("{value}\n").into_bytes();
        Self { status, content_type: "application/json", allow: None, body }
    }

    /// `{"error": message}`.
    #[must_use]
    pub fn error(status: u16, message: &str) -> Self {
        Self::json(status, &serde_json::json!({ "error": message }))
    }

    /// Its bytes. A response to `HEAD` says how long its body would be, and has none.
    #[must_use]
    pub fn to_bytes(&self, head_only: bool, keep_alive: bool) -> Vec<u8> {
        let allow = self.allow.map(|methods| format!("Allow: {methods}\r\n")).unwrap_or_default();
        let connection = if keep_alive { "" } else { "Connection: close\r\n" };
        let mut bytes = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{allow}{connection}\r\n",
            self.status,
            reason(self.status),
            self.content_type,
            self.body.len(),
        )
        .into_bytes();
        if !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

impl From<Reject> for Response {
    fn from(reject: Reject) -> Self {
        Self::error(reject.status, &reject.message)
    }
}

/// The phrase behind a status. Clients ignore it.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn status(input: &str) -> u16 {
        parse(input.as_bytes()).err().map_or(0, |r| r.status)
    }

    fn complete(input: &str) -> (Request, usize) {
        match parse(input.as_bytes()) {
            Ok(Parsed::Complete(request, len)) => (request, len),
            other => panic!("{other:?}"),
        }
    }

    fn put(headers: &str, body: &str) -> String {
        format!("PUT /vm/state HTTP/1.1\r\nHost: x\r\n{headers}\r\n{body}")
    }

    #[test]
    fn a_request_is_read_whole_and_no_further() {
        let one = put("CONTENT-length: 4\r\n", "body");
        let (request, len) = complete(&format!("{one}GET /next"));
        assert_eq!((request.body.as_slice(), len), (&b"body"[..], one.len()));
        assert_eq!((request.method.as_str(), request.path.as_str()), ("PUT", "/vm/state"));
        assert!(request.keep_alive);
    }

    #[test]
    fn every_beginning_of_a_request_is_partial() {
        let whole = put("Content-Length: 4\r\n", "body");
        for end in 0..whole.len() {
            let parsed = parse(&whole.as_bytes()[..end]).unwrap();
            assert_eq!(parsed, Parsed::Partial { expects_continue: false }, "{end}");
        }
    }

    #[test]
    fn lengths_that_are_none() {
        for bad in ["-1", "+4", "4 4", "4, 4", "0x4", "", "4.0", "٤"] {
            assert_eq!(status(&put(&format!("Content-Length: {bad}\r\n"), "")), 400, "{bad:?}");
        }
        assert_eq!(status(&put("Content-Length: 4\r\ncontent-length: 4\r\n", "body")), 400);
        for huge in ["65537", "18446744073709551615", "99999999999999999999999999"] {
            assert_eq!(status(&put(&format!("Content-Length: {huge}\r\n"), "")), 413, "{huge}");
        }
        assert_eq!(complete(&put("Content-Length: 00004\r\n", "body")).0.body, b"body");
    }

    #[test]
    fn transfer_codings_are_refused() {
        assert_eq!(status(&put("Transfer-Encoding: chunked\r\n", "")), 411);
        assert_eq!(status(&put("transfer-encoding: gzip, CHUNKED\r\n", "")), 411);
        assert_eq!(status(&put("Transfer-Encoding: gzip\r\n", "")), 501);
        assert_eq!(status(&put("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "")), 400);
    }

    #[test]
    fn heads_have_a_limit() {
        let long = |n| format!("GET / HTTP/1.1\r\nHost: {}", "x".repeat(n));
        assert_eq!(status(&long(MAX_HEAD)), 431, "without an end");
        assert_eq!(status(&format!("{}\r\n\r\n", long(MAX_HEAD))), 431, "with an end");
        assert_eq!(status(&put(&"A: b\r\n".repeat(MAX_HEADERS), "")), 431);
        assert_eq!(status(&"\r\n".repeat(MAX_HEAD)), 431, "empty lines without end");
    }

    #[test]
    fn what_is_no_http() {
        for bad in
            ["\0", "GET\r\n\r\n", "GET / HTTP/1.1\r\nHost : x\r\n\r\n", "{\"state\":\"paused\"}\r\n\r\n"]
        {
            assert_eq!(status(bad), 400, "{bad:?}");
        }
        assert_eq!(status("GET / HTTP/2.0\r\n\r\n"), 505);
    }

    #[test]
    fn one_host_is_asked_for() {
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n"), 400);
        assert!(!complete("GET / HTTP/1.0\r\n\r\n").0.keep_alive);
    }

    #[test]
    fn connection_and_expect() {
        assert!(!complete(&put("connection: Close\r\n", "")).0.keep_alive);
        assert!(complete("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").0.keep_alive);
        let waits = put("Expect: 100-Continue\r\nContent-Length: 1\r\n", "");
        assert_eq!(parse(waits.as_bytes()), Ok(Parsed::Partial { expects_continue: true }));
        assert_eq!(status(&put("Expect: a miracle\r\n", "")), 417);
    }

    #[test]
    fn an_absolute_target_has_a_path() {
        assert_eq!(complete("GET http://localhost/vm HTTP/1.0\r\n\r\n").0.path, "/vm");
        assert_eq!(complete("GET http://localhost HTTP/1.0\r\n\r\n").0.path, "/");
    }

    #[test]
    fn a_response_has_its_length() {
        let response = Response { allow: Some("GET"), ..Response::error(405, "no") };
        let text = String::from_utf8(response.to_bytes(false, false)).unwrap();
        let body = "{\"error\":\"no\"}\n";
        assert!(text.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{text}");
        assert!(
            text.contains(&format!("Content-Length: {}\r\nAllow: GET\r\nConnection: close\r\n", body.len()))
        );
        assert!(text.ends_with(&format!("\r\n\r\n{body}")));
        let head = String::from_utf8(response.to_bytes(true, true)).unwrap();
        assert!(head.ends_with("\r\n\r\n") && !head.contains("close"), "{head}");
    }

    /// Bytes that come near to being HTTP.
    fn nearly_http() -> impl Strategy<Value = Vec<u8>> {
        let words = [
            "GET",
            "PUT",
            " ",
            "/vm",
            "/vm/state",
            " HTTP/1.1",
            "\r\n",
            "\n",
            "Host: x",
            "Content-Length: ",
            "-",
            "1",
            "65536",
            "Transfer-Encoding: chunked",
            "Expect: 100-continue",
            ":",
            "\0",
            "{\"state\":\"paused\"}",
        ];
        let word = prop_oneof![
            proptest::sample::select(words.to_vec()).prop_map(|w| w.as_bytes().to_vec()),
            proptest::collection::vec(any::<u8>(), 0..8),
        ];
        proptest::collection::vec(word, 0..24).prop_map(|words| words.concat())
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic_and_in_bounds(input in nearly_http()) {
            if let Ok(Parsed::Complete(request, len)) = parse(&input) {
                prop_assert!(len <= input.len() && len > 0);
                prop_assert!(request.body.len() <= MAX_BODY);
                // What came behind it changes nothing.
                prop_assert_eq!(parse(&input[..len]), Ok(Parsed::Complete(request, len)));
            }
        }

        #[test]
        fn a_refusal_stays_one_whatever_follows(input in nearly_http(), more in nearly_http()) {
            if let Err(reject) = parse(&input) {
                prop_assert!(parse(&[input, more].concat()).is_err(), "{:?}", reject);
            }
        }
    }
}
