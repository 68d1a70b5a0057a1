//! What a VM is made of: plain data, read from flags or from JSON, checked by [`VmConfig::validate`].
//!
//! Nothing here opens a file or knows a KVM type.

mod balloon;
mod console;
mod disk;
mod memory;
mod name;
mod net;
mod share;
mod size;
mod vsock;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use balloon::{BalloonConfig, ParseBalloonError};
pub use console::HostEnd;
pub use disk::{DiskConfig, DiskEngine, MAX_DISK_ID, MAX_PIECES, ParseDiskError};
pub use memory::{Backing, HugePages, MemoryConfig};
pub use name::is_name;
pub use net::{
    Mac, NetBackend, NetConfig, PRIVATE, ParseMacError, ParseNetError, ParsePublishError, PrivateNetwork,
    Protocol, Publish, Vhost,
};
pub use share::{MAX_TAG, ParseShareError, ShareConfig};
pub use size::{ParseSizeError, Size};
pub use vsock::{MAX_SOCKET_PATH, ParseVsockError, VsockConfig};

/// The most vCPUs a VM may have.
pub const MAX_CPUS: u32 = 32;

/// The longest kernel command line in bytes, without its NUL: Linux's `COMMAND_LINE_SIZE` on x86 is 2048 with it.
pub const MAX_CMDLINE: usize = 2047;

/// A whole VM. The JSON of `--config` and `--print-config` is this type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What the VM is called on this host; made up where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where the VM is controlled.
    #[serde(default, skip_serializing_if = "Control::is_auto")]
    pub control: Control,
    /// What is booted.
    pub kernel: KernelConfig,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Guest memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// Where the guest's first serial port (COM1) goes; see [`VmConfig::serial_end`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<HostEnd>,
    /// Where its virtio console (hvc0) goes; see [`VmConfig::console_end`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<HostEnd>,
    /// The VM is stopped after this long, as in `"30s"`.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "duration_text")]
    pub timeout: Option<Duration>,
    /// I/O port on which the guest chooses the exit status of `microvm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code_port: Option<u16>,
    /// Give the guest a source of random numbers (virtio-rng).
    #[serde(default = "default_rng")]
    pub rng: bool,
    /// Its disks, in the order in which the guest finds them: `vda`, `vdb`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// The first disk holds the root file system.
    #[serde(default)]
    pub root: bool,
    /// A memory balloon, by which the host gets memory back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Sockets between guest and host (virtio-vsock).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Network cards, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
    /// The host's ports that lead to the guest, through its first card in user mode.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// Folders of the host's that the guest may mount.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
    /// How the guest finds its virtio devices.
    #[serde(default)]
    pub discovery: Discovery,
    /// Give the guest an i8254 timer. Closing a VM that has one takes KVM tens of milliseconds longer.
    #[serde(default)]
    pub pit: bool,
    /// Whether the process ends before KVM has closed the VM.
    #[serde(default, skip_serializing_if = "Close::is_background")]
    pub close: Close,
    /// Go on where `/dev/kvm` interprets the guest kernel in software.
    #[serde(default)]
    pub allow_software_kvm: bool,
    /// How this process is confined while the guest runs.
    #[serde(default)]
    pub sandbox: Sandbox,
}

/// The kernel, its initramfs and its command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// An uncompressed ELF `vmlinux` or a `bzImage`.
    pub path: PathBuf,
    /// The initramfs (or initrd).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Replaces the default command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Added at the end of the default command line, or of `cmdline`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
    /// How kernel and initramfs come into guest memory.
    #[serde(default)]
    pub load: Load,
}

/// How kernel and initramfs come into guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Load {
    /// Copied where the host has huge pages for all memory, else mapped.
    #[default]
    Auto,
    /// Mapped privately: nothing is read at start, and VMs share what they do not write.
    Map,
    /// Copied. Where the host has huge pages, the guest then takes a fault for 512 pages instead of one for each,
    /// which is faster to boot than the copying is slow.
    Copy,
}

