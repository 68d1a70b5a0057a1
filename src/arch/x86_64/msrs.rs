//! The model-specific registers that firmware would have set.

use kvm_bindings::kvm_msr_entry;

/// `IA32_MTRR_DEF_TYPE`.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back: without it Linux maps memory uncached (Intel SDM, 12.11.2.1).
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
/// `IA32_MISC_ENABLE`.
const MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations, which Linux checks for before it uses `rep movsb`.
const FAST_STRING: u64 = 1;

/// The MSRs to set, in order. A host that refuses one is no reason to fail: the guest starts with the reset value.
#[must_use]
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    [(MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK), (MISC_ENABLE, FAST_STRING)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .to_vec()
}
