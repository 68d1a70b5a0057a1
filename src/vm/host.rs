//! What this host's processor can do for a VM.

use std::arch::x86_64::__cpuid;
use std::fmt;

/// How guests run on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// The processor runs them (Intel VT-x).
    Vmx,
    /// The processor runs them (AMD-V).
    Svm,
    /// A KVM without help from the processor: guest kernel code is interpreted.
    Software,
}

impl Tier {
    /// Asks the processor. Where it has no virtualization, a `/dev/kvm` that works all the same is software.
    #[must_use]
    pub fn of_cpu() -> Self {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        let extended = __cpuid(0x8000_0000).eax;
        if __cpuid(1).ecx & VMX != 0 {
            Self::Vmx
        } else if extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0 {
            Self::Svm
        } else {
            Self::Software
        }
    }

    /// Whether the processor runs guests.
    #[must_use]
    pub fn is_hardware(self) -> bool {
        self != Self::Software
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "hardware (Intel VT-x)",
            Self::Svm => "hardware (AMD-V)",
            Self::Software => "software",
        })
    }
}

/// Whether this host backs all anonymous memory with huge pages, without being asked for each mapping.
#[must_use]
pub fn has_transparent_huge_pages() -> bool {
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    setting.is_ok_and(|words| words.contains("[always]"))
}