/// How the guest finds its virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Discovery {
    /// In the ACPI tables, as distributions' kernels do.
    #[default]
    Acpi,
    /// On the kernel's command line (`virtio_mmio.device=`), for kernels with `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES` whose
    /// ACPI does not work, as that of Linux 6.1 without PCI.
    Cmdline,
}

/// When the process of a VM ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Close {
    /// At once; the kernel closes the VM some 20 ms later.
    #[default]
    Background,
    /// When the VM is closed. Until then its control group is in use, which who removes that right after the process's
    /// end must know.
    Wait,
}

impl Close {
    fn is_background(&self) -> bool {
        *self == Self::Background
    }
}

/// How the process is confined before the guest's first instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    /// By every layer that the host has; a warning names what it lacks.
    #[default]
    On,
    /// By every layer, or the VM does not start.
    Strict,
    /// Not at all: for debuggers.
    Off,
}

/// Where a running VM is controlled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// A socket in the user's run-time folder, in a folder of the VM's name: `microvm ps` finds it there.
    #[default]
    Auto,
    /// Nowhere.
    None,
    /// A socket at this path.
    Path(PathBuf),
}

impl Control {
    fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Path(path) => Some(path),
            Self::Auto | Self::None => None,
        }
    }

    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// What is wrong with a configuration that was read without error.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A name that does not fit a path.
    #[error(
        "--name {0:?}: a name is 1 to {max} letters, digits, _, - and ., and starts with a letter or a digit",
        max = name::MAX_NAME
    )]
    Name(String),
    /// Zero or too many vCPUs.
    #[error("--cpus {0}: a VM has 1 to {MAX_CPUS} vCPUs")]
    Cpus(u32),
    /// Too little memory to hold any kernel.
    #[error("--memory {0}: a VM needs at least {min}", min = memory::MIN_SIZE)]
    MemoryTooSmall(Size),
    /// More than an x86 guest of ours can address.
    #[error("--memory {0}: a VM has at most {max}", max = memory::MAX_SIZE)]
    MemoryTooLarge(Size),
    /// Not whole pages.
    #[error("--memory {0}: must be a multiple of {1}")]
    MemoryUnaligned(Size, Size),
    /// A balloon that leaves the guest nothing.
    #[error("--balloon {0}: must be smaller than the guest's memory of {1}")]
    BalloonTooLarge(Size, Size),
    /// A path that names nothing.
    #[error("{0} is an empty path: give one, or leave it out")]
    EmptyPath(&'static str),
    /// Two consoles on one terminal.
    #[error(
        "--console stdio: the serial port has standard input and output: leave --serial stdio out, or give one of them \
         null or file=PATH"
    )]
    TwoOnStdio,
    /// Two consoles in one file.
    #[error("--console file={0}: the serial port prints into the same file: give another path")]
    TwoInFile(PathBuf),
    /// The command line does not fit the kernel's buffer.
    #[error(
        "the kernel command line has {0} bytes, and Linux takes {MAX_CMDLINE}: shorten --append or --cmdline"
    )]
    CmdlineTooLong(usize),
    /// A NUL or control byte would cut the line short.
    #[error(
        "the kernel command line has a control character at byte {0}: take it out of --append or --cmdline"
    )]
    CmdlineControl(usize),
    /// A CID that is not a guest's.
    #[error(
        "--vsock cid={0}: the CIDs 0, 1, 2 and 4294967295 are reserved (hypervisor, guest itself, host, any): choose \
         one from 3 on"
    )]
    VsockCid(u32),
    /// Longer than a Unix socket's address.
    #[error(
        "--vsock socket={path}: the path has {1} bytes, and at most {MAX_SOCKET_PATH} leave room for _PORT in a \
         socket's address: choose a shorter one",
        path = .0.display()
    )]
    VsockPath(PathBuf, usize),
    /// A zero timeout would stop the VM before it starts.
    #[error("--timeout 0s: give the guest some time, or leave the flag out for no limit")]
    ZeroTimeout,
    /// A disk's name.
    #[error(
        "--disk {path} id={id:?}: a name has 1 to {MAX_DISK_ID} letters, digits, dots, dashes and underscores"
    )]
    DiskId {
        /// The disk.
        path: PathBuf,
        /// Its name.
        id: String,
    },
    /// Two disks of one name.
    #[error("--disk {path}: another disk has the name {id}: give it one of its own (id=NAME)")]
    DiskTwice {
        /// The second disk.
        path: PathBuf,
        /// The name.
        id: String,
    },
    /// A disk of several files that could be written.
    #[error("--disk {0}: a disk of several files can be read alone: set readonly, or leave more out")]
    DiskPiecesWritable(PathBuf),
    /// A disk of too many files.
    #[error("--disk {path}: {pieces} files in one disk: the most is {MAX_PIECES}")]
    DiskPieces {
        /// Its first file.
        path: PathBuf,
        /// How many there are.
        pieces: usize,
    },
    /// A limit that lets nothing through.
    #[error(
        "--disk {path} {option}=0: nothing would ever be read; allowed is 1 or more, or leave it out for no limit"
    )]
    DiskLimit {
        /// The disk.
        path: PathBuf,
        /// The limit.
        option: &'static str,
    },
    /// A tag that does not fit the device's configuration or a path.
    #[error(
        "--share {path} tag={tag:?}: a tag has 1 to {max} letters, digits, dots, dashes and underscores",
        max = share::MAX_TAG
    )]
    ShareTag {
        /// The folder.
        path: PathBuf,
        /// The tag.
        tag: String,
    },
    /// Two shares of one tag.
    #[error("--share {path}: another share has the tag {tag}: give it one of its own (tag=TAG)")]
    ShareTwice {
        /// The second folder.
        path: PathBuf,
        /// The tag.
        tag: String,
    },
    /// No owner has this id.
    #[error("--share {path}: uid and gid are numbers from 0 to 4294967294")]
    ShareId {
        /// The folder.
        path: PathBuf,
    },
    /// Each has threads of its own.
    #[error(
        "--share: {0} shares, and a VM has at most {max}: share a folder above some of them",
        max = share::MAX_SHARES
    )]
    TooManyShares(usize),
    /// A root file system on no disk.
    #[error("--root: the VM has no disk: give one with --disk PATH, or leave the flag out")]
    RootWithoutDisk,
    /// No interface of Linux has such a name.
    #[error("--net tap={0}: an interface's name has 1 to 15 bytes, without spaces, '/' and ':'")]
    TapName(String),
    /// A tap has one user.
    #[error("--net tap={0} is there twice: give each network card a tap of its own")]
    TapTwice(String),
    /// Two cards of one address on one network.
    #[error("--net mac={0} is there twice: give each network card an address of its own")]
    MacTwice(Mac),
    /// Nothing would ever pass.
    #[error("--net iops=0 or bandwidth=0: give the card something, or leave the limit out")]
    NetLimit,
    /// A tap leads where its host says.
    #[error(
        "--net tap={0},{1}: only user mode has this option: addresses, routes and a firewall say what a tap leads to"
    )]
    NetUserOption(String, &'static str),
    /// The kernel's worker knows neither passt nor limits.
    #[error(
        "--net vhost=on: it is for taps without iops=N and bandwidth=SIZE, which the host's kernel does not know: use \
         vhost=off"
    )]
    NetVhost,
    /// A port leads to nobody.
    #[error("--publish {0}: only a network card in user mode has ports of the host's: add --net user")]
    PublishWithoutUser(Publish),
    /// A port leads to two places.
    #[error("--publish {0}: this port of the host's is published twice: choose another")]
    PublishTwice(Publish),
    /// The kernel's timers count nanoseconds in 63 bits.
    #[error("--timeout is longer than a year: leave the flag out for no limit")]
    LongTimeout,
}

