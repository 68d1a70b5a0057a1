//! `microvm boot`: flags to a [`VmConfig`].

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

use crate::config::{
    BalloonConfig, Close, Control as ControlConfig, Discovery, DiskConfig, HostEnd, Load, MemoryConfig,
    NetConfig, Publish, Sandbox, ShareConfig, VmConfig, VsockConfig,
};
use crate::control::{Control, Place};
use crate::kernels::{KernelError, KernelStore};
use crate::metrics::{Clock, MetricsFile, Phase, Registry, Timeline, TimelineFormat, write_timeline};
use crate::vmm::{self, End, Ended, Vmm};

use super::{CliError, chain, say};

const AFTER_HELP: &str = "Exit status:
  0        the guest switched itself off or rebooted
  1        the VM could not be set up
  2        wrong usage
  101      the guest's kernel panicked (told by its pvpanic driver)
  102      the guest triple-faulted, or KVM gave up on it
  124      --timeout passed
  128 + N  signal N ended microvm (130: Ctrl-A x, or SIGINT; 143: SIGTERM, or microvm ctl NAME stop)
  159      microvm made a system call that its sandbox forbids: it has a bug, or a guest broke out
  0-127    chosen by the guest through --exit-code-port

Keys, where standard input is a terminal:
  Ctrl-A x       leave, ending the VM
  Ctrl-A Ctrl-A  send Ctrl-A to the guest

Examples:
  microvm boot --kernel vmlinux --initrd initramfs.cpio
  microvm boot --kernel bzImage --initrd i.cpio --append 'loglevel=7 -- /bin/sh'
  microvm boot --kernel vmlinux --cpus 4 --memory 4G --serial file=console.log --timeout 1m
  microvm boot --kernel vmlinux --disk root.img --root --disk data.img,readonly
  microvm boot --kernel vmlinux --initrd initramfs.cpio --console stdio   # hvc0, as wide as the terminal
  microvm boot --kernel vmlinux --name web --metrics web.json      # and elsewhere: microvm ctl web pause
  microvm boot --kernel bzImage --initrd i.cpio --net user -p 8080:80
  microvm boot --kernel bzImage --initrd i.cpio --share src,tag=src,readonly    # mount -t virtiofs src /mnt
  microvm boot --kernel vmlinux --print-config > vm.json && microvm boot --config vm.json";

/// Far longer than any VM's configuration.
const MAX_CONFIG: u64 = 1 << 20;

