//! Tap interfaces (Linux' `Documentation/networking/tuntap.rst`).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::interface::{check, request, with_flags};

/// Where taps come from.
pub const DEVICE: &str = "/dev/net/tun";

/// `TUNSETIFF`.
const SET_INTERFACE: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
/// `TUNSETOFFLOAD`.
const SET_OFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as libc::Ioctl;
/// `TUNSETVNETHDRSZ`.
const SET_HEADER_SIZE: libc::Ioctl = 0x4004_54d8_u32 as libc::Ioctl;

/// `TUNSETQUEUE`.
const SET_QUEUE: libc::Ioctl = 0x4004_54d9_u32 as libc::Ioctl;

/// `SIOCETHTOOL`.
const ETHTOOL: libc::Ioctl = 0x8946;
/// `ETHTOOL_GLINK`.
const GET_LINK: u32 = 0x0a;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// How many queues a tap was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queues {
    /// One.
    One,
    /// As many as are attached (`multi_queue`).
    Many,
}

/// Whether the host has an interface of this name. Opening a tap that is not there would make one.
#[must_use]
pub fn exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: `name` ends with a NUL and is only read.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// Opens [`DEVICE`], without a tap so far.
///
/// # Errors
/// It is not there, or not for us.
pub fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(DEVICE)
}

/// Whether interface `name` is up, and somebody is at its other end. Its flags say so up to a second late, and right
/// after it was made they say so of nobody.
///
/// # Errors
/// There is no such interface.
pub fn is_running(name: &str) -> io::Result<bool> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut link = EthtoolValue { command: GET_LINK, value: 0 };
    let what = libc::__c_anonymous_ifr_ifru { ifru_data: (&raw mut link).cast() };
    let mut request = request(name, what)?;
    // SAFETY: the kernel reads an `ifreq`, and with this command reads and writes
    // the eight bytes of `link`, which lives until the call returns.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), ETHTOOL, &raw mut request) })?;
    Ok(link.value != 0)
}

/// Makes `device` the other end of tap `name`, or of one of its queues, with a virtio header of `header` bytes before
/// each frame.
///
/// # Errors
/// The tap is busy, not ours, or no tap for so many queues.
pub fn attach(device: &File, name: &str, queues: Queues, header: libc::c_int) -> io::Result<()> {
    let many = if queues == Queues::Many { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut request = request(name, with_flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | many))?;
    // SAFETY: the kernel reads and writes an `ifreq`.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_INTERFACE, &raw mut request) })?;
    // SAFETY: the kernel reads an int.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_HEADER_SIZE, &raw const header) })
}

/// Lets the kernel use the queue that `device` is, or use it no more. A queue that is not used is always ready with an
/// error.
///
/// # Errors
/// It is so already, or the tap is gone.
pub fn use_queue(device: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let request = request("", with_flags(if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE }))?;
    // SAFETY: the kernel reads an `ifreq`.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_QUEUE, &raw const request) })
}

/// Sets what the kernel may leave to the reader of a tap: `TUN_F_*`.
///
/// # Errors
/// The kernel does not know one, or the tap is gone.
pub fn set_offloads(device: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_OFFLOAD, libc::c_ulong::from(flags)) })
}
