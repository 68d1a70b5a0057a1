//! The requests of docs/control.md: from a path and a method to what the VM is asked, and its answer back.

use std::path::PathBuf;
use std::time::{Instant, SystemTime};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::config::VmConfig;
use crate::devices::ChangeError;
use crate::metrics::Metric;
use crate::vmm::{Answer, Refusal, Request as VmRequest, VmHandle, Wanted};

use super::http::{Request, Response};
use super::server::Handler;

const REQUESTS: Metric = Metric::counter(
    "microvm_control_requests_total",
    "Requests that the control socket has answered, by HTTP status.",
);
/// The media type of the Prometheus text format.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const READ: &str = "GET, HEAD";
const WRITE: &str = "PUT";
const READ_WRITE: &str = "GET, HEAD, PUT";

/// What does not change while a VM runs.
pub(super) struct VmInfo {
    name: String,
    cpus: u32,
    memory_bytes: u64,
    kernel: PathBuf,
    started: SystemTime,
    since: Instant,
}

impl VmInfo {
    /// The VM of `config`, which starts now.
    pub(super) fn new(name: &str, config: &VmConfig) -> Self {
        // Where it was started from is not where who asks is.
        let kernel = std::path::absolute(&config.kernel.path).unwrap_or_else(|_| config.kernel.path.clone());
        Self {
            name: name.into(),
            cpus: config.cpus,
            memory_bytes: config.memory.size.0,
            kernel,
            started: SystemTime::now(),
            since: Instant::now(),
        }
    }
}

/// Answers for one VM.
pub(super) struct Api {
    pub vm: VmHandle,
    pub info: VmInfo,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StateRequest {
    state: Wanted,
}

impl Handler for Api {
    fn handle(&mut self, request: &Request) -> Response {
        let response = self.answer(request);
        let status = response.status.to_string();
        self.vm.metrics().group(&[("code", &status)]).counter(REQUESTS).increment();
        response
    }
}

impl Api {
    fn answer(&self, request: &Request) -> Response {
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        if !query.is_empty() {
            return Response::error(400, &format!("no request here has a query: {query:?}"));
        }
        let read = matches!(request.method.as_str(), "GET" | "HEAD");
        let write = request.method == "PUT";
        let device = path.strip_prefix("/devices/").filter(|id| !id.is_empty());
        match (path, device) {
            ("/vm", _) if read => Response::json(200, &self.describe()),
            ("/vm", _) => not_allowed(READ),
            ("/vm/state", _) if write => self.set_state(&request.body),
            ("/vm/state", _) => not_allowed(WRITE),
            ("/metrics", _) if read => self.metrics(request.wants_json),
            ("/metrics", _) => not_allowed(READ),
            ("/devices", _) if read => self.ask(VmRequest::Devices),
            ("/devices", _) => not_allowed(READ),
            (_, Some(id)) if read => self.ask(VmRequest::Device(id.into())),
            (_, Some(id)) if write => match body::<Map<String, Value>>(&request.body) {
                Ok(change) => self.ask(VmRequest::ChangeDevice(id.into(), change)),
                Err(response) => response,
            },
            (_, Some(_)) => not_allowed(READ_WRITE),
            _ => Response::error(
                404,
                "no such path; there are /vm, /vm/state, /metrics, /devices and /devices/ID",
            ),
        }
    }

    fn describe(&self) -> Value {
        let info = &self.info;
        json!({
            "name": info.name,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "state": self.vm.state(),
            "cpus": info.cpus,
            "memory_bytes": info.memory_bytes,
            "kernel": info.kernel.to_string_lossy(),
            "started": humantime::format_rfc3339_millis(info.started).to_string(),
            "uptime_seconds": (info.since.elapsed().as_secs_f64() * 1e3).round() / 1e3,
        })
    }

    fn set_state(&self, bytes: &[u8]) -> Response {
        match body::<StateRequest>(bytes) {
            Ok(request) => self.ask(VmRequest::SetState(request.state)),
            Err(response) => response,
        }
    }

    fn metrics(&self, as_json: bool) -> Response {
        let snapshot = self.vm.metrics().snapshot();
        let (content_type, text) = match as_json {
            true => ("application/json", snapshot.to_json() + "\n"),
            false => (PROMETHEUS, snapshot.to_string()),
        };
        Response { status: 200, content_type, allow: None, body: text.into_bytes() }
    }

    fn ask(&self, request: VmRequest) -> Response {
        match self.vm.ask(request) {
            Ok(Answer::State(state)) => Response::json(200, &json!({ "state": state })),
            Ok(Answer::Devices(devices)) => Response::json(200, &json!({ "devices": devices })),
            Ok(Answer::Device(device, state)) => {
                let counters = self.vm.metrics().snapshot().sums_of("device", &device.id);
                let (id, kind) = (device.id, device.kind);
                Response::json(200, &json!({ "id": id, "kind": kind, "state": state, "counters": counters }))
            }
            Err(refusal) => refused(&refusal),
        }
    }
}

/// Reads a body that must be there and be an object.
fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Response> {
    let wrong = |what: &str| Response::error(400, &format!("the body is not as it should be: {what}"));
    // serde would also take a list of the fields' values, in order.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(wrong("a list, where an object is expected"));
    }
    serde_json::from_slice(bytes).map_err(|e| wrong(&e.to_string()))
}

fn not_allowed(allow: &'static str) -> Response {
    Response { allow: Some(allow), ..Response::error(405, &format!("allowed here: {allow}")) }
}

fn refused(refusal: &Refusal) -> Response {
    let status = match refusal {
        Refusal::NoWay { .. } | Refusal::Device(ChangeError::NotNow(_)) => 409,
        Refusal::NoDevice(_) => 404,
        Refusal::Device(ChangeError::Invalid(_)) => 400,
        Refusal::Device(ChangeError::Fixed) => {
            return Response { allow: Some(READ), ..Response::error(405, &refusal.to_string()) };
        }
        Refusal::Stuck | Refusal::Ended | Refusal::NoAnswer => 503,
    };
    Response::error(status, &refusal.to_string())
}