/// The longest `--timeout`: far below what a timer of the kernel's can count.
const MAX_TIMEOUT: Duration = Duration::from_secs(366 * 24 * 3600);

impl VmConfig {
    /// A VM with the default of everything but its kernel.
    #[must_use]
    pub fn new(kernel: PathBuf) -> Self {
        Self {
            name: None,
            control: Control::Auto,
            kernel: KernelConfig {
                path: kernel,
                initrd: None,
                cmdline: None,
                append: String::new(),
                load: Load::Auto,
            },
            cpus: default_cpus(),
            memory: MemoryConfig::default(),
            serial: None,
            console: None,
            timeout: None,
            exit_code_port: None,
            rng: default_rng(),
            disks: Vec::new(),
            root: false,
            balloon: None,
            vsock: None,
            nets: Vec::new(),
            publish: Vec::new(),
            shares: Vec::new(),
            discovery: Discovery::default(),
            pit: false,
            allow_software_kvm: false,
            close: Close::default(),
            sandbox: Sandbox::default(),
        }
    }

    /// Checks everything that can be checked without the host.
    ///
    /// # Errors
    /// The first field that is out of its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(name) = self.name.as_ref().filter(|n| !is_name(n)) {
            return Err(ConfigError::Name(name.clone()));
        }
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.timeout == Some(Duration::ZERO) {
            return Err(ConfigError::ZeroTimeout);
        }
        if self.timeout.is_some_and(|t| t > MAX_TIMEOUT) {
            return Err(ConfigError::LongTimeout);
        }
        let paths = [
            ("--kernel (kernel.path in a --config)", Some(&self.kernel.path)),
            ("--initrd (kernel.initrd in a --config)", self.kernel.initrd.as_ref()),
            ("--serial file=PATH (serial.file in a --config)", self.serial.as_ref().and_then(HostEnd::path)),
            (
                "--console file=PATH (console.file in a --config)",
                self.console.as_ref().and_then(HostEnd::path),
            ),
            ("--control PATH (control.path in a --config)", self.control.path()),
        ];
        if let Some((name, _)) = paths.iter().find(|(_, p)| p.is_some_and(|p| p.as_os_str().is_empty())) {
            return Err(ConfigError::EmptyPath(name));
        }
        for text in [self.kernel.cmdline.as_deref().unwrap_or_default(), &self.kernel.append] {
            check_cmdline(text)?;
        }
        self.validate_consoles()?;
        disk::validate(&self.disks, self.root)?;
        self.validate_nets()?;
        share::validate(&self.shares)?;
        self.memory.validate()?;
        if let Some(balloon) = self.balloon.as_ref().filter(|b| b.size >= self.memory.size) {
            return Err(ConfigError::BalloonTooLarge(balloon.size, self.memory.size));
        }
        self.vsock.as_ref().map_or(Ok(()), VsockConfig::validate)
    }

    fn validate_nets(&self) -> Result<(), ConfigError> {
        for (i, net) in self.nets.iter().enumerate() {
            net.validate()?;
            let before = &self.nets[..i];
            if let NetBackend::Tap(name) = &net.backend
                && before.iter().any(|b| b.backend == net.backend)
            {
                return Err(ConfigError::TapTwice(name.clone()));
            }
            if let Some(mac) = net.mac
                && before.iter().any(|b| b.mac == net.mac)
            {
                return Err(ConfigError::MacTwice(mac));
            }
        }
        for (i, publish) in self.publish.iter().enumerate() {
            if self.publish[..i].iter().any(|before| before.collides(publish)) {
                return Err(ConfigError::PublishTwice(*publish));
            }
        }
        match self.publish.first() {
            Some(publish) if !self.nets.iter().any(|n| n.backend == NetBackend::User) => {
                Err(ConfigError::PublishWithoutUser(*publish))
            }
            _ => Ok(()),
        }
    }
}

