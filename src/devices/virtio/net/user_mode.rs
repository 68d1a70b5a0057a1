//! The programs of user mode: `passt` for the card of a guest, `pasta` for a name space of this host's kernel.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;

use crate::config::{NetConfig, PRIVATE, PrivateNetwork, Protocol, Publish};
use crate::sys::confinement;

/// passt is ready within milliseconds.
const READY_BOUND: Duration = Duration::from_secs(10);
/// Where the guest asks for names instead of at the host's loopback address, with a passt later than Debian 12's. A
/// link-local address, which no route leads to.
const NAME_SERVER: &str = "169.254.1.1";

/// User mode cannot be had.
#[derive(Debug, Error)]
pub enum PasstError {
    /// It is not installed.
    #[error("--net user: there is no passt on this host: install it (sudo apt-get install passt)")]
    Missing,
    /// It cannot be run.
    #[error("--net user: passt cannot be started")]
    Start(#[source] io::Error),
    /// It has nowhere to lead to.
    #[error(
        "--net user: passt finds no interface with a default route, whose address it gives to the guest: connect this \
         host, or use --net tap=NAME"
    )]
    NoRoute,
    /// It hangs.
    #[error(
        "--net user: passt was not ready after {READY_BOUND:?}: see what it says by itself (passt --foreground)"
    )]
    Slow,
    /// It ended.
    #[error("--net user: passt ended at once: {0}")]
    Ended(String),
    /// The port is taken, or not ours.
    #[error("--publish {0}: the host's port cannot be had: choose another, or see who has it (ss -lntup)")]
    Port(Publish, #[source] io::Error),
}

/// passt goes on without a port that it cannot have, so that is found out here.
fn check_port(publish: &Publish) -> Result<(), PasstError> {
    let bind = |socket: SocketAddr| match publish.protocol {
        Protocol::Tcp => TcpListener::bind(socket).map(drop),
        Protocol::Udp => UdpSocket::bind(socket).map(drop),
    };
    let mut result = bind(publish.socket());
    if result.is_ok() && publish.address.is_none() {
        // All addresses are those of IPv6, too. A host without it fails otherwise.
        let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, publish.host));
        result = bind(all).or_else(|e| if e.kind() == io::ErrorKind::AddrInUse { Err(e) } else { Ok(()) });
    }
    result.map_err(|e| PasstError::Port(*publish, e))
}

/// Runs passt, which goes to the background once it is ready, and ends when the other end of `socket` is closed: with
/// the VM, however that ends.
///
/// # Errors
/// It is not there, or a port is taken.
pub fn start_passt(socket: &UnixStream, publish: &[Publish], net: &NetConfig) -> Result<(), PasstError> {
    let mut command = command("passt", publish, net)?;
    rustix::io::fcntl_setfd(socket, FdFlags::empty()).map_err(|e| PasstError::Start(e.into()))?;
    command.args(["--one-off", "--fd"]).arg(socket.as_raw_fd().to_string());
    run(command)
}

/// Runs pasta, which connects the network name space at `namespace` and goes to the background once that is set up. It ends
/// with the PID name space that this process is in. Only for root.
///
/// # Errors
/// It is not there, or a port is taken.
pub fn start_pasta(namespace: &Path, publish: &[Publish], net: &NetConfig) -> Result<(), PasstError> {
    let mut command = command("pasta", publish, net)?;
    command.args(["--config-net", "--ns-ifname", "eth0"]);
    // It forwards what listens, in both directions, where nothing is said.
    command.args(["--tcp-ns", "none", "--udp-ns", "none"]);
    for (protocol, flag) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        if !publish.iter().any(|publish| publish.protocol == protocol) {
            command.args([flag, "none"]);
        }
    }
    if let Some(mac) = net.mac {
        command.arg("--ns-mac-addr").arg(mac.to_string());
    }
    // As nobody it may not enter a name space of root's. It gives most capabilities up once it is set up (docs/run.md).
    command.args(["--runas", "0", "--netns"]).arg(namespace);
    run(command)
}

/// What both programs are told.
fn command(program: &str, publish: &[Publish], net: &NetConfig) -> Result<Command, PasstError> {
    publish.iter().try_for_each(check_port)?;
    // It reads what the guest sends, so it gets nothing of what our caller has left open or told us: where programs are,
    // and the descriptors that it is given.
    if let Err(e) = confinement::close_all_on_exec() {
        log::debug!("{program} inherits what this program was started with: {e}");
    }
    let mut command = Command::new(program);
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command.arg("--quiet").args(publish.iter().flat_map(forward));
    if net.private {
        let PrivateNetwork { guest, router, prefix } = PRIVATE;
        let flags = [
            ("--address", guest.to_string()),
            ("--netmask", prefix.to_string()),
            ("--gateway", router.to_string()),
        ];
        command.args(flags.iter().flat_map(|(flag, value)| [*flag, value]));
    }
    if !net.host_loopback {
        command.arg("--no-map-gw").args(names());
    }
    Ok(command)
}

