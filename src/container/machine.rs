//! The VM of a container.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::config::{DiskConfig, HostEnd, Publish, VmConfig, VsockConfig};
use crate::control::base_path;
use crate::guest::{GuestSpec, LAYERS_DISK};
use crate::image::PullPolicy;
use crate::kernels::{Kernel, KernelStore};

use super::agent::SOCKET;
use super::network::connect;
use super::program::Program;
use super::storage;
use super::volume::claim_new;
use super::{Changes, ContainerError, NetworkWishes, Volume};

/// Where `microvm-init` leaves the program's status. No device of a PC is there.
const STATUS_PORT: u16 = 0xf4;

/// The guest's address in its socket device. VMs may share one.
const CID: u32 = 3;

/// What is wanted of a container.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The image, in any way that the store knows.
    pub image: String,
    /// The container's name.
    pub name: String,
    /// Its folder, which need not be there yet.
    pub folder: PathBuf,
    /// The guest's name.
    pub hostname: String,
    /// Otherwise than the image says.
    pub changes: Changes,
    /// What it writes goes to a disk, which is added to the VM.
    pub storage: bool,
    /// Nothing can be written to its root file system.
    pub read_only: bool,
    /// A kernel of the store instead of the default one.
    pub kernel: Option<String>,
    /// How it reaches the world.
    pub network: NetworkWishes,
    /// The host's ports that lead to it.
    pub publish: Vec<Publish>,
    /// Folders of the host's in it.
    pub volumes: Vec<Volume>,
    /// Whether the image may be, or must be, got from its registry.
    pub pull: PullPolicy,
    /// Where the guest's serial port goes.
    pub serial: Option<HostEnd>,
}

/// A container's VM: its configuration, and the files that go with it.
pub struct Machine {
    /// What is built.
    pub config: VmConfig,
    /// What `config` names by its descriptor: needed until the VM is built.
    pub initramfs: File,
    /// The program, whose image cannot be removed as long as this lives: it must stay open when the VM confines itself.
    pub program: Program,
    /// Locks of the volumes that its guest fills, until the program runs.
    pub new_volumes: Vec<File>,
}

impl Machine {
    /// Finds image and kernel, and describes the VM.
    ///
    /// # Errors
    /// One of them is not there, or nothing says what to run.
    pub fn of(wanted: &Wanted) -> Result<Self, ContainerError> {
        // What is missing is said before anything takes long, and before what is only worth a warning.
        let kernels = KernelStore::of_user()?;
        let kernel = wanted.kernel.as_ref().map_or_else(|| kernels.default(), |name| kernels.get(name))?;
        let program = Program::of(wanted)?;
        let volumes = wanted.volumes.iter().enumerate();
        let placed = volumes.clone().map(|(number, volume)| volume.place(number, &wanted.folder));
        let mut placed = placed.collect::<Result<Vec<_>, _>>()?;
        let new_volumes = claim_new(&mut placed)?;
        let (shares, mounts) =
            volumes.zip(placed).map(|((number, volume), placed)| volume.share(number, placed)).unzip();
        let (card, network) = connect(&wanted.network, !wanted.publish.is_empty());
        let spec = GuestSpec {
            layers: program.layers.iter().map(|layer| len(layer)).collect::<Result<_, _>>()?,
            storage: wanted.storage.then(|| storage::ID.into()),
            read_only: wanted.read_only,
            hostname: wanted.hostname.clone(),
            network,
            mounts,
            agent: true,
            process: program.process.clone(),
        };
        let initramfs = initramfs(&kernel, &spec)?;
        let mut config = VmConfig::new(kernel.path);
        config.kernel.initrd = Some(format!("/proc/self/fd/{}", initramfs.as_raw_fd()).into());
        config.kernel.append = format!("microvm.exit_code_port={STATUS_PORT:#x}");
        config.exit_code_port = Some(STATUS_PORT);
        // Without a console there is nothing for the kernel to print on, which would take its time.
        config.serial = Some(wanted.serial.clone().unwrap_or(HostEnd::Null));
        config.vsock = Some(VsockConfig { cid: CID, socket: base_path().join(&wanted.name).join(SOCKET) });
        config.nets = card.into_iter().collect();
        config.shares = shares;
        config.publish = wanted.publish.clone();
        config.name = Some(wanted.name.clone());
        config.disks.extend(layers_disk(program.layers.clone()));
        Ok(Self { config, initramfs, program, new_volumes })
    }
}

fn len(layer: &Path) -> Result<u64, ContainerError> {
    let meta = layer.metadata().map_err(|source| ContainerError::Store { path: layer.into(), source })?;
    Ok(meta.len())
}

/// All layers as one disk: a device for each would be more than a VM has room for, and each costs the guest's boot.
fn layers_disk(layers: Vec<PathBuf>) -> Option<DiskConfig> {
    let mut layers = layers.into_iter();
    let first = DiskConfig::new(layers.next()?);
    Some(DiskConfig { more: layers.collect(), readonly: true, id: Some(LAYERS_DISK.into()), ..first })
}

/// What the kernel brings, process 1 and the description, in memory alone.
fn initramfs(kernel: &Kernel, spec: &GuestSpec) -> Result<File, ContainerError> {
    let init = init_path();
    let init = fs::read(&init).map_err(|e| ContainerError::NoInit(init, e))?;
    let write = || -> io::Result<File> {
        let mut file = File::from(memfd_create("initramfs", MemfdFlags::CLOEXEC)?);
        if let Some(modules) = &kernel.initrd {
            io::copy(&mut File::open(modules)?, &mut file)?;
        }
        file.write_all(&spec.to_initramfs(Some(&init)))?;
        Ok(file)
    };
    write().map_err(ContainerError::Initramfs)
}

/// `$MICROVM_INIT`, else beside this program.
fn init_path() -> PathBuf {
    let beside = || env::current_exe().unwrap_or_default().with_file_name("microvm-init");
    env::var_os("MICROVM_INIT").map_or_else(beside, PathBuf::from)
}
