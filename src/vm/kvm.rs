//! Opening `/dev/kvm`, and what it must be able to do.

use std::ffi::CString;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

use super::host::Tier;
use super::{KvmError, kvm_error};

/// Why KVM cannot be used. Each message says what to do.
#[derive(Debug, Error)]
pub enum OpenKvmError {
    /// No such device.
    #[error(
        "{0} is not there: this host has no KVM. Enable virtualization in the firmware and load kvm_intel or kvm_amd, \
         or run the command in an emulated host: scripts/kvm-host -- COMMAND"
    )]
    Absent(PathBuf),
    /// Not for this user.
    #[error(
        "{0} may not be opened by this user: add yourself to its group (sudo usermod -aG kvm $USER, then log in anew)"
    )]
    Denied(PathBuf),
    /// Another error.
    #[error("{path} cannot be opened")]
    Open {
        /// The device.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A file that is no KVM device.
    #[error("{0} is no KVM device: give the path of a real one, or leave --kvm-device out")]
    NotKvm(PathBuf),
    /// A version that nobody has seen since Linux 2.6.22.
    #[error(
        "{path} speaks KVM API version {version}, and {KVM_API_VERSION} is needed: use a newer host kernel"
    )]
    Version {
        /// The device.
        path: PathBuf,
        /// Its version.
        version: i32,
    },
    /// A missing capability.
    #[error("{path} lacks {name}: use a newer host kernel")]
    Lacks {
        /// The device.
        path: PathBuf,
        /// The capability.
        name: &'static str,
    },
}

/// What no VM of ours can do without.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// This host's KVM, checked.
pub struct HostKvm {
    kvm: Kvm,
    tier: Tier,
}

impl HostKvm {
    /// Opens `path` and checks what it can do.
    ///
    /// # Errors
    /// It is not there, not allowed, no KVM, or too old.
    pub fn open(path: &Path) -> Result<Self, OpenKvmError> {
        let kvm = open(path)?;
        match kvm.get_api_version() {
            version if version == KVM_API_VERSION as i32 => {}
            // The request number means nothing to another device: ENOTTY.
            -1 => return Err(OpenKvmError::NotKvm(path.into())),
            version => return Err(OpenKvmError::Version { path: path.into(), version }),
        }
        if let Some((_, name)) = REQUIRED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(OpenKvmError::Lacks { path: path.into(), name });
        }
        Ok(Self { kvm, tier: Tier::of_cpu() })
    }

    /// The device.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Whether the processor runs the guest itself.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Everything that a guest's CPUID may show.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("tell the CPUID it supports"))
    }

    /// Whether the local APIC timer has the TSC-deadline mode.
    #[must_use]
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }
}

fn open(path: &Path) -> Result<Kvm, OpenKvmError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenKvmError::Absent(path.into()),
        Some(libc::EACCES | libc::EPERM) => OpenKvmError::Denied(path.into()),
        _ => OpenKvmError::Open { path: path.into(), source },
    };
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
    let fd = Kvm::open_with_cloexec_at(c_path, true).map_err(|e| failed(e.into()))?;
    // SAFETY: the descriptor is open, new, and handed over to the `Kvm` alone. Whether it is a KVM device is asked
    // next; until then nothing but the version request, harmless on any file, is sent to it.
    Ok(unsafe { Kvm::from_raw_fd(fd) })
}
