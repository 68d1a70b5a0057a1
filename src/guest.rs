//! What a guest that runs a container is told by its host: one JSON file in its initramfs, which `microvm-init` reads.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Where the file is in the initramfs. Without it `microvm-init` runs what the kernel's command line says.
pub const SPEC_PATH: &str = "/microvm.json";

/// A container: its root file system, its surroundings and its program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    /// The ids of the disks with its layers, the lowest first. At least one.
    pub layers: Vec<String>,
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
    /// The program.
    pub process: ProcessSpec,
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
}

fn root() -> String {
    "/".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_file_will_do() {
        let text = r#"{"layers": ["layer0"], "hostname": "h", "process": {"args": ["sh"]}}"#;
        let spec: GuestSpec = serde_json::from_str(text).unwrap();
        assert_eq!((spec.process.cwd.as_str(), spec.process.user.as_str(), spec.read_only), ("/", "", false));
        assert_eq!(serde_json::from_str::<GuestSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
        assert!(serde_json::from_str::<GuestSpec>(&text.replace("hostname", "host")).is_err());
    }
}