/// Flags of `microvm boot`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct BootArgs {
    /// The kernel: an uncompressed ELF vmlinux, or a bzImage [default: the one of microvm kernel default]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// The initramfs
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// Add words to the kernel's command line (what follows ` -- ` goes to init)
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Option<String>,
    /// Replace the default command line of the kernel
    #[arg(long, value_name = "LINE", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// How kernel and initramfs come into guest memory: map shares their pages between VMs, copy boots faster where
    /// the host has huge pages, auto chooses copy there [default: auto]
    #[arg(long, value_name = "HOW", value_parser = parse_load)]
    load: Option<Load>,
    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Guest memory, as 512M or 4G, with ,hugepages=2M|1G and ,backing=anonymous|memfd behind it [default: 256M]
    #[arg(long, value_name = "SIZE[,OPTION…]")]
    memory: Option<MemoryConfig>,
    /// The first serial port: stdio, null (none at all), or file=PATH [default: stdio, or null with --console stdio]
    #[arg(long, value_name = "WHERE", value_parser = OsStringValueParser::new().try_map(|text| HostEnd::parse(&text)))]
    serial: Option<HostEnd>,
    /// A console that moves many bytes at once and knows the terminal's size (virtio-console, hvc0): stdio, null (none
    /// at all), or file=PATH. The kernel needs its driver built in, or an init that loads it [default: null]
    #[arg(long, value_name = "WHERE", value_parser = OsStringValueParser::new().try_map(|text| HostEnd::parse(&text)))]
    console: Option<HostEnd>,
    /// End the VM after this long, as 500ms, 30s or 2m
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    timeout: Option<Duration>,
    /// An I/O port on which the guest ends the VM with an exit status of 0 to 127, as 0xf4
    #[arg(long, value_name = "PORT", value_parser = parse_port)]
    exit_code_port: Option<u16>,
    /// A source of random numbers for the guest (virtio-rng): on or off [default: on]
    #[arg(long, value_name = "ON|OFF", value_parser = parse_switch)]
    rng: Option<bool>,
    /// A disk: a raw image or a block device; again for more. Behind it ,readonly ,id=ID ,direct
    /// ,engine=uring|threads ,iops=N and ,bandwidth=SIZE (see docs/devices.md)
    #[arg(long, value_name = "PATH[,OPTION…]", value_parser = OsStringValueParser::new().try_map(|text| DiskConfig::parse(&text)))]
    disk: Vec<DiskConfig>,
    /// The first disk is the guest's root file system: `root=/dev/vda rw` on the kernel's command line, or `ro` if it
    /// is read-only
    #[arg(long)]
    root: bool,
    /// A memory balloon of this size, which the guest fills with pages that the host gets back, as 64M or 0, with
    /// ,deflate-on-oom and ,free-page-reporting and ,stats=SECONDS behind it [default: none]
    #[arg(long, value_name = "SIZE[,OPTION…]")]
    balloon: Option<BalloonConfig>,
    /// Sockets between guest and host (virtio-vsock): the guest's CID (from 3 on) and the Unix socket to reach it by
    #[arg(long, value_name = "cid=N,socket=PATH",
        value_parser = OsStringValueParser::new().try_map(|text| VsockConfig::parse(&text)))]
    vsock: Option<VsockConfig>,
    /// A network card, on a tap or in user mode (without root, through passt); again for more. Options: mac=MAC, iops=N,
    /// bandwidth=SIZE; for a tap vhost=auto|on|off: the host's kernel serves its queues; and for user mode host-loopback: the
    /// router's address leads to servers on this host
    #[arg(long, value_name = "tap=NAME|user[,OPTION…]")]
    net: Vec<NetConfig>,
    /// Lead a port of the host's to one of the guest's, with --net user; again for more
    #[arg(short, long, value_name = "[ADDRESS:]HOST:GUEST[/tcp|udp]")]
    publish: Vec<Publish>,
    /// A folder, or a file, that the guest mounts by its tag (mount -t virtiofs TAG /mnt); again for more. Options: readonly, which
    /// is enforced here whatever the guest does, and uid=N and gid=N: who owns in the guest what you own here [default: root]
    /// (see docs/shares.md)
    #[arg(long, value_name = "PATH,tag=TAG[,OPTION…]",
        value_parser = OsStringValueParser::new().try_map(|text| ShareConfig::parse(&text)))]
    share: Vec<ShareConfig>,
    /// How the guest finds its virtio devices: acpi, or cmdline for kernels without working ACPI [default: acpi]
    #[arg(long, value_name = "HOW", value_parser = parse_discovery)]
    discovery: Option<Discovery>,
    /// Give the guest an i8254 timer, which makes closing the VM slower; needed without TSC-deadline timer only
    #[arg(long)]
    pit: bool,
    /// Go on where /dev/kvm is a software KVM, which interprets the guest's kernel
    #[arg(long)]
    allow_software_kvm: bool,
    /// How microvm is confined while the guest runs: on (by every layer that this host has, with a warning about what
    /// it lacks), strict (by every layer, or not started), off (for debuggers) [default: on]
    #[arg(long, value_name = "HOW", value_parser = parse_sandbox)]
    sandbox: Option<Sandbox>,
    /// When microvm ends: before KVM has closed the VM (background), some 20 ms sooner, or after (wait), for who removes
    /// its control group at once [default: background]
    #[arg(long, value_name = "WHEN", value_parser = parse_close)]
    close: Option<Close>,
    /// What the VM is called in `microvm ps` and `microvm ctl` [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Where the VM is controlled: the path of a socket, or none [default: in the user's run-time folder]
    #[arg(long, value_name = "PATH|none", value_parser = OsStringValueParser::new().map(|text| parse_control(&text)))]
    control: Option<ControlConfig>,
    /// Write all counters as JSON to a file when the VM has ended
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Read the VM from a JSON file; flags beside it win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Write the VM as JSON to standard output instead of running it
    #[arg(long)]
    print_config: bool,
    /// Write to standard error where the time and the VM exits went
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "human")]
    timeline: Option<Format>,
    /// The KVM device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm_device: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Format {
    Human,
    Json,
}

impl From<Format> for TimelineFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Human => Self::Human,
            Format::Json => Self::Json,
        }
    }
}

fn parse_control(text: &OsStr) -> ControlConfig {
    if text == "none" { ControlConfig::None } else { ControlConfig::Path(text.into()) }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("allowed are on and off".into()),
    }
}

fn parse_discovery(text: &str) -> Result<Discovery, String> {
    match text {
        "acpi" => Ok(Discovery::Acpi),
        "cmdline" => Ok(Discovery::Cmdline),
        _ => Err("allowed are acpi and cmdline".into()),
    }
}

