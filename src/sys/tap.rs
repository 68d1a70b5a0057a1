//! Tap interfaces (Linux' `Documentation/networking/tuntap.rst`).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Where taps come from.
pub const DEVICE: &str = "/dev/net/tun";

/// `TUNSETIFF`.
const SET_INTERFACE: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
/// `TUNSETOFFLOAD`.
const SET_OFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as libc::Ioctl;
/// `TUNSETVNETHDRSZ`.
const SET_HEADER_SIZE: libc::Ioctl = 0x4004_54d8_u32 as libc::Ioctl;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq`, of which `TUNSETIFF` uses name and flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
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

/// Makes `device` the other end of tap `name`, with a virtio header of `header` bytes before each frame.
///
/// # Errors
/// The tap is busy, not ours, or no tap.
pub fn attach(device: &File, name: &str, header: libc::c_int) -> io::Result<()> {
    let mut request =
        InterfaceRequest { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    if name.len() >= request.name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads and writes an `ifreq`, which `request` is in size and layout.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_INTERFACE, &raw mut request) })?;
    // SAFETY: the kernel reads an int.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_HEADER_SIZE, &raw const header) })
}

/// Sets what the kernel may leave to the reader of a tap: `TUN_F_*`.
///
/// # Errors
/// The kernel does not know one, or the tap is gone.
pub fn set_offloads(device: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(device.as_raw_fd(), SET_OFFLOAD, libc::c_ulong::from(flags)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
