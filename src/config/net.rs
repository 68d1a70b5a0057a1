//! Network cards, and the host's ports that lead to the guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

use super::ConfigError;
use super::size::{ParseSizeError, Size};

/// Linux's `IFNAMSIZ` is 16 with the NUL.
const MAX_TAP_NAME: usize = 15;

/// A network card. In JSON also the text that `--net` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetConfig {
    /// What it is connected to.
    pub backend: NetBackend,
    /// Its address; one is made up where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Whether the host's kernel serves its queues.
    #[serde(skip_serializing_if = "Vhost::is_off")]
    pub vhost: Vhost,
    /// The most frames a second in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// The most bytes a second in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,
    /// In user mode: the router's address leads to the host, also to servers that listen on its loopback address alone.
    #[serde(skip_serializing_if = "is_false")]
    pub host_loopback: bool,
    /// In user mode: the guest has [`PRIVATE`] addresses instead of the host's own.
    #[serde(skip_serializing_if = "is_false")]
    pub private: bool,
}

/// The addresses of a private network in user mode, those of QEMU's: no DHCP is needed to know them.
pub const PRIVATE: PrivateNetwork =
    PrivateNetwork { guest: Ipv4Addr::new(10, 0, 2, 15), router: Ipv4Addr::new(10, 0, 2, 2), prefix: 24 };

/// Addresses that are the same in every guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrivateNetwork {
    /// The guest's.
    pub guest: Ipv4Addr,
    /// The way to all others.
    pub router: Ipv4Addr,
    /// Bits of the network's prefix.
    pub prefix: u8,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetBackend {
    /// A tap interface of the host's, by name.
    Tap(String),
    /// The host's own connections, through `passt`: needs no root.
    User,
}

/// Whether the host's kernel serves a card's queues itself (vhost-net): faster, and more of the kernel that a guest
/// reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// A thread of this process does.
    #[default]
    Off,
    /// Where it can.
    Auto,
    /// It does, or there is no VM.
    On,
}

impl Vhost {
    fn is_off(&self) -> bool {
        *self == Self::Off
    }
}

/// A MAC address of one card (never that of a group).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(
    /// In the order in which it is written.
    pub [u8; 6],
);

/// A MAC address that cannot be used.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ParseMacError {
    /// It cannot be read.
    #[error("mac {0:?}: a MAC address is six pairs of hexadecimal digits, as in 02:00:00:00:00:01")]
    Form(String),
    /// No card can have it.
    #[error(
        "mac {0}: the address of a group or of nobody: the first byte must be even, as in 02:00:00:00:00:01"
    )]
    Group(String),
}

