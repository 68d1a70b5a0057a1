//! The host's own sockets for VMs, which QEMU's vhost-vsock ends at.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::Result;

fn owned(fd: libc::c_int) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn listen(port: u32) -> Result<OwnedFd> {
    // SAFETY: makes a descriptor.
    let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as u16,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: libc::VMADDR_CID_ANY,
        svm_zero: [0; 4],
    };
    let len = size_of_val(&address) as u32;
    // SAFETY: the address lives until the call returns, and `len` is its size.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    // SAFETY: takes no memory.
    let listening = bound == 0 && unsafe { libc::listen(socket.as_raw_fd(), 1) } == 0;
    if listening { Ok(socket) } else { Err(io::Error::last_os_error().into()) }
}

pub fn accept(socket: &OwnedFd) -> Result<File> {
    // SAFETY: the address of the other side is not asked for.
    let fd = unsafe { libc::accept(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    Ok(File::from(owned(fd)?))
}
