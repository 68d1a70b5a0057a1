//! From a configuration to a VM that is ready to run: the boot recipe, a step a line.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::acpi::{self, AcpiConfig, AcpiError};
use crate::arch::x86_64::cmdline::{
    CmdlineConfig, ROOT, ROOT_READ_ONLY, SERIAL_CONSOLE, VIRTIO_CONSOLE, command_line,
};
use crate::arch::x86_64::cpuid::{CpuidConfig, TooManyLeaves, vcpu_cpuid};
use crate::arch::x86_64::image::Entry;
use crate::arch::x86_64::layout::VirtioSlot;
use crate::arch::x86_64::linux_boot::{BootInfo, Initrd, write_boot_params};
use crate::arch::x86_64::memory_map::memory_map;
use crate::arch::x86_64::{layout, pvh, registers};
use crate::bus::{Bus, BusDevice, Overlap};
use crate::config::{Close, ConfigError, Discovery, HostEnd, VmConfig};
use crate::devices::legacy::{AcpiPm, ExitCode, I8042, MarkPort, PvPanic};
use crate::devices::virtio::VmmThread;
use crate::devices::{AddDeviceError, DeviceControls};
use crate::metrics::{Phase, Registry, Timeline};
use crate::sandbox::{Kept, Layers, SandboxError, ThreadKind};
use crate::vcpu::{AddressSpace, Reports, Vcpu, VcpuError, install_kick_handler};
use crate::vm::{HostKvm, KvmError, Memory, MemoryError, OpenKvmError, Vm};

use super::Vmm;
use super::boot_files::{BootFileError, BootFiles};
use super::console::{Console, ConsoleError, GuestEnd};
use super::devices::{DeviceError, Devices};
use super::machine::{Machine, MachineParts};
use super::metrics::MemorySource;
use super::run::EventSources;
use super::state::StateCell;