impl FromStr for Mac {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let bad = || ParseMacError::Form(text.into());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            // Rust would take a sign.
            let digits = pair.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(pair, 16).ok().filter(|_| digits).ok_or_else(bad)?;
        }
        if pairs.next().is_some() {
            return Err(bad());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(ParseMacError::Group(text.into()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

impl NetConfig {
    /// A card without options.
    #[must_use]
    pub const fn new(backend: NetBackend) -> Self {
        Self {
            backend,
            mac: None,
            vhost: Vhost::Off,
            iops: None,
            bandwidth: None,
            host_loopback: false,
            private: false,
        }
    }

    /// Its MAC address: the chosen one, or a locally administered one that stays the same from run to run. For a tap
    /// it follows from the tap's name, so that two VMs on one bridge have two; a card in user mode is alone.
    #[must_use]
    pub fn mac(&self, index: usize) -> Mac {
        let seed = match &self.backend {
            NetBackend::Tap(name) => name.clone(),
            NetBackend::User => format!("user {index}"),
        };
        // FNV-1a: Rust's own hashes may change with its version.
        let hash = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        self.mac.unwrap_or(Mac([0x02, a, b, c, d, e]))
    }

    /// Whether the host's kernel could serve its queues: it knows taps, and no limits.
    #[must_use]
    pub fn can_use_vhost(&self) -> bool {
        let is_tap = matches!(self.backend, NetBackend::Tap(_));
        is_tap && self.iops.is_none() && self.bandwidth.is_none()
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.iops == Some(0) || self.bandwidth == Some(Size(0)) {
            return Err(ConfigError::NetLimit);
        }
        if self.vhost == Vhost::On && !self.can_use_vhost() {
            return Err(ConfigError::NetVhost);
        }
        let NetBackend::Tap(name) = &self.backend else { return Ok(()) };
        for (is_set, option) in [(self.host_loopback, "host-loopback"), (self.private, "private")] {
            if is_set {
                return Err(ConfigError::NetUserOption(name.clone(), option));
            }
        }
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        let good = (1..=MAX_TAP_NAME).contains(&name.len()) && name != "." && name != "..";
        if good && !name.contains(bad) { Ok(()) } else { Err(ConfigError::TapName(name.clone())) }
    }
}

/// A `--net` value that cannot be read.
#[derive(Debug, Error)]
pub enum ParseNetError {
    /// The MAC address.
    #[error(transparent)]
    Mac(#[from] ParseMacError),
    /// What stands in front.
    #[error("{0:?} is no network: write tap=NAME or user in front")]
    Backend(String),
    /// An option behind it.
    #[error(
        "unknown option {0:?}: allowed are mac=MAC, vhost=auto|on|off, iops=N, bandwidth=SIZE, host-loopback and private"
    )]
    Option(String),
    /// No word about vhost.
    #[error("vhost={0}: allowed are auto, on and off")]
    Vhost(String),
    /// No number of frames.
    #[error("iops={0}: allowed are whole numbers from 1, as in iops=1000")]
    Iops(String),
    /// No size.
    #[error("bandwidth: {0}")]
    Bandwidth(#[from] ParseSizeError),
}

/// `tap=NAME|user[,mac=MAC][,vhost=auto|on|off][,iops=N][,bandwidth=SIZE][,host-loopback][,private]`
impl FromStr for NetConfig {
    type Err = ParseNetError;

    fn from_str(text: &str) -> Result<Self, ParseNetError> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let backend = match first.split_once('=') {
            None if first == "user" => NetBackend::User,
            Some(("tap", name)) => NetBackend::Tap(name.into()),
            _ => return Err(ParseNetError::Backend(first.into())),
        };
        let mut net = Self::new(backend);
        for part in parts {
            match part.split_once('=') {
                Some(("mac", mac)) => net.mac = Some(mac.parse()?),
                Some(("vhost", word)) => net.vhost = parse_vhost(word)?,
                Some(("iops", number)) => net.iops = Some(parse_number(number)?),
                Some(("bandwidth", size)) => net.bandwidth = Some(size.parse()?),
                None if part == "host-loopback" => net.host_loopback = true,
                None if part == "private" => net.private = true,
                _ => return Err(ParseNetError::Option(part.into())),
            }
        }
        Ok(net)
    }
}

fn parse_vhost(word: &str) -> Result<Vhost, ParseNetError> {
    match word {
        "auto" => Ok(Vhost::Auto),
        "on" => Ok(Vhost::On),
        "off" => Ok(Vhost::Off),
        _ => Err(ParseNetError::Vhost(word.into())),
    }
}

/// Rust would take a sign.
fn parse_number(text: &str) -> Result<u64, ParseNetError> {
    let number = text.parse().ok().filter(|_| !text.starts_with('+'));
    number.ok_or_else(|| ParseNetError::Iops(text.into()))
}

impl<'de> Deserialize<'de> for NetConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            backend: NetBackend,
            mac: Option<Mac>,
            #[serde(default)]
            vhost: Vhost,
            iops: Option<u64>,
            bandwidth: Option<Size>,
            #[serde(default)]
            host_loopback: bool,
            #[serde(default)]
            private: bool,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = NetConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a network such as \"tap=tap0,mac=02:00:00:00:00:01\" or \"user\", or an object")
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<NetConfig, E> {
                v.parse().map_err(E::custom)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<NetConfig, A::Error> {
                let Fields { backend, mac, vhost, iops, bandwidth, host_loopback, private } =
                    Fields::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(NetConfig { backend, mac, vhost, iops, bandwidth, host_loopback, private })
            }
        }
        d.deserialize_any(Visitor)
    }
}

/// A transport protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host's that leads to one of the guest's, as in `--publish`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// The host's address; all of them where there is none.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// Which kind of port.
    pub protocol: Protocol,
}

impl Publish {
    /// Where the host listens.
    #[must_use]
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address.unwrap_or(IpAddr::from([0; 4])), self.host)
    }

    /// Whether both want one port of the host's: all addresses have every other one's.
    pub(super) fn collides(&self, other: &Self) -> bool {
        let is_all = |publish: &Self| publish.address.is_none_or(|a| a.is_unspecified());
        let one_address = self.address == other.address || is_all(self) || is_all(other);
        self.protocol == other.protocol && self.host == other.host && one_address
    }
}

/// A `--publish` value that cannot be read.
#[derive(Debug, Error)]
#[error(
    "{0:?} publishes no port: write [ADDRESS:]HOST:GUEST[/tcp|udp] with ports from 1 to 65535, as in 8080:80"
)]
pub struct ParsePublishError(String);

impl FromStr for Publish {
    type Err = ParsePublishError;

    fn from_str(text: &str) -> Result<Self, ParsePublishError> {
        let bad = || ParsePublishError(text.into());
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(bad()),
        };
        let (front, guest) = ports.rsplit_once(':').ok_or_else(bad)?;
        let (address, host) = match front.rsplit_once(':') {
            None => (None, front),
            Some((address, host)) => (Some(parse_address(address).ok_or_else(bad)?), host),
        };
        let port = |text: &str| parse_port(text).ok_or_else(bad);
        Ok(Self { address, host: port(host)?, guest: port(guest)?, protocol })
    }
}

