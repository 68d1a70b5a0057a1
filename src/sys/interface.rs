//! Requests about a network interface (netdevice(7)).

use std::io;

/// A request about interface `name`, of which `what` is the kind's own part.
///
/// # Errors
/// No interface has so long a name.
pub fn request(name: &str, what: libc::__c_anonymous_ifr_ifru) -> io::Result<libc::ifreq> {
    let mut request = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: what };
    // With a NUL behind it.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

/// The part with flags.
#[must_use]
pub fn with_flags(flags: libc::c_int) -> libc::__c_anonymous_ifr_ifru {
    // The kernel's field is as wide as the flags of an interface.
    libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short }
}

/// What `ioctl(2)` says.
///
/// # Errors
/// It failed, and `errno` is still that of the call.
pub fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
