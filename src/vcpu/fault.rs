//! Why a vCPU cannot go on.

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_run};
use thiserror::Error;

/// Why a vCPU cannot go on.
#[derive(Debug, Error)]
pub enum Fault {
    /// A fault while the guest handled a double fault. On real hardware the machine would reset.
    #[error("the guest triple-faulted: its kernel lost control before it could say why")]
    TripleFault,
    /// KVM had to emulate an instruction and cannot.
    #[error("KVM cannot emulate the instruction [{bytes}] at guest RIP {rip:#x}")]
    Emulation {
        /// The bytes from RIP on, in hexadecimal.
        bytes: String,
        /// Where it is.
        rip: u64,
    },
    /// Another error inside KVM.
    #[error("KVM gave up with internal error {suberror} at guest RIP {rip:#x}")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Where the guest was.
        rip: u64,
    },
    /// The processor refused the guest's state.
    #[error("the processor refused to enter the guest (reason {0:#x})")]
    Entry(u64),
    /// An exit that nothing here asks for.
    #[error("KVM left the guest for a reason that is not handled here: {0}")]
    Unknown(String),
    /// `KVM_RUN` failed. `EFAULT`: a page of the kernel file is gone, because the file was cut short.
    #[error("KVM_RUN failed")]
    Run(#[source] kvm_ioctls::Error),
}

/// `KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES`: the report has the instruction.
const HAS_INSTRUCTION: u64 = 1;

impl Fault {
    /// Reads the report of a `KVM_EXIT_INTERNAL_ERROR`. `in_memory` are the bytes at `rip`, for a host too old to
    /// report them.
    pub(super) fn internal(run: &kvm_run, rip: u64, in_memory: Vec<u8>) -> Self {
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which the kernel filled this member of the union;
        // every bit pattern of its integers is valid.
        let report = unsafe { run.__bindgen_anon_1.emulation_failure };
        if report.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return Self::Internal { suberror: report.suberror, rip };
        }
        // SAFETY: the only member of this union, and bytes of any value are valid.
        let instruction = unsafe { report.__bindgen_anon_1.__bindgen_anon_1 };
        let reported = report.ndata >= 3 && report.flags & HAS_INSTRUCTION != 0;
        let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
        let bytes = if reported && len > 0 { &instruction.insn_bytes[..len] } else { &in_memory };
        let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let bytes = if hex.is_empty() { "not readable".to_string() } else { hex.join(" ") };
        Self::Emulation { bytes, rip }
    }
}
