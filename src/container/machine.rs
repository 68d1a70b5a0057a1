//! The VM of a container.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::config::{DiskConfig, HostEnd, VmConfig};
use crate::guest::GuestSpec;
use crate::image::{Lease, Store};
use crate::kernels::{Kernel, KernelStore};

use super::{Changes, ContainerError, plan};

/// Where `microvm-init` leaves the program's status. No device of a PC is there.
const STATUS_PORT: u16 = 0xf4;

/// What is wanted of a container.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The image, in any way that the store knows.
    pub image: String,
    /// The guest's name.
    pub hostname: String,
    /// Otherwise than the image says.
    pub changes: Changes,
    /// Nothing can be written to its root file system.
    pub read_only: bool,
    /// A kernel of the store instead of the default one.
    pub kernel: Option<String>,
}

/// A container's VM: its configuration, and the files that go with it.
pub struct Machine {
    /// What is built.
    pub config: VmConfig,
    /// The image cannot be removed as long as this lives, which must stay open when the VM confines itself.
    pub lease: Lease,
    /// What `config` names by its descriptor: needed until the VM is built.
    pub initramfs: File,
}

impl Machine {
    /// Finds image and kernel, and describes the VM.
    ///
    /// # Errors
    /// One of them is not there, or nothing says what to run.
    pub fn of(wanted: &Wanted) -> Result<Self, ContainerError> {
        let store = Store::open()?;
        let image = store.find(&wanted.image)?.record;
        let lease = store.lease(&image)?;
        let run = store.config(&image)?.config.unwrap_or_default();
        let layers = store.layers(&image);
        let ids: Vec<_> = (0..layers.len()).map(|n| format!("layer{n}")).collect();
        let spec = GuestSpec {
            layers: ids.clone(),
            storage: None,
            read_only: wanted.read_only,
            hostname: wanted.hostname.clone(),
            network: None,
            mounts: Vec::new(),
            process: plan(&run, &wanted.changes, &wanted.hostname)?,
        };
        let kernels = KernelStore::of_user()?;
        let kernel = wanted.kernel.as_ref().map_or_else(|| kernels.default(), |name| kernels.get(name))?;
        let initramfs = initramfs(&kernel, &spec)?;
        let mut config = VmConfig::new(kernel.path);
        config.kernel.initrd = Some(format!("/proc/self/fd/{}", initramfs.as_raw_fd()).into());
        config.kernel.append = format!("loglevel=0 microvm.exit_code_port={STATUS_PORT:#x}");
        config.exit_code_port = Some(STATUS_PORT);
        config.serial = Some(HostEnd::Null);
        config.console = Some(HostEnd::Stdio);
        let disk = |(path, id)| DiskConfig { readonly: true, id: Some(id), ..DiskConfig::new(path) };
        config.disks = layers.into_iter().zip(ids).map(disk).collect();
        Ok(Self { config, lease, initramfs })
    }
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
