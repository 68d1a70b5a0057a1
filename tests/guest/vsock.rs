//! The guest's side of the vsock tests in `tests/real_kernels.rs`: runs in a guest as `/bin/vsock`.
//!
//! It connects to the host's ports 9000, once, and 9001, a thousand times, and gets back what it sends. Then it serves:
//! 5 echoes, 6 sends all back at the end of data, 7 sends without end, 8 ends the program, 9 resets the device.
//!
//! `vsock echo` serves port 5 alone and does not end. `vsock load SECONDS` has port 9000 of the host send back what it
//! gets for so long, and says how often.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use libc::{AF_VSOCK, SOCK_STREAM, VMADDR_CID_ANY, VMADDR_CID_HOST, sockaddr_vm, socklen_t};

const HOST_PORT: u32 = 9000;
const CONNECTIONS: usize = 1000;
/// So many are under way at once.
const BATCH: usize = 50;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT` (Linux, `include/uapi/linux/vm_sockets.h`).
const CONNECT_TIMEOUT: i32 = 6;
/// Instead of two seconds, which an emulated host may take to read a page of the VMM from a busy disk.
static PATIENCE: libc::timeval = libc::timeval { tv_sec: 20, tv_usec: 0 };

/// A socket with `call`, bind or connect, done to `cid` and `port`.
fn socket(
    call: unsafe extern "C" fn(i32, *const libc::sockaddr, socklen_t) -> i32,
    cid: u32,
    port: u32,
) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call.
    let fd = check(unsafe { libc::socket(AF_VSOCK, SOCK_STREAM, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = size_of::<libc::timeval>() as socklen_t;
    // SAFETY: the time lives through the call and is as long as said.
    check(unsafe { libc::setsockopt(fd, AF_VSOCK, CONNECT_TIMEOUT, (&raw const PATIENCE).cast(), len) })?;
    // SAFETY: it holds integers only, for which zero is a value.
    let mut address: sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = AF_VSOCK as u16;
    (address.svm_cid, address.svm_port) = (cid, port);
    // SAFETY: the address lives through the call and is as long as said.
    check(unsafe { call(fd, (&raw const address).cast(), size_of::<sockaddr_vm>() as socklen_t) })?;
    Ok(socket)
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket(libc::bind, VMADDR_CID_ANY, port)?;
    // SAFETY: a plain system call.
    check(unsafe { libc::listen(socket.as_raw_fd(), 256) })?;
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: null asks for no address.
    let fd =
        check(unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn shut_down(stream: &File, how: Shutdown) -> io::Result<()> {
    let how = if how == Shutdown::Write { libc::SHUT_WR } else { libc::SHUT_RDWR };
    // SAFETY: a plain system call.
    check(unsafe { libc::shutdown(stream.as_raw_fd(), how) }).map(drop)
}

fn echo(mut stream: File) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer)? {
            0 => return shut_down(&stream, Shutdown::Write),
            len => stream.write_all(&buffer[..len])?,
        }
    }
}

fn send_back(mut stream: File) -> io::Result<()> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)
}

fn send_on(mut stream: File) -> io::Result<()> {
    loop {
        if let Err(e) = stream.write_all(&[7; 8192]) {
            println!("sending ended: {:?}", e.kind());
            return Ok(());
        }
    }
}

fn serve(port: u32, service: fn(File) -> io::Result<()>) -> io::Result<()> {
    let listener = listen(port)?;
    thread::spawn(move || {
        while let Ok(stream) = accept(&listener) {
            thread::spawn(move || {
                if let Err(e) = service(stream) {
                    println!("port {port}: {:?}", e.kind());
                }
            });
        }
    });
    Ok(())
}

/// A connection to the host with these bytes sent and that direction ended.
fn send_host(port: u32, bytes: &[u8]) -> io::Result<File> {
    let mut stream = File::from(socket(libc::connect, VMADDR_CID_HOST, port)?);
    stream.write_all(bytes)?;
    shut_down(&stream, Shutdown::Write)?;
    Ok(stream)
}

/// All of it comes back.
fn expect_back(mut stream: File, bytes: &[u8]) -> io::Result<()> {
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    if back == bytes {
        return Ok(());
    }
    Err(io::Error::other(format!("of {} bytes {} came back, or others", bytes.len(), back.len())))
}

/// One large piece, then many small ones, some at once. Says how long the slowest connection took to be made.
fn ask_host() -> io::Result<()> {
    let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 3) as u8).collect();
    expect_back(send_host(HOST_PORT, &bytes)?, &bytes)?;
    let pieces: Vec<_> = (0..CONNECTIONS).map(|i| &bytes[i..2 * i]).collect();
    let mut slowest = Duration::ZERO;
    for batch in pieces.chunks(BATCH) {
        let send = |bytes: &&[u8]| {
            let begin = Instant::now();
            let stream = send_host(HOST_PORT + 1, bytes);
            slowest = slowest.max(begin.elapsed());
            stream
        };
        let streams: io::Result<Vec<_>> = batch.iter().map(send).collect();
        streams?.into_iter().zip(batch).try_for_each(|(s, b)| expect_back(s, b))?;
    }
    println!("the host has sent all back; slowest connection: {slowest:?}");
    Ok(())
}

const DRIVER: &str = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";

/// Takes the device from its driver, which resets it, and gives it back.
fn reset_device() -> io::Result<()> {
    for device in std::fs::read_dir(DRIVER)? {
        let device = device?.file_name();
        if device.as_encoded_bytes().starts_with(b"virtio") {
            for file in ["unbind", "bind"] {
                std::fs::write(Path::new(DRIVER).join(file), device.as_encoded_bytes())?;
            }
        }
    }
    println!("reset");
    Ok(())
}

fn run() -> io::Result<()> {
    ask_host()?;
    match socket(libc::connect, VMADDR_CID_HOST, HOST_PORT + 2) {
        Err(e) => println!("nobody listens: {:?}", e.kind()),
        Ok(_) => return Err(io::Error::other("somebody accepts on a port where nobody listens")),
    }
    serve(5, echo)?;
    serve(6, send_back)?;
    serve(7, send_on)?;
    serve(9, |_| reset_device())?;
    let end = listen(8)?;
    println!("serving");
    accept(&end).map(drop)
}

fn echo_for_ever() -> io::Result<()> {
    serve(5, echo)?;
    println!("echoing");
    loop {
        thread::park();
    }
}

fn load(seconds: u64) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let bytes: Vec<u8> = (0..300_000).map(|i: u32| (i / 3) as u8).collect();
    let lengths = [1, 4096, bytes.len()];
    let mut rounds = 0;
    for len in lengths.into_iter().cycle() {
        if Instant::now() >= end {
            break;
        }
        // From another place each time, so that an old answer is not taken for this one's.
        let piece = &bytes[rounds % (bytes.len() - len + 1)..][..len];
        expect_back(send_host(HOST_PORT, piece)?, piece)?;
        rounds += 1;
    }
    println!("vsock={rounds}");
    Ok(())
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["echo"] => echo_for_ever(),
        ["load", seconds] => seconds.parse().map_err(io::Error::other).and_then(load),
        _ => run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("vsock: {e}");
            ExitCode::FAILURE
        }
    }
}