/// Checks a whole kernel command line, or a part of one.
///
/// # Errors
/// Too long, or a control character.
pub fn check_cmdline(text: &str) -> Result<(), ConfigError> {
    if text.len() > MAX_CMDLINE {
        return Err(ConfigError::CmdlineTooLong(text.len()));
    }
    match text.bytes().position(|b| b.is_ascii_control() && b != b'\t') {
        Some(at) => Err(ConfigError::CmdlineControl(at)),
        None => Ok(()),
    }
}

fn default_cpus() -> u32 {
    1
}

fn default_rng() -> bool {
    true
}

/// A duration as people write it: `"1m 30s"`.
mod duration_text {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(d) => s.collect_str(&humantime::format_duration(*d)),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
        let text: Option<String> = Option::deserialize(d)?;
        text.map(|t| {
            humantime::parse_duration(&t).map_err(|e| D::Error::custom(format!("timeout {t:?}: {e}")))
        })
        .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig::new("vmlinux".into())
    }

    #[test]
    fn json_round_trip_keeps_everything() {
        let mut c = config();
        c.kernel.append = "loglevel=7".into();
        c.timeout = Some(Duration::from_millis(1500));
        c.serial = Some(HostEnd::File("out.log".into()));
        c.console = Some(HostEnd::Stdio);
        c.name = Some("web-1".into());
        c.control = Control::Path("vm.sock".into());
        c.vsock = Some(VsockConfig { cid: 3, socket: "v.sock".into() });
        c.nets = vec!["tap=tap0,mac=02:00:00:00:00:01".parse().unwrap(), "user".parse().unwrap()];
        c.publish = vec!["127.0.0.1:8080:80".parse().unwrap(), "53:53/udp".parse().unwrap()];
        c.memory = "1G,hugepages=2M,backing=memfd".parse().unwrap();
        c.sandbox = Sandbox::Strict;
        c.disks = vec![DiskConfig::new("root.img".into())];
        c.root = true;
        c.shares = vec![ShareConfig::new("/srv".into(), "srv".into())];
        let text = serde_json::to_string(&c).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), c);
    }

    #[test]
    fn a_balloon_is_smaller_than_the_memory() {
        for (size, good) in [("0", true), ("255M", true), ("256M", false), ("1T", false)] {
            let c = VmConfig { balloon: Some(size.parse().unwrap()), ..config() };
            assert_eq!(c.validate().is_ok(), good, "{size}");
        }
    }

    #[test]
    fn json_takes_the_short_form() {
        let c: VmConfig = serde_json::from_str(r#"{"kernel": {"path": "vmlinux"}}"#).unwrap();
        assert_eq!(c, config());
    }

    #[test]
    fn json_names_an_unknown_field() {
        let error = serde_json::from_str::<VmConfig>(r#"{"kernel": {"path": "v"}, "cpu": 1}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `cpu`"), "{error}");
    }

    #[test]
    fn cpus_are_1_to_32() {
        for (cpus, good) in [(0, false), (1, true), (32, true), (33, false), (1025, false)] {
            assert_eq!(VmConfig { cpus, ..config() }.validate().is_ok(), good, "{cpus}");
        }
    }

    #[test]
    fn a_line_break_in_the_command_line_is_refused() {
        let mut c = config();
        c.kernel.append = "quiet\nroot=/dev/vda".into();
        assert!(matches!(c.validate(), Err(ConfigError::CmdlineControl(5))));
    }

    #[test]
    fn the_command_line_has_a_limit() {
        let mut c = config();
        c.kernel.cmdline = Some("x".repeat(MAX_CMDLINE));
        assert!(c.validate().is_ok());
        c.kernel.cmdline = Some("x".repeat(MAX_CMDLINE + 1));
        assert!(matches!(c.validate(), Err(ConfigError::CmdlineTooLong(_))));
    }
}
