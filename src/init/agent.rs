//! Does what the host asks for while the container's program runs (`microvm::guest::wire`).

use std::io;
use std::thread;

use microvm::guest::status::NOT_STARTED;
use microvm::guest::wire::{Failure, Kind, PORT, Request, read_frame, write_frame, write_json};

use super::{archive, session, vsock};

/// JSON of the deepest allowed nesting, and an archive's headers.
const STACK: usize = 256 << 10;

/// Takes requests from the host's connections, and from `own`, which is this side's.
pub fn start(own: vsock::Stream) -> io::Result<()> {
    let listener = vsock::listen(PORT)?;
    serve(own)?;
    let accept = move || {
        // Out of descriptors or memory, or the device is gone: the host is told by its connection's end.
        while let Ok(stream) = vsock::accept(&listener) {
            let _ = serve(stream);
        }
    };
    thread::Builder::new().name("agent".into()).stack_size(STACK).spawn(accept).map(drop)
}

fn serve(mut stream: vsock::Stream) -> io::Result<()> {
    let serve = move || {
        let mut bytes = Vec::new();
        while let Ok(Some(Kind::Request)) = read_frame(&mut stream, &mut bytes) {
            let done = match serde_json::from_slice(&bytes) {
                Ok(Request::Exec(process)) => return session::run_another(&process, stream),
                Ok(request) => answer(request, &mut stream),
                Err(e) => Err(Failure { status: NOT_STARTED, message: format!("the request: {e}") }),
            };
            let told = match done {
                Ok(()) => write_frame(&mut stream, Kind::Done, &[]),
                Err(failure) => write_json(&mut stream, Kind::Failed, &failure),
            };
            if told.is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("requests".into()).stack_size(STACK).spawn(serve).map(drop)
}

fn answer(request: Request, stream: &mut vsock::Stream) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure { status: NOT_STARTED, message: e.to_string() };
    match request {
        Request::Signal { session, signal } => session::signal(session, signal),
        Request::Resize { session, size } => session::resize(session, size),
        Request::Read { path } => archive::send(&path, stream).map_err(failed),
        Request::Write { path } => archive::receive(&path, stream).map_err(failed),
        Request::Exec(_) => Ok(()),
    }
}
