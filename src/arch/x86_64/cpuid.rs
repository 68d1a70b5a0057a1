//! What the guest's `CPUID` instruction shows: what KVM supports, with our topology and the TSC's frequency.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;

/// What differs between VMs and vCPUs.
#[derive(Clone, Copy, Debug)]
pub struct CpuidConfig {
    /// This vCPU's APIC ID.
    pub apic_id: u32,
    /// Number of vCPUs: one package, a core each, no hyper-threads.
    pub cpus: u32,
    /// Frequency of the guest's TSC in kHz, where the host tells.
    pub tsc_khz: Option<u32>,
    /// KVM has the APIC timer's TSC-deadline mode, which it leaves out of the supported CPUID.
    pub tsc_deadline: bool,
}

/// More leaves than KVM's limit.
#[derive(Debug, Error)]
#[error("the guest would see more CPUID leaves than KVM takes")]
pub struct TooManyLeaves;

/// Leaf of the hypervisor's highest leaf and signature.
const HYPERVISOR: u32 = 0x4000_0000;
/// Timing leaf: EAX is the TSC's frequency in kHz, EBX the APIC bus's.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds (`APIC_BUS_CYCLE_NS`).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The CPUID of one vCPU, from `KVM_GET_SUPPORTED_CPUID`.
///
/// # Errors
/// More leaves than KVM takes.
pub fn vcpu_cpuid(supported: &CpuId, config: CpuidConfig) -> Result<CpuId, TooManyLeaves> {
    let mut leaves: Vec<_> = supported.as_slice().to_vec();
    let highest = leaves.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    // Both topology leaves are written anew: KVM's have one sub-leaf, and the host's numbers.
    leaves.retain(|e| !matches!(e.function, 0xb | 0x1f | HYPERVISOR_TIMING));
    for leaf in &mut leaves {
        adjust(leaf, config);
    }
    for function in [0xb, 0x1f].into_iter().filter(|f| *f <= highest) {
        leaves.extend(topology(function, config));
    }
    if let Some(tsc_khz) = config.tsc_khz {
        // Without the TSC-deadline mode a guest may take the APIC timer's frequency for leaf 0x15's crystal, which is
        // the TSC's here: it then measures both instead.
        add_timing(&mut leaves, if config.tsc_deadline { highest } else { 0 }, tsc_khz);
    }
    CpuId::from_entries(&leaves).map_err(|_| TooManyLeaves)
}

/// Bits that an APIC ID needs for the cores of one package.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Changes one leaf in place. Leaf numbers and bits: Intel SDM vol. 2A `CPUID`; AMD APM vol. 3 appendix E.
fn adjust(leaf: &mut kvm_cpuid_entry2, config: CpuidConfig) {
    let core_ids = 1 << core_bits(config.cpus);
    match (leaf.function, leaf.index) {
        (1, _) => {
            leaf.ebx = leaf.ebx & 0xffff | core_ids << 16 | config.apic_id << 24;
            set_bit(&mut leaf.ecx, 24, config.tsc_deadline);
            // "A hypervisor is here": Linux looks for the 0x4000_0000 leaves only then.
            set_bit(&mut leaf.ecx, 31, true);
            set_bit(&mut leaf.edx, 28, config.cpus > 1);
        }
        // Caches: level 3 is shared by all, the others by one thread; EAX[31:26] is cores per package less one.
        (4, _) if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { core_ids - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (core_ids - 1) << 26;
        }
        // No performance counters: KVM would save them on every exit, and Linux takes long to set them up.
        (0xa, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        (HYPERVISOR, _) => leaf.eax = leaf.eax.max(HYPERVISOR_TIMING),
        (0x8000_0008, _) => leaf.ecx = (config.cpus - 1) | core_bits(config.cpus) << 12,
        (0x8000_001d, _) if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { config.cpus - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        (0x8000_001e, _) => {
            (leaf.eax, leaf.ebx, leaf.ecx) = (config.apic_id, config.apic_id & 0xff, 0);
        }
        _ => {}
    }
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

/// Leaves 0xb and 0x1f: a thread level, a core level, and the end.
fn topology(function: u32, config: CpuidConfig) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let levels = [(0, 1, THREAD), (core_bits(config.cpus), config.cpus, CORE), (0, 0, 0)];
    let mut index = 0;
    levels.map(|(shift, processors, kind)| {
        let leaf = kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: index | kind,
            edx: config.apic_id,
            ..Default::default()
        };
        index += 1;
        leaf
    })
}

/// Tells the TSC's frequency, so that no guest has to measure it against a timer.
fn add_timing(leaves: &mut Vec<kvm_cpuid_entry2>, highest: u32, tsc_khz: u32) {
    let hypervisor = kvm_cpuid_entry2 {
        function: HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    };
    leaves.push(hypervisor);
    // Leaf 0x15 is crystal (ECX, Hz) × EBX / EAX. A ratio of one is exact, and cannot overflow Linux's 32 bits.
    let Some(hertz) = tsc_khz.checked_mul(1000).filter(|_| highest >= 0x15) else { return };
    leaves.retain(|e| e.function != 0x15);
    leaves.push(kvm_cpuid_entry2 { function: 0x15, eax: 1, ebx: 1, ecx: hertz, ..Default::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(cpus: u32, apic_id: u32) -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let supported =
            [leaf(0, 0x1f), leaf(1, 0), leaf(4, 0x163), leaf(0xa, 7), leaf(HYPERVISOR, 0x4000_0001)];
        let supported = CpuId::from_entries(&supported).unwrap();
        let config = CpuidConfig { apic_id, cpus, tsc_khz: Some(2_000_000), tsc_deadline: true };
        vcpu_cpuid(&supported, config).unwrap().as_slice().to_vec()
    }

    fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn apic_ids_stand_in_every_leaf_that_has_them() {
        let leaves = cpuid(3, 2);
        assert_eq!(leaf(&leaves, 1, 0).ebx >> 16, 2 << 8 | 4);
        for function in [0xb, 0x1f] {
            let core = leaf(&leaves, function, 1);
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        }
    }

    #[test]
    fn one_cpu_is_no_smp() {
        let leaves = cpuid(1, 0);
        assert_eq!(leaf(&leaves, 1, 0).edx >> 28 & 1, 0);
        assert_eq!(leaf(&leaves, 0xb, 1).eax, 0);
    }

    #[test]
    fn the_tsc_frequency_is_told_twice() {
        let leaves = cpuid(1, 0);
        assert_eq!(leaf(&leaves, HYPERVISOR_TIMING, 0).eax, 2_000_000);
        assert_eq!(leaf(&leaves, 0x15, 0).ecx, 2_000_000_000);
        assert_eq!(leaf(&leaves, HYPERVISOR, 0).eax, HYPERVISOR_TIMING);
    }

    #[test]
    fn caches_are_shared_by_the_package() {
        // Level 3 unified (0x163): shared by four cores.
        assert_eq!(leaf(&cpuid(4, 0), 4, 0).eax, 3 << 26 | 3 << 14 | 0x163);
    }
}
