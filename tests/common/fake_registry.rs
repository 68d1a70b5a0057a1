//! A registry that does what a test says, well or badly: HTTP/1.1, one request for each connection.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use microvm::image::Digest;
use serde_json::{Value, json};

/// What was asked.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    /// Of a form.
    pub body: String,
    /// How often this path was asked for before.
    pub before: usize,
}

/// What is answered.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// How much of the body is sent before the connection breaks.
    pub sent: usize,
    /// Nothing more comes, and the connection stays.
    pub hangs: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), sent: body.len(), body, hangs: false }
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.into(), value.to_string()));
        self
    }

    pub fn cut(self, sent: usize) -> Self {
        Self { sent, ..self }
    }

    pub fn hanging(self) -> Self {
        Self { hangs: true, ..self }
    }
}

/// A registry with one image, `app`, in the repository `app`.
pub struct Image {
    pub manifest: Vec<u8>,
    pub blobs: HashMap<String, Vec<u8>>,
}

pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len() })
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

impl Image {
    pub fn new(layers: &[&[u8]]) -> Self {
        Self::changed(layers, |_| {})
    }

    /// With a manifest that is changed.
    pub fn changed(layers: &[&[u8]], change: impl FnOnce(&mut Value)) -> Self {
        let ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": ids } });
        let config = config.to_string().into_bytes();
        let descriptors: Vec<_> = layers.iter().map(|layer| descriptor(LAYER, layer)).collect();
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, &config), "layers": descriptors,
        });
        change(&mut manifest);
        let parts = layers.iter().map(|layer| layer.to_vec()).chain([config]);
        let blobs = parts.map(|bytes| (Digest::of(&bytes).to_string(), bytes)).collect();
        Self { manifest: manifest.to_string().into_bytes(), blobs }
    }

    /// As a good registry answers.
    pub fn answer(&self, request: &Request) -> Reply {
        if request.path == "/v2/" {
            return Reply::new(200, "{}");
        }
        if let Some(name) = request.path.strip_prefix("/v2/app/manifests/") {
            let digest = Digest::of(&self.manifest).to_string();
            return match name {
                "latest" => Reply::new(200, self.manifest.clone()).with("Content-Type", MANIFEST),
                name if name == digest => Reply::new(200, self.manifest.clone()),
                _ => Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#),
            };
        }
        let Some(blob) = request.path.strip_prefix("/v2/app/blobs/").and_then(|name| self.blobs.get(name))
        else {
            return Reply::new(404, "");
        };
        let start =
            request.headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        match start.map(|start| start.parse::<usize>().unwrap()) {
            Some(start) if start >= blob.len() => Reply::new(416, ""),
            Some(start) => Reply::new(206, &blob[start..])
                .with("Content-Range", format!("bytes {start}-{}/{}", blob.len() - 1, blob.len())),
            None => Reply::new(200, blob.clone()),
        }
    }
}

/// A registry that is running.
pub struct Fake {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    pub fn new(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (answer, all) = (Arc::new(answer), asked.clone());
        // They end with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, all) = (answer.clone(), all.clone());
                thread::spawn(move || serve(&stream, &*answer, &all));
            }
        });
        Self { address, asked }
    }

    /// The name of its image.
    pub fn app(&self) -> String {
        format!("{}/app", self.address)
    }

    /// What was asked for so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }

    /// The requests whose path has a word in it.
    pub fn asked_for(&self, word: &str) -> Vec<Request> {
        self.asked().into_iter().filter(|request| request.path.contains(word)).collect()
    }
}

fn serve(stream: &TcpStream, answer: &(dyn Fn(&Request) -> Reply + Sync), asked: &Mutex<Vec<Request>>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_string());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = String::from_utf8(body).unwrap();
    let request = {
        let mut asked = asked.lock().unwrap();
        let before = asked.iter().filter(|request| request.path == path).count();
        asked.push(Request { path, headers, body, before });
        asked.last().unwrap().clone()
    };
    let reply = answer(&request);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    head += &format!("Content-Length: {}\r\n", reply.body.len());
    reply.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    let mut out = stream;
    // Whoever has enough of it closes the connection.
    let _ = out.write_all(format!("{head}\r\n").as_bytes());
    let _ = out.write_all(&reply.body[..reply.sent]);
    if reply.hangs {
        let _ = reader.read(&mut [0]);
    }
}