/// A VM could not be built. Nothing is left behind.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM cannot be used.
    #[error(transparent)]
    OpenKvm(#[from] OpenKvmError),
    /// KVM is there, but interprets guests.
    #[error(
        "{device} on this host is a software KVM (the processor has neither VT-x nor AMD-V): kernel code of a guest is \
         interpreted at some 10 million instructions a second, and a stock kernel takes minutes and dies. Run it in an \
         emulated host: scripts/kvm-host -- microvm boot ...; or try all the same with --allow-software-kvm"
    )]
    SoftwareKvm {
        /// The device.
        device: std::path::PathBuf,
    },
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A kernel or initramfs that cannot be used.
    #[error(transparent)]
    BootFile(#[from] BootFileError),
    /// Tables that do not fit.
    #[error("the boot tables do not fit guest memory")]
    Tables(#[from] GuestMemoryError),
    /// ACPI tables that do not fit.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Too many CPUID leaves.
    #[error(transparent)]
    Cpuid(#[from] TooManyLeaves),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A console's other end.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Two devices of one name.
    #[error(transparent)]
    DeviceId(#[from] AddDeviceError),
    /// A virtio device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Two devices on one port.
    #[error("a device cannot be placed")]
    Bus(#[from] Overlap),
    /// The guest's status port is another device's.
    #[error("--exit-code-port {0:#x} belongs to another device of the machine: choose a free one, as 0xf4")]
    ExitCodePort(u16),
    /// No thread.
    #[error("no thread to load the kernel: raise the limit on processes of this user (ulimit -u)")]
    Thread(#[source] io::Error),
    /// No descriptor or handler.
    #[error("the event loop cannot be set up")]
    Events(#[source] io::Error),
    /// A host that cannot confine as it should.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// Builds the VM of `config`: everything is open, and no thread runs yet.
///
/// # Errors
/// What is wrong, on which flag or path. Nothing is left behind.
pub fn build(
    config: &VmConfig,
    kvm_device: &Path,
    timeline: Arc<Timeline>,
    metrics: Arc<Registry>,
) -> Result<Vmm, BuildError> {
    config.validate()?;
    let layers = Layers::find(config.sandbox)?;
    let serial = *config.serial_end() != HostEnd::Null;
    let files = BootFiles::open(&config.kernel)?;
    files.check_disks(&config.disks)?;
    let mut controls = DeviceControls::default();
    let mut devices = Devices::open(config, &metrics, &mut controls)?;
    let services = devices.take_services();
    let vsock = devices.vsock.take();
    let slots = Slots::of(&devices, config.discovery);
    let (cpus, consoles) = (config.cpus, &console_words(config));
    let cmdline_config = CmdlineConfig { consoles, cpus, root: root(config), virtio: &slots.cmdline };
    let cmdline = command_line(&config.kernel, cmdline_config)?;

    let host = HostKvm::open(kvm_device)?;
    if !host.tier().is_hardware() && !config.allow_software_kvm {
        return Err(BuildError::SoftwareKvm { device: kvm_device.into() });
    }
    let (vm, memory, initrd) = make_vm(config, &host, &files, &timeline)?;

    memory.guest().write_slice(cmdline_bytes(&cmdline)?.as_slice(), GuestAddress(layout::CMDLINE))?;
    let rsdp = acpi::write_tables(
        memory.guest(),
        AcpiConfig {
            cpus: config.cpus,
            serial,
            virtio: &slots.acpi,
            hardware_reduced: config.discovery == Discovery::Acpi,
        },
    )?;
    let memory_map = &memory_map(config.memory.size.0);
    let cmdline_len = cmdline_bytes(&cmdline)?.len() - 1;
    write_tables(&memory, &BootInfo { image: &files.image, cmdline_len, initrd, memory_map, rsdp })?;
    timeline.mark(Phase::Tables);

    // Behind everything that may take long, so that a signal still ends the process there; before the first thread.
    let events = EventSources::new(config.timeout).map_err(BuildError::Events)?;
    let mut ports = Bus::default();
    // The consoles come last: they make the output files, which a machine that cannot be must not leave behind.
    add_platform_devices(&mut ports, config)?;
    let mut kept = Kept::default();
    let com1 = serial.then(|| GuestEnd::serial(&vm, &mut ports, &metrics, &mut kept)).transpose()?;
    com1.as_ref().map_or(Ok(()), |com1| controls.add(com1.control()))?;
    let hvc0 = devices.console.take();
    let mut consoles = Vec::new();
    for (end, guest) in [(config.serial_end(), com1), (config.console_end(), hvc0)] {
        consoles.extend(Console::open(end, guest, &files, &mut kept)?);
    }
    let (vmm_thread, jobs) = VmmThread::new().map_err(BuildError::Events)?;
    let mut mmio = Bus::default();
    let threads = devices.connect(&vm, &memory, &vmm_thread, &mut mmio, &mut kept)?;
    let space = AddressSpace { ports, devices: mmio, memory: memory.clone() };
    let count = timeline.is_on() || metrics.is_full();
    let vcpus = make_vcpus(config, &host, &vm, space, files.image.entry, count)?;
    let sources: Vec<_> = vcpus.iter().map(Vcpu::exit_source).collect();
    timeline.watch(sources.clone());
    timeline.mark(Phase::Vcpus);

    let (sender, receiver) = mpsc::channel();
    let reports = Reports { events: sender, wake: events.wake(), timeline: timeline.clone() };
    let events = events.with_vcpu_events(receiver).with_jobs(jobs);
    install_kick_handler().map_err(BuildError::Events)?;
    events.keep(&mut kept);
    vm.keep(&mut kept);
    memory.keep(&mut kept);
    vcpus.iter().for_each(|vcpu| vcpu.keep(&mut kept));
    let state = Arc::new(StateCell::new());
    let pauses = super::metrics::register(&metrics, config, state.clone(), sources);
    if metrics.is_full() {
        // A host without /proc still runs VMs.
        let source = MemorySource::new(&memory, &mut kept);
        source.into_iter().for_each(|source| metrics.add_source(Arc::new(source)));
    }
    let outputs = consoles.iter().map(Console::output).collect();
    let parts = MachineParts { devices: controls, threads, consoles: outputs, state, pauses };
    let machine = Machine::new(parts);
    let kind = if config.vsock.is_some() { ThreadKind::VmmWithVsock } else { ThreadKind::Vmm };
    Ok(Vmm {
        vcpus,
        reports,
        machine,
        events,
        consoles,
        timeline,
        metrics,
        vm,
        memory,
        layers,
        kept,
        kind,
        vsock,
        signals: None,
        at_end: None,
        services,
    })
}

/// Makes the VM, and fills its memory meanwhile: KVM attaches a thread of its own to this process's control groups, and
/// sleeps for a grace period of RCU before, some 10 ms. KVM's tools know a VM by the thread that makes it, so that is
/// this one.
fn make_vm(
    config: &VmConfig,
    host: &HostKvm,
    files: &BootFiles,
    timeline: &Timeline,
) -> Result<(Vm, Memory, Option<Initrd>), BuildError> {
    // A guest whose APIC timer has to be measured needs something to measure it with.
    let pit = config.pit || !host.has_tsc_deadline();
    timeline.mark(Phase::OpenKvm);
    let fill_memory = || {
        let memory = Memory::new(&config.memory)?;
        timeline.mark(Phase::Memory);
        let initrd = files.load(&memory, config.memory.size)?;
        timeline.mark(Phase::Kernel);
        Ok::<_, BuildError>((memory, initrd))
    };
    thread::scope(|scope| {
        let filling = thread::Builder::new().name("loader".into()).spawn_scoped(scope, fill_memory);
        let filling = filling.map_err(BuildError::Thread)?;
        let vm = Vm::new(host.kvm(), pit);
        let (memory, initrd) = filling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let mut vm = vm?;
        if config.close == Close::Background {
            vm.close_in_background(host.kvm());
        }
        vm.set_memory(&memory)?;
        timeline.mark(Phase::Vm);
        Ok((vm, memory, initrd))
    })
}

/// What tells the kernel of its consoles. The last one becomes `/dev/console`, so the one that a person looks at stands
/// there.
fn console_words(config: &VmConfig) -> Vec<&'static str> {
    let all = [(config.serial_end(), SERIAL_CONSOLE.0), (config.console_end(), VIRTIO_CONSOLE.0)];
    let mut there: Vec<_> = all.into_iter().filter(|(end, _)| **end != HostEnd::Null).collect();
    there.sort_by_key(|(end, _)| **end == HostEnd::Stdio);
    there.into_iter().map(|(_, word)| word).collect()
}

/// What tells the kernel of its root file system.
fn root(config: &VmConfig) -> Option<&'static str> {
    let disk = config.disks.first().filter(|_| config.root)?;
    Some(if disk.readonly { ROOT_READ_ONLY } else { ROOT })
}

/// The command line with its NUL.
fn cmdline_bytes(cmdline: &linux_loader::loader::Cmdline) -> Result<Vec<u8>, ConfigError> {
    // `validate` has refused control characters, a NUL with them.
    let text = cmdline.as_cstring().map_err(|_| ConfigError::CmdlineControl(0))?;
    Ok(text.into_bytes_with_nul())
}

/// Where each way of discovery finds virtio devices: a device that is found twice is an error to Linux.
struct Slots {
    acpi: Vec<VirtioSlot>,
    cmdline: Vec<VirtioSlot>,
}

impl Slots {
    fn of(devices: &Devices, discovery: Discovery) -> Self {
        match discovery {
            Discovery::Acpi => Self { acpi: devices.slots(), cmdline: Vec::new() },
            Discovery::Cmdline => Self { acpi: Vec::new(), cmdline: devices.slots() },
        }
    }
}

fn write_tables(memory: &Memory, info: &BootInfo) -> Result<(), BuildError> {
    match info.image.entry {
        Entry::Pvh(_) => pvh::write_start_info(memory.guest(), info)?,
        Entry::Linux64(_) => write_boot_params(memory.guest(), info)?,
    }
    registers::write_reset_vector(memory.guest())?;
    Ok(registers::write_tables(memory.guest(), info.image.entry)?)
}

/// Ports that KVM's own devices answer before we hear of them: both 8259s, the i8254, and their edge registers.
const IN_KERNEL_PORTS: [std::ops::RangeInclusive<u16>; 5] =
    [0x20..=0x21, 0x40..=0x43, 0x61..=0x61, 0xa0..=0xa1, 0x4d0..=0x4d1];

fn add_platform_devices(ports: &mut Bus, config: &VmConfig) -> Result<(), BuildError> {
    fn add(
        bus: &mut Bus,
        name: &'static str,
        port: u16,
        len: u16,
        device: impl BusDevice + 'static,
    ) -> Result<(), Overlap> {
        bus.insert(name, port.into(), len.into(), Arc::new(Mutex::new(device)))
    }
    add(ports, "the keyboard controller", layout::I8042_PORT, layout::I8042_LEN, I8042)?;
    add(ports, "the timeline's port", layout::MARK_PORT, 1, MarkPort)?;
    add(ports, "pvpanic", layout::PVPANIC_PORT, 1, PvPanic)?;
    add(ports, "ACPI power management", layout::ACPI_PM_PORT, layout::ACPI_PM_LEN, AcpiPm)?;
    if let Some(port) = config.exit_code_port {
        let taken = || BuildError::ExitCodePort(port);
        // COM1 is put on the bus later.
        let serial = layout::SERIAL_PORT..=layout::SERIAL_PORT + layout::SERIAL_LEN - 1;
        let serial = (*config.serial_end() != HostEnd::Null).then_some(serial);
        let takes = |range: &std::ops::RangeInclusive<u16>| {
            range.contains(&port) || range.contains(&port.saturating_add(1))
        };
        if port == u16::MAX || IN_KERNEL_PORTS.into_iter().chain(serial).any(|range| takes(&range)) {
            return Err(taken());
        }
        add(ports, "the exit status", port, 2, ExitCode).map_err(|_| taken())?;
    }
    Ok(())
}

fn make_vcpus(
    config: &VmConfig,
    host: &HostKvm,
    vm: &Vm,
    space: AddressSpace,
    entry: Entry,
    count: bool,
) -> Result<Vec<Vcpu>, BuildError> {
    let supported = host.supported_cpuid()?;
    let space = Arc::new(space);
    let mut vcpus = Vec::new();
    for index in 0..config.cpus {
        let fd = vm.create_vcpu(index)?;
        let cpuid_config = CpuidConfig {
            apic_id: index,
            cpus: config.cpus,
            tsc_khz: fd.get_tsc_khz().ok().filter(|khz| *khz != 0),
            tsc_deadline: host.has_tsc_deadline(),
        };
        let vcpu = Vcpu::new(fd, index, space.clone(), count)?;
        vcpu.configure(&vcpu_cpuid(&supported, cpuid_config)?, entry)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
