//! What a guest that runs a container is told by its host: one JSON file in its initramfs, which `microvm-init` reads, and
//! what the two say to each other while it runs ([`wire`]).

pub mod archive;
pub mod copy;
pub mod status;
pub mod users;
pub mod wire;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::sys::terminal;

/// Where the file is in the initramfs. Without it `microvm-init` runs what the kernel's command line says.
pub const SPEC_PATH: &str = "/microvm.json";

/// The id of the disk with a container's layers.
pub const LAYERS_DISK: &str = "layers";

/// A container: its root file system, its surroundings and its program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    /// How many bytes each of its layers has, the lowest first, at least one: they stand one behind the other, from the
    /// beginning of disk [`LAYERS_DISK`], and the guest makes a partition of each.
    pub layers: Vec<u64>,
    /// The id of the disk that takes what is written, an ext4 file system; memory does where there is none.
    #[serde(default)]
    pub storage: Option<String>,
    /// Nothing can be written to its root file system.
    #[serde(default)]
    pub read_only: bool,
    /// The machine's name.
    pub hostname: String,
    /// How it reaches the world; not at all where there is none.
    #[serde(default)]
    pub network: Option<NetworkSpec>,
    /// The host waits for the program's streams, and may want more programs run (see [`wire`]). Else the program has the
    /// console.
    #[serde(default)]
    pub agent: bool,
    /// Folders of the host's, mounted over the root file system.
    #[serde(default)]
    pub mounts: Vec<MountSpec>,
    /// The program.
    pub process: ProcessSpec,
}

/// A folder or a file that the host shares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountSpec {
    /// The device's tag.
    pub tag: String,
    /// Where it is mounted: an absolute path, whose folders are made where they are not there.
    pub path: String,
    /// Nothing can be written to it. The host enforces it on its own.
    #[serde(default)]
    pub read_only: bool,
    /// The share is this one file, which lies over `path`.
    #[serde(default)]
    pub file: Option<String>,
    /// It is new and empty: what the image has at `path` is copied into it first.
    #[serde(default)]
    pub fill: bool,
}

/// The first network card's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// The card's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, 0 to 32 bits.
    pub prefix: u8,
    /// Where everything else is sent.
    pub gateway: Option<Ipv4Addr>,
    /// What `resolv.conf` says.
    #[serde(default)]
    pub name_servers: Vec<Ipv4Addr>,
}

/// A program and how it is started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessSpec {
    /// The program, looked up in the `PATH` of `env`, and its arguments.
    pub args: Vec<String>,
    /// Its environment, as `NAME=VALUE`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Its working folder, which is made where it is not there.
    #[serde(default = "root")]
    pub cwd: String,
    /// `USER[:GROUP]`, each a name or a number; empty: root.
    #[serde(default)]
    pub user: String,
    /// It has a terminal, and its errors come out with the rest.
    #[serde(default)]
    pub terminal: bool,
    /// It has input; else it finds the end of it.
    #[serde(default)]
    pub input: bool,
    /// The terminal's size at first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<TerminalSize>,
}

/// What `/etc/hosts` says in a container of this name and address.
#[must_use]
pub fn hosts(hostname: &str, address: Option<Ipv4Addr>) -> String {
    let own = address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
    format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}\t{hostname}\n")
}

/// What `/etc/resolv.conf` says in a container with this network.
#[must_use]
pub fn resolv_conf(network: Option<&NetworkSpec>) -> String {
    network.iter().flat_map(|n| &n.name_servers).map(|server| format!("nameserver {server}\n")).collect()
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// How wide it is.
    pub columns: u16,
    /// How high it is.
    pub rows: u16,
}

impl TerminalSize {
    /// That of this process's terminal, where it has one that says.
    #[must_use]
    pub fn here() -> Option<Self> {
        terminal::size().map(|(columns, rows)| Self { columns, rows })
    }
}

impl GuestSpec {
    /// An initramfs with this description, and with `init` as process 1 where that is given. It can stand behind another
    /// one: Linux unpacks one after the other (Documentation/driver-api/early-userspace/buffer-format.rst). Its length is
    /// a multiple of four, as the other's has to be.
    #[must_use]
    pub fn to_initramfs(&self, init: Option<&[u8]>) -> Vec<u8> {
        let text = serde_json::to_vec(self).unwrap_or_else(|_| unreachable!("its keys are strings"));
        let mut archive = Archive(Vec::new());
        if let Some(init) = init {
            for folder in ["dev", "proc", "sys", "tmp"] {
                archive.add(folder, 0o040_755, (0, 0), &[]);
            }
            // The kernel opens it for process 1, before there is a devtmpfs.
            archive.add("dev/console", 0o020_600, (5, 1), &[]);
            // Where there is no console, process 1 begins without streams, and Rust puts this in their place.
            archive.add("dev/null", 0o020_666, (1, 3), &[]);
            archive.add("init", 0o100_755, (0, 0), init);
        }
        archive.add(SPEC_PATH.trim_start_matches('/'), 0o100_600, (0, 0), &text);
        archive.add("TRAILER!!!", 0, (0, 0), &[]);
        archive.0
    }
}

/// An archive of cpio's "newc" format.
struct Archive(Vec<u8>);

impl Archive {
    /// Adds a file: thirteen numbers of eight hexadecimal digits, name and contents, each filled up to four bytes.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        let (major, minor) = device;
        let len = contents.len() as u32;
        // Inode, mode, user, group, links, time, length, the file system's device and the node's own, length of the name
        // with its NUL, no checksum.
        let numbers = [0, mode, 0, 0, 1, 0, len, 0, 0, major, minor, name.len() as u32 + 1, 0];
        let head: String = numbers.iter().map(|n| format!("{n:08x}")).collect();
        self.0.extend_from_slice(format!("070701{head}{name}\0").as_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(contents);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

fn root() -> String {
    "/".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initramfs_is_what_cpio_reads() {
        let spec: GuestSpec =
            serde_json::from_str(r#"{"layers": [4096], "hostname": "h", "process": {"args": ["sh"]}}"#)
                .unwrap();
        let archive = spec.to_initramfs(None);
        assert_eq!(archive.len() % 4, 0);
        let dir = tempfile::tempdir().unwrap();
        let mut command = std::process::Command::new("cpio");
        command.args(["-i", "--quiet"]).current_dir(dir.path()).stdin(std::process::Stdio::piped());
        let Ok(mut child) = command.spawn() else { return eprintln!("no cpio here: not tested") };
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), &archive).unwrap();
        assert!(child.wait().unwrap().success());
        let text = std::fs::read(dir.path().join("microvm.json")).unwrap();
        assert_eq!(serde_json::from_slice::<GuestSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn a_short_file_will_do() {
        let text = r#"{"layers": [4096, 8192], "hostname": "h", "process": {"args": ["sh"]}}"#;
        let spec: GuestSpec = serde_json::from_str(text).unwrap();
        assert_eq!((spec.process.cwd.as_str(), spec.process.user.as_str(), spec.read_only), ("/", "", false));
        assert_eq!(serde_json::from_str::<GuestSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
        assert!(serde_json::from_str::<GuestSpec>(&text.replace("hostname", "host")).is_err());
        let mounts = r#""mounts": [{"tag": "src", "path": "/src"}], "hostname"#;
        let spec: GuestSpec = serde_json::from_str(&text.replace("\"hostname", mounts)).unwrap();
        assert_eq!(
            spec.mounts,
            [MountSpec { tag: "src".into(), path: "/src".into(), ..MountSpec::default() }]
        );
    }
}