fn parse_load(text: &str) -> Result<Load, String> {
    match text {
        "auto" => Ok(Load::Auto),
        "map" => Ok(Load::Map),
        "copy" => Ok(Load::Copy),
        _ => Err("allowed are auto, map and copy".into()),
    }
}

fn parse_close(text: &str) -> Result<Close, String> {
    match text {
        "background" => Ok(Close::Background),
        "wait" => Ok(Close::Wait),
        _ => Err("allowed are background and wait".into()),
    }
}

fn parse_sandbox(text: &str) -> Result<Sandbox, String> {
    match text {
        "on" => Ok(Sandbox::On),
        "strict" => Ok(Sandbox::Strict),
        "off" => Ok(Sandbox::Off),
        _ => Err("allowed are on, strict and off".into()),
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    let (digits, radix) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (text, 10),
    };
    // Rust would take a sign.
    let parsed = u16::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'));
    parsed.ok_or_else(|| "a port is a number from 0 to 0xffff".into())
}

pub(super) fn parse_timeout(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(_) if text.contains('M') => Err("M would be months: write 1m for a minute".into()),
        other => other.map_err(|e| e.to_string()),
    }
}

/// Boots, and says how it ended.
pub(super) fn run(args: BootArgs, clock: Clock) -> Result<u8, CliError> {
    let print = args.print_config;
    let launch = Launch {
        timeline: args.timeline,
        kvm_device: args.kvm_device.clone(),
        metrics: args.metrics.clone(),
        prepare: None,
    };
    let config = into_config(args)?;
    if print {
        config.validate().map_err(vmm::BuildError::from)?;
        // The one thing that JSON cannot hold.
        let no_json =
            |e| CliError::Usage(format!("--print-config: a path of this VM cannot be written as JSON: {e}"));
        let text = serde_json::to_string_pretty(&config).map_err(no_json)?;
        writeln!(io::stdout(), "{text}")?;
        return Ok(0);
    }
    Ok(launch.run(&config, clock)?.exit_status())
}

/// What is no part of a VM's configuration.
pub(super) struct Launch {
    pub timeline: Option<Format>,
    pub kvm_device: PathBuf,
    pub metrics: Option<PathBuf>,
    /// What is done to the VM when it is built.
    pub prepare: Option<Prepare>,
}

/// Adds what is not in a VM's configuration.
pub(super) type Prepare = Box<dyn FnOnce(&mut Vmm) -> Result<(), CliError>>;

impl Launch {
    /// Builds the VM and runs it to its end.
    pub(super) fn run(self, config: &VmConfig, clock: Clock) -> Result<End, CliError> {
        let Self { timeline: format, kvm_device, metrics: metrics_path, prepare } = self;
        let timeline = Arc::new(Timeline::new(clock, format.is_some()));
        timeline.mark(Phase::Start);
        config.validate().map_err(vmm::BuildError::from)?;
        let place = claim(config)?;
        let mut metrics_file = metrics_path.as_deref().map(|p| create_metrics(p, config)).transpose()?;
        let metrics = Arc::new(Registry::new(metrics_file.is_some()));
        let mut vmm = vmm::build(config, &kvm_device, timeline.clone(), metrics)?;
        if let Some(prepare) = prepare {
            prepare(&mut vmm)?;
        }
        if let Some(control) = prepare_control(place, config, &vmm)? {
            vmm.add_service(Box::new(control));
        }
        if let Some((file, path)) = metrics_file.as_mut().zip(metrics_path) {
            file.empty().map_err(|source| CliError::Metrics { path, source })?;
            vmm.keep("the file of --metrics", file);
        }
        let Ended { end, metrics } = vmm::run(vmm)?;
        report(&end);
        if let Some((file, snapshot)) = metrics_file.zip(metrics)
            && let Err(e) = file.write(&snapshot)
        {
            // The guest's status matters more.
            say(&format!("--metrics cannot be written: {e}"));
        }
        if let Some(format) = format {
            // The guest's status matters more than a standard error that cannot be written.
            let _ = write_timeline(&timeline, format.into(), &mut io::stderr().lock());
        }
        Ok(end)
    }
}

/// Takes the VM's name before anything is built. A VM that nobody gave a name or a socket also runs without: a host
/// may have no place for one.
fn claim(config: &VmConfig) -> Result<Option<Place>, CliError> {
    match Place::claim(config.name.as_deref(), &config.control) {
        Err(e) if config.name.is_none() && config.control == ControlConfig::Auto => {
            log::warn!("this VM has no control socket: {}", chain(&e));
            Ok(None)
        }
        other => Ok(other?),
    }
}