/// An IPv4 address, or an IPv6 address in brackets.
fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

fn parse_port(text: &str) -> Option<u16> {
    // Rust would take a sign.
    text.parse().ok().filter(|port| *port != 0 && !text.starts_with('+'))
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            None => write!(f, "{}", self.host)?,
            Some(_) => write!(f, "{}", self.socket())?,
        }
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, ":{}/{protocol}", self.guest)
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Publish {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mac_addresses_are_strict() {
        assert_eq!("02:00:00:00:00:fF".parse(), Ok(Mac([2, 0, 0, 0, 0, 255])));
        for bad in ["", "+2:00:00:00:00:00", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0"] {
            assert!(matches!(bad.parse::<Mac>(), Err(ParseMacError::Form(_))), "{bad}");
        }
        for group in ["01:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(matches!(group.parse::<Mac>(), Err(ParseMacError::Group(_))), "{group}");
        }
    }

    #[test]
    fn default_addresses_are_local_and_stay() {
        let mac = |text: &str| text.parse::<NetConfig>().unwrap().mac(0);
        assert_eq!(mac("tap=tap0"), mac("tap=tap0"));
        assert_ne!(mac("tap=tap0"), mac("tap=tap1"));
        assert_eq!(mac("user").0[0], 2);
        assert_eq!(mac("user,mac=52:54:00:00:00:01").to_string(), "52:54:00:00:00:01");
    }

    #[test]
    fn vhost_is_for_taps_without_limits_and_off_by_default() {
        let read = |text: &str| text.parse::<NetConfig>().unwrap();
        assert_eq!(read("tap=t0").vhost, Vhost::Off);
        assert!(read("tap=t0,vhost=on").validate().is_ok() && read("tap=t0,vhost=on").can_use_vhost());
        for other in ["user", "tap=t0,iops=1", "tap=t0,bandwidth=1M"] {
            let with = |word: &str| read(&format!("{other},vhost={word}"));
            assert!(matches!(with("on").validate(), Err(ConfigError::NetVhost)), "{other}");
            assert!(with("auto").validate().is_ok() && !with("auto").can_use_vhost(), "{other}");
            assert!(with("off").validate().is_ok(), "{other}");
        }
        assert!(matches!("tap=t0,vhost=yes".parse::<NetConfig>(), Err(ParseNetError::Vhost(_))));
        let json: NetConfig = serde_json::from_str(r#"{"backend": {"tap": "t0"}, "vhost": "auto"}"#).unwrap();
        assert_eq!(json.vhost, Vhost::Auto);
    }

    #[test]
    fn json_takes_the_flags_text() {
        let json: NetConfig =
            serde_json::from_str("\"tap=t0,mac=02:00:00:00:00:01,vhost=auto,iops=10,bandwidth=1M\"").unwrap();
        let text = serde_json::to_string(&json).unwrap();
        assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), json);
        let user: NetConfig = serde_json::from_str("\"user,host-loopback\"").unwrap();
        assert!(user.host_loopback && !json.host_loopback);
        assert_eq!(serde_json::from_str::<NetConfig>(&serde_json::to_string(&user).unwrap()).unwrap(), user);
    }

    #[test]
    fn ports_are_published_with_address_and_protocol() {
        let read = |text: &str| text.parse::<Publish>().map(|p| p.to_string()).ok();
        assert_eq!(read("8080:80").as_deref(), Some("8080:80/tcp"));
        assert_eq!(read("127.0.0.1:53:53/udp").as_deref(), Some("127.0.0.1:53:53/udp"));
        assert_eq!(read("[::1]:8080:80").as_deref(), Some("[::1]:8080:80/tcp"));
        for bad in
            ["", "80", "0:80", "80:0", "80:65536", "+80:80", "::1:80:80", "80:80/sctp", "a:80:80", "80:80/"]
        {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_port_is_published_once() {
        let collide = |a: &str, b: &str| a.parse::<Publish>().unwrap().collides(&b.parse().unwrap());
        assert!(collide("80:1", "80:2") && collide("127.0.0.1:80:1", "80:2") && collide("[::]:80:1", "80:2"));
        assert!(!collide("80:1", "81:1") && !collide("80:1", "80:1/udp"));
        assert!(!collide("127.0.0.1:80:1", "127.0.0.2:80:1"));
    }

    proptest! {
        #[test]
        fn never_panics(text in ".*") {
            let _ = (text.parse::<NetConfig>().is_ok(), text.parse::<Publish>().is_ok(), text.parse::<Mac>().is_ok());
        }
    }
}
