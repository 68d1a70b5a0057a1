//! The first network card, set up with the ioctls of netdevice(7): no address is asked for, the host has said it.

use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use microvm::guest::NetworkSpec;
use microvm::sys::interface::{check, request, with_flags};

const CARD: &str = "eth0";
const LOOPBACK: &str = "lo";

/// Brings the loopback interface up, and the card where there is one.
pub fn set_up(network: Option<&NetworkSpec>) -> io::Result<()> {
    // Any socket will do; this one needs no interface that is up.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    bring_up(&socket, LOOPBACK)?;
    let Some(network) = network else { return Ok(()) };
    call(&socket, libc::SIOCSIFADDR, &request(CARD, with_address(network.address))?)?;
    // The kernel's field of the mask is that of the address.
    call(&socket, libc::SIOCSIFNETMASK, &request(CARD, with_address(mask(network.prefix)))?)?;
    bring_up(&socket, CARD)?;
    network.gateway.map_or(Ok(()), |gateway| add_default_route(&socket, gateway))
}

fn bring_up(socket: &UdpSocket, name: &str) -> io::Result<()> {
    call(socket, libc::SIOCSIFFLAGS, &request(name, with_flags(libc::IFF_UP | libc::IFF_RUNNING))?)
}

fn with_address(address: Ipv4Addr) -> libc::__c_anonymous_ifr_ifru {
    libc::__c_anonymous_ifr_ifru { ifru_addr: socket_address(address) }
}

fn add_default_route(socket: &UdpSocket, gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: a plain structure of numbers and pointers, for which zeros are the values that are left out.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    let any = socket_address(Ipv4Addr::UNSPECIFIED);
    (route.rt_dst, route.rt_genmask, route.rt_gateway) = (any, any, socket_address(gateway));
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    call(socket, libc::SIOCADDRT, &route)
}

/// The network mask of a prefix of `prefix` bits; more than 32 are 32.
fn mask(prefix: u8) -> Ipv4Addr {
    u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0).into()
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // Behind the port.
    for (place, byte) in data.iter_mut().skip(2).zip(address.octets()) {
        *place = byte as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn call<T>(socket: &UdpSocket, number: libc::Ioctl, request: &T) -> io::Result<()> {
    // SAFETY: each caller passes the structure that its request reads, and none of these requests writes.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw const *request) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_as_many_bits_as_the_prefix() {
        let text = |prefix| mask(prefix).to_string();
        assert_eq!(text(0), "0.0.0.0");
        assert_eq!(text(24), "255.255.255.0");
        assert_eq!(text(31), "255.255.255.254");
        assert_eq!(text(32), "255.255.255.255");
        assert_eq!(text(255), "255.255.255.255");
    }
}