/// Makes the VM's control socket, with the same exception.
fn prepare_control(place: Option<Place>, config: &VmConfig, vmm: &Vmm) -> Result<Option<Control>, CliError> {
    let Some(place) = place else { return Ok(None) };
    match Control::prepare(place, config, vmm.handle()) {
        Err(e) if config.name.is_none() && config.control == ControlConfig::Auto => {
            log::warn!("this VM has no control socket: {}", chain(&e));
            Ok(None)
        }
        other => Ok(Some(other?)),
    }
}

fn create_metrics(path: &Path, config: &VmConfig) -> Result<MetricsFile, CliError> {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let boot_files = [Some(&config.kernel.path), config.kernel.initrd.as_ref()];
    // It would be emptied while the guest has it in its memory.
    if identity(path).is_some_and(|own| boot_files.into_iter().flatten().any(|f| identity(f) == Some(own))) {
        let path = path.display();
        return Err(CliError::Usage(format!(
            "--metrics {path} is the kernel or the initramfs: give another path"
        )));
    }
    MetricsFile::create(path).map_err(|source| CliError::Metrics { path: path.into(), source })
}

/// A VM with the kernel that this user has chosen. Where that has an initramfs, it is booted, too.
fn default_kernel() -> Result<VmConfig, CliError> {
    let kernel = match KernelStore::of_user().and_then(|kernels| kernels.default()) {
        Err(KernelError::NoDefault) => {
            return Err(CliError::Usage(
                "--kernel PATH is needed, where no kernel was imported (microvm kernel import PATH)".into(),
            ));
        }
        kernel => kernel?,
    };
    let mut config = VmConfig::new(kernel.path);
    config.kernel.initrd = kernel.initrd;
    Ok(config)
}

fn into_config(args: BootArgs) -> Result<VmConfig, CliError> {
    let mut config = match (&args.config, &args.kernel) {
        (Some(path), _) => read_config(path)?,
        (None, Some(kernel)) => VmConfig::new(kernel.clone()),
        (None, None) => default_kernel()?,
    };
    if let Some(path) = args.kernel {
        config.kernel.path = path;
    }
    config.name = args.name.or(config.name);
    config.control = args.control.unwrap_or(config.control);
    config.kernel.initrd = args.initrd.or(config.kernel.initrd);
    config.kernel.cmdline = args.cmdline.or(config.kernel.cmdline);
    config.kernel.append = args.append.unwrap_or(config.kernel.append);
    config.kernel.load = args.load.unwrap_or(config.kernel.load);
    config.cpus = args.cpus.unwrap_or(config.cpus);
    config.memory = args.memory.unwrap_or(config.memory);
    config.serial = args.serial.or(config.serial);
    config.console = args.console.or(config.console);
    config.timeout = args.timeout.or(config.timeout);
    config.exit_code_port = args.exit_code_port.or(config.exit_code_port);
    config.rng = args.rng.unwrap_or(config.rng);
    if !args.disk.is_empty() {
        config.disks = args.disk;
    }
    config.root |= args.root;
    config.balloon = args.balloon.or(config.balloon);
    config.vsock = args.vsock.or(config.vsock);
    if !args.net.is_empty() {
        config.nets = args.net;
    }
    if !args.publish.is_empty() {
        config.publish = args.publish;
    }
    if !args.share.is_empty() {
        config.shares = args.share;
    }
    config.discovery = args.discovery.unwrap_or(config.discovery);
    config.pit |= args.pit;
    config.allow_software_kvm |= args.allow_software_kvm;
    config.sandbox = args.sandbox.unwrap_or(config.sandbox);
    config.close = args.close.unwrap_or(config.close);
    Ok(config)
}

fn read_config(path: &Path) -> Result<VmConfig, CliError> {
    let failed = |source| CliError::Config { path: path.into(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_CONFIG + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(CliError::Usage(format!("--config {}: longer than 1 MiB, so no VM's", path.display())));
    }
    serde_json::from_str(&text).map_err(|source| CliError::ConfigJson { path: path.into(), source })
}

/// Says on standard error what the exit status alone cannot.
fn report(end: &End) {
    match end {
        End::Fault(fault) => {
            let advice = match fault {
                crate::vcpu::Fault::Emulation { .. } => {
                    ". On a software KVM that is to be expected of a stock kernel: run it in an emulated host \
                     (scripts/kvm-host -- microvm boot ...)"
                }
                _ => "",
            };
            say(&format!("{}{advice}", chain(fault)));
        }
        End::Panic => say("the guest's kernel panicked; its console says why (--serial stdio)"),
        End::Timeout => say("--timeout passed; the VM was stopped"),
        End::PowerOff | End::Reset | End::Exit(_) | End::Signal(_) | End::Escape | End::Stop => {
            log::info!("the VM ended: {end:?}");
        }
    }
}
