//! Stream sockets of `AF_VSOCK` (vsock(7)), which neither the standard library nor rustix has.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{AF_VSOCK, SOCK_CLOEXEC, SOCK_STREAM, VMADDR_CID_ANY, VMADDR_CID_HOST, sockaddr_vm, socklen_t};
use rustix::net::{SocketFlags, accept_with};

/// Connections that wait until they are taken.
const BACKLOG: i32 = 128;

/// A connection. It is read and written as a file.
pub type Stream = File;

type Call = unsafe extern "C" fn(i32, *const libc::sockaddr, socklen_t) -> i32;

/// Connects to the host's `port`.
pub fn connect(port: u32) -> io::Result<Stream> {
    socket(libc::connect, VMADDR_CID_HOST, port).map(File::from)
}

/// A socket that listens at `port`.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket(libc::bind, VMADDR_CID_ANY, port)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection.
pub fn accept(listener: &OwnedFd) -> io::Result<Stream> {
    Ok(accept_with(listener, SocketFlags::CLOEXEC)?.into())
}

/// Says that nothing more is sent.
pub fn end(stream: &Stream) -> io::Result<()> {
    // SAFETY: a plain system call on a descriptor that is open.
    check(unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) }).map(drop)
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn socket(call: Call, cid: u32, port: u32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call.
    let fd = check(unsafe { libc::socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: it holds integers only, for which zero is a value.
    let mut address: sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    // SAFETY: the address lives through the call and is as long as said.
    check(unsafe { call(fd, (&raw const address).cast(), size_of::<sockaddr_vm>() as socklen_t) })?;
    Ok(socket)
}