fn run(mut command: Command) -> Result<(), PasstError> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => PasstError::Missing,
        _ => PasstError::Start(e),
    })?;
    if !is_over_soon(&child).map_err(PasstError::Start)? {
        let _ = child.kill().and_then(|()| child.wait());
        return Err(PasstError::Slow);
    }
    let output = child.wait_with_output().map_err(PasstError::Start)?;
    if output.status.success() {
        return Ok(());
    }
    Err(why(&String::from_utf8_lossy(&output.stderr)))
}

/// What user mode cannot do without, where this host lacks it: the reason, and what to do.
#[must_use]
pub fn user_mode_lacks() -> Option<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|folder| folder.join("passt").is_file()) {
        return Some("there is no passt on this host (sudo apt-get install passt)");
    }
    // Interface, destination, ... in hexadecimal (proc_net(5)).
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let has_default = routes.lines().any(|line| line.split_whitespace().nth(1) == Some("00000000"));
    (!has_default).then_some("this host has no default route")
}

/// Whom a guest in user mode asks for names: the host's name servers, as far as they can be reached from there.
#[must_use]
pub fn guest_name_servers() -> Vec<Ipv4Addr> {
    let servers = host_name_servers();
    if servers.is_empty() { NAME_SERVER.parse().into_iter().collect() } else { servers }
}

/// The host's that are not on its loopback address; systemd-resolved, which puts itself there, says whom it asks.
fn host_name_servers() -> Vec<Ipv4Addr> {
    let own = outside_servers("/etc/resolv.conf");
    if own.is_empty() { outside_servers("/run/systemd/resolve/resolv.conf") } else { own }
}

fn outside_servers(path: &str) -> Vec<Ipv4Addr> {
    let file = std::fs::read_to_string(path).unwrap_or_default();
    name_servers(&file).into_iter().filter(|server| !server.is_loopback()).collect()
}

/// passt's flags for name servers. Those of `resolv.conf` it finds itself, but for those on the loopback address, which
/// it keeps the guest from. systemd-resolved, which puts itself there, says whom it asks.
fn names() -> Vec<String> {
    if !outside_servers("/etc/resolv.conf").is_empty() {
        return Vec::new();
    }
    let flags: Vec<_> = host_name_servers().iter().flat_map(|s| ["--dns".into(), s.to_string()]).collect();
    // passt of Debian 12 answers under this address for every name server, so not beside others.
    if flags.is_empty() { vec!["--dns-forward".into(), NAME_SERVER.into()] } else { flags }
}

/// The IPv4 addresses among the name servers of a `resolv.conf(5)`, at most as many as are ever asked (`MAXNS`).
fn name_servers(file: &str) -> Vec<Ipv4Addr> {
    let mut words = file.lines().map(str::split_whitespace);
    let servers =
        words.by_ref().filter_map(|mut line| (line.next()? == "nameserver").then(|| line.next()).flatten());
    servers.filter_map(|address| address.parse().ok()).take(3).collect()
}

/// Waits until it has ended, or gone to the background.
fn is_over_soon(child: &Child) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let bound = Timespec { tv_sec: READY_BOUND.as_secs() as i64, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&bound))? > 0)
}

fn why(stderr: &str) -> PasstError {
    let words = last_words(stderr);
    if words.contains("xternal interface") { PasstError::NoRoute } else { PasstError::Ended(words) }
}

/// The last line that says something; passt complains of a missing system log between all others.
fn last_words(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).rev();
    let line = lines.find(|line| !line.is_empty() && !line.starts_with("Failed to send"));
    line.unwrap_or("it does not say why").into()
}

/// passt's flag for a published port.
fn forward(publish: &Publish) -> [String; 2] {
    let flag = match publish.protocol {
        Protocol::Tcp => "--tcp-ports",
        Protocol::Udp => "--udp-ports",
    };
    let address = publish.address.map_or_else(String::new, |address| format!("{address}/"));
    [flag.into(), format!("{address}{}:{}", publish.host, publish.guest)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_in_passts_words() {
        let flags = |text: &str| forward(&text.parse().unwrap());
        assert_eq!(flags("8080:80"), ["--tcp-ports", "8080:80"]);
        assert_eq!(flags("127.0.0.1:53:5353/udp"), ["--udp-ports", "127.0.0.1/53:5353"]);
    }

    #[test]
    fn a_host_without_a_route_is_told() {
        assert!(matches!(why("External interface not usable\n"), PasstError::NoRoute));
        assert!(matches!(why("no memory\n"), PasstError::Ended(words) if words == "no memory"));
    }

    #[test]
    fn name_servers_are_those_of_resolv_conf() {
        let file = "# nameserver 1.1.1.1\nsearch x\nnameserver 127.0.0.53\n nameserver\t10.0.0.1 # mine\nnameserver ::1\nnameserver\n";
        assert_eq!(name_servers(file), [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(10, 0, 0, 1)]);
        assert!(name_servers(&"nameserver 10.0.0.1\n".repeat(100)).len() == 3);
    }

    #[test]
    fn what_passt_says_of_its_log_is_left_out() {
        assert_eq!(
            last_words("Failed to send 3 bytes to syslog\nbad thing\nFailed to send 9\n\n"),
            "bad thing"
        );
    }
}
