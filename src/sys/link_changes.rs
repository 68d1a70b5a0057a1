//! The host's word that a network interface came, went or changed (rtnetlink(7)).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, read};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// `RTMGRP_LINK` (Linux, `include/uapi/linux/rtnetlink.h`).
const GROUP_LINK: u32 = 1;
/// Words taken at once: a busy host must not keep a thread from its other events.
const BATCH: usize = 64;

/// Becomes readable when any interface of a network has changed. Which one and how is not looked at: who waits has to ask
/// about its own, as some of the words may be lost.
pub struct LinkChanges(OwnedFd);

impl LinkChanges {
    /// Listens to the network that the calling thread is in. Anybody may.
    ///
    /// # Errors
    /// The host refuses such a socket, as a container's filter may.
    pub fn new() -> io::Result<Self> {
        // Protocol 0 is `NETLINK_ROUTE`.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUP_LINK))?;
        Ok(Self(socket))
    }

    /// Takes what was said so far, or much of it: then it stays readable.
    pub fn acknowledge(&self) {
        let mut word = [0; 16];
        // Another error than AGAIN is that words were lost, and is said once.
        let is_said = || !matches!(read(&self.0, &mut word), Err(Errno::AGAIN));
        let _ = std::iter::repeat_with(is_said).take(BATCH).all(|said| said);
    }
}

impl AsRawFd for LinkChanges {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_a_quiet_network() {
        // Other tests may add interfaces.
        LinkChanges::new().unwrap().acknowledge();
    }
}
