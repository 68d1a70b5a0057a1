//! A vCPU: `KVM_RUN`, what comes out of it, and the thread around it.

mod counters;
mod fault;
mod run_page;
mod thread;

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_SYSTEM_EVENT_CRASH, Msrs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::GuestAddress;

use crate::arch::x86_64::image::Entry;
use crate::arch::x86_64::msrs::boot_msrs;
use crate::arch::x86_64::registers::{boot_regs, boot_sregs};
use crate::bus::{Action, Bus};
use crate::metrics::ExitSource;
use crate::sandbox::Kept;
use crate::vm::{KvmError, Memory};

use counters::{Counters, Reason};
pub use fault::Fault;
use run_page::RunPage;
pub use thread::{Reports, VcpuEvent, VcpuThread, install_kick_handler};

/// Everything that a guest can address.
pub struct AddressSpace {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped devices.
    pub devices: Bus,
    /// Memory.
    pub memory: Memory,
}

/// What one `KVM_RUN` came to.
#[derive(Debug)]
pub enum Outcome {
    /// Handled: run again.
    Continue,
    /// A kick or a signal: look for commands.
    Interrupted,
    /// A device wants something of the VM.
    Device(Action),
    /// The vCPU cannot go on.
    Fault(Fault),
}

/// A vCPU could not be set up.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The page shared with KVM could not be mapped.
    #[error("the page shared with KVM cannot be mapped")]
    RunPage(#[source] std::io::Error),
}

/// One vCPU.
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    space: Arc<AddressSpace>,
    counters: Arc<Counters>,
    page: Arc<RunPage>,
}

impl Vcpu {
    /// Takes a vCPU made by [`crate::vm::Vm::create_vcpu`]. `count` turns KVM's own exit counters on.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn new(fd: VcpuFd, index: u32, space: Arc<AddressSpace>, count: bool) -> Result<Self, VcpuError> {
        let page = Arc::new(RunPage::map(&fd).map_err(VcpuError::RunPage)?);
        let counters = Arc::new(Counters::new(&fd, count));
        Ok(Self { fd, index, space, counters, page })
    }

    /// Sets CPUID, MSRs and, on the boot processor, the registers of the kernel's entry point. The others wait for
    /// the kernel to start them.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn configure(&self, cpuid: &CpuId, entry: Entry) -> Result<(), KvmError> {
        let failed = crate::vm::kvm_error;
        // Before everything else: what other state may be depends on it.
        self.fd.set_cpuid2(cpuid).map_err(failed("set a vCPU's CPUID"))?;
        self.set_msrs();
        if self.index == 0 {
            let mut sregs = self.fd.get_sregs().map_err(failed("read a vCPU's registers"))?;
            boot_sregs(&mut sregs, entry);
            self.fd.set_sregs(&sregs).map_err(failed("set a vCPU's special registers"))?;
            self.fd.set_regs(&boot_regs(entry)).map_err(failed("set a vCPU's registers"))?;
        }
        Ok(())
    }

    /// All of these MSRs are optional: KVM stops at the first that it refuses, so go on behind that one.
    fn set_msrs(&self) {
        let all = boot_msrs();
        let mut rest = all.as_slice();
        while !rest.is_empty() {
            let Ok(msrs) = Msrs::from_entries(rest) else { return };
            let done = self.fd.set_msrs(&msrs).unwrap_or(0);
            if let Some(refused) = rest.get(done) {
                log::info!("vCPU {}: this host's KVM refuses MSR {:#x}; skipped", self.index, refused.index);
            }
            rest = rest.get(done + 1..).unwrap_or_default();
        }
    }

    /// Puts its descriptors on the list of those that stay open.
    pub fn keep(&self, kept: &mut Kept) {
        kept.add("a vCPU", &self.fd);
        if let Some(file) = self.counters.file() {
            kept.add("the exit counters of a vCPU", file);
        }
    }

    /// Its exit counters.
    #[must_use]
    pub fn exit_source(&self) -> Arc<dyn ExitSource> {
        self.counters.clone()
    }

    /// Runs the guest until it needs something of us, and gives it that.
    pub fn run_once(&mut self) -> Outcome {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                self.counters.add(Reason::IoOut);
                // `rep outs` brings many accesses at once.
                let writes = data.chunks(self.page.io_size());
                writes
                    .map(|part| self.space.ports.write(port.into(), part))
                    .find(|a| *a != Action::None)
                    .into()
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.counters.add(Reason::IoIn);
                data.chunks_mut(self.page.io_size())
                    .for_each(|part| self.space.ports.read(port.into(), part));
                Outcome::Continue
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.counters.add(Reason::MmioRead);
                self.space.devices.read(address, data);
                Outcome::Continue
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.counters.add(Reason::MmioWrite);
                Some(self.space.devices.write(address, data)).filter(|a| *a != Action::None).into()
            }
            Ok(VcpuExit::Shutdown) => Outcome::Fault(Fault::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => Outcome::Device(Action::Panic),
            Ok(VcpuExit::Intr) => self.interrupted(),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => self.interrupted(),
            Ok(VcpuExit::InternalError) => Outcome::Fault(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, _)) => Outcome::Fault(Fault::Entry(reason)),
            Ok(other) => Outcome::Fault(Fault::Unknown(format!("{other:?}"))),
            Err(e) => Outcome::Fault(Fault::Run(e)),
        }
    }

    /// Tells a guest that keeps its time with KVM's clock that it was not running, so that its watchdog does not take
    /// the pause for a lock-up (KVM API 4.71, `KVM_KVMCLOCK_CTRL`).
    fn tell_guest_of_pause(&self) {
        if let Err(e) = self.fd.kvmclock_ctrl() {
            // EINVAL: the guest has no such clock (yet). A host that lacks the request has no other way.
            log::trace!("vCPU {}: KVM_KVMCLOCK_CTRL: {e}", self.index);
        }
    }

    fn interrupted(&self) -> Outcome {
        self.counters.add(Reason::Interrupted);
        Outcome::Interrupted
    }

    /// Reads what KVM tells of an error of its own.
    fn internal_error(&mut self) -> Fault {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let in_memory = self.instruction_at(rip);
        Fault::internal(self.fd.get_kvm_run(), rip, in_memory)
    }

    /// The longest instruction's worth of bytes at a guest-virtual address, or fewer at the end of a page.
    fn instruction_at(&self, rip: u64) -> Vec<u8> {
        let Ok(translated) = self.fd.translate_gva(rip) else { return Vec::new() };
        let mut bytes = vec![0; (4096 - (rip & 0xfff)).min(15) as usize];
        let read = self.space.memory.peek(GuestAddress(translated.physical_address), &mut bytes);
        if translated.valid != 0 && read.is_some() { bytes } else { Vec::new() }
    }
}

impl From<Option<Action>> for Outcome {
    fn from(action: Option<Action>) -> Self {
        action.map_or(Self::Continue, Self::Device)
    }
}
