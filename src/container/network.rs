//! How a container reaches the world: its card, and what its guest is told of it.

use std::net::Ipv4Addr;
use std::str::FromStr;

use thiserror::Error;

use crate::config::{NetBackend, NetConfig, PRIVATE, ParseNetError};
use crate::devices::virtio::net::{guest_name_servers, user_mode_lacks};
use crate::guest::NetworkSpec;

/// What `--network` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// The loopback interface alone.
    None,
    /// A card.
    Card(NetConfig),
}

impl FromStr for Network {
    type Err = ParseNetError;

    fn from_str(text: &str) -> Result<Self, ParseNetError> {
        if text == "none" {
            return Ok(Self::None);
        }
        let card: NetConfig = text.parse()?;
        let private = card.backend == NetBackend::User;
        Ok(Self::Card(NetConfig { private, ..card }))
    }
}

/// An address and the length of its network's prefix, as in `10.0.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of the prefix, 0 to 32.
    pub prefix: u8,
}

/// Not an address with a prefix.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no address with its network's prefix: write ADDRESS/BITS, as in 10.0.0.2/24")]
pub struct ParseAddressError(String);

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let bad = || ParseAddressError(text.into());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        // Rust would take a sign.
        let prefix = prefix.parse().ok().filter(|bits| *bits <= 32 && !prefix.starts_with('+'));
        Ok(Self { address: address.parse().map_err(|_| bad())?, prefix: prefix.ok_or_else(bad)? })
    }
}

/// The user's wishes.
#[derive(Clone, Debug, Default)]
pub struct NetworkWishes {
    /// Where nobody says, user mode, if this host can.
    pub network: Option<Network>,
    /// The address on a tap.
    pub address: Option<Address>,
    /// The way to all others from there.
    pub gateway: Option<Ipv4Addr>,
}

/// The card, and what its guest is told.
pub fn connect(wishes: &NetworkWishes, must: bool) -> (Option<NetConfig>, Option<NetworkSpec>) {
    let card = match (&wishes.network, user_mode_lacks()) {
        (Some(Network::None), _) => None,
        (Some(Network::Card(card)), _) => Some(card.clone()),
        // Published ports need it, so that its absence is an error.
        (None, lack) if lack.is_none() || must => {
            Some(NetConfig { private: true, ..NetConfig::new(NetBackend::User) })
        }
        (None, lack) => {
            let lack = lack.unwrap_or_default();
            log::warn!("the container has no network: {lack}; --network none is the same without this line");
            None
        }
    };
    let spec = card.as_ref().and_then(|card| spec(card, wishes));
    (card, spec)
}

fn spec(card: &NetConfig, wishes: &NetworkWishes) -> Option<NetworkSpec> {
    if card.private {
        let (address, prefix, gateway) = (PRIVATE.guest, PRIVATE.prefix, Some(PRIVATE.router));
        return Some(NetworkSpec { address, prefix, gateway, name_servers: guest_name_servers() });
    }
    let Address { address, prefix } = wishes.address?;
    Some(NetworkSpec { address, prefix, gateway: wishes.gateway, name_servers: guest_name_servers() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_addresses_are_read() {
        assert_eq!("none".parse::<Network>().unwrap(), Network::None);
        assert!(matches!("user".parse().unwrap(), Network::Card(card) if card.private));
        assert!(matches!("tap=t0".parse().unwrap(), Network::Card(card) if !card.private));
        assert!("host".parse::<Network>().is_err());
        let address = Address { address: Ipv4Addr::new(10, 0, 0, 2), prefix: 24 };
        assert_eq!("10.0.0.2/24".parse(), Ok(address));
        for wrong in ["10.0.0.2", "10.0.0.2/33", "10.0.0.2/+8", "a/8", ""] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_guest_is_told_what_its_network_has() {
        let wishes =
            |network: &str| NetworkWishes { network: network.parse().ok(), ..NetworkWishes::default() };
        assert_eq!(connect(&wishes("none"), false), (None, None));
        let (card, spec) = connect(&wishes("user"), false);
        assert!(card.is_some() && spec.is_some_and(|s| s.address == PRIVATE.guest));
        // Its program does that, or nobody.
        assert_eq!(connect(&wishes("tap=t0"), false).1, None);
        let address = "172.30.0.2/24".parse().ok();
        let spec = connect(&NetworkWishes { address, ..wishes("tap=t0") }, false).1.unwrap();
        assert_eq!((spec.address, spec.prefix, spec.gateway), (Ipv4Addr::new(172, 30, 0, 2), 24, None));
    }
}
