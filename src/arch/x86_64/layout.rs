//! The guest-physical address map and the ports.
//!
//! ```text
//! 0x0000_0500  GDT                       0x0000_9000  page tables (64-bit entry only)
//! 0x0000_6000  PVH start info            0x0002_0000  kernel command line
//! 0x0000_7000  Linux boot parameters     0x000e_0000  ACPI tables (found by scanning, too)
//! 0x000f_fff0  what stands for the BIOS: a reset
//! 0x0010_0000  kernel ... memory ... initramfs at the end of low memory, at most 3 GiB
//! 0xc000_0000  no memory: virtio devices at 0xe000_0000, IOAPIC, local APIC
//! 0x1_0000_0000  memory above 3 GiB goes on here
//! ```

/// The GDT that the 64-bit and PVH entries start with.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol, with its module list and memory map behind it.
pub const PVH_START_INFO: u64 = 0x6000;
/// `boot_params`, the "zero page" of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// PML4, PDPT and page directory for the 64-bit entry.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// End of the memory that firmware would leave to the system below 640 KiB.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, in the BIOS area where an operating system without a better hint looks for the RSDP.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for ACPI tables, up to the reset vector.
pub const ACPI_TABLES_LEN: u64 = RESET_VECTOR - ACPI_TABLES;
/// Where a PC's processor starts after a reset, and where Linux jumps when it resets through the BIOS.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory for the kernel starts.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Start of the gap below 4 GiB that holds devices instead of memory.
pub const GAP_START: u64 = 0xc000_0000;
/// Memory goes on here.
pub const GAP_END: u64 = 0x1_0000_0000;
/// The I/O APIC, as KVM's in-kernel one has it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for real mode (KVM API, `KVM_SET_TSS_ADDR`), in the gap below the BIOS area.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// An initrd must end below this: the default `initrd_addr_max` of the Linux boot protocol.
pub const INITRD_MAX: u64 = 0x8000_0000;

/// Registers of the first virtio-mmio device; the others follow.
const VIRTIO_MMIO: u64 = 0xe000_0000;
/// Length of a virtio-mmio device's registers, configuration space included.
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;
/// Interrupts of virtio devices: the I/O APIC's pins behind COM1's. Edge-triggered lines cannot be shared.
const VIRTIO_GSIS: std::ops::RangeInclusive<u32> = 5..=23;
/// How many virtio devices a VM has room for.
pub const MAX_VIRTIO_DEVICES: usize = 19;

/// Where a virtio-mmio device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// The places for virtio-mmio devices, in order.
pub fn virtio_slots() -> impl Iterator<Item = VirtioSlot> {
    let addresses = (0..).map(|i| VIRTIO_MMIO + i * VIRTIO_MMIO_LEN);
    addresses.zip(VIRTIO_GSIS).map(|(address, gsi)| VirtioSlot { address, gsi })
}

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's registers.
pub const SERIAL_LEN: u16 = 8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller, there for its reset line alone.
pub const I8042_PORT: u16 = 0x60;
/// Data at 0x60, command at 0x64.
pub const I8042_LEN: u16 = 5;
/// Timeline marks.
pub const MARK_PORT: u16 = 0x80;
/// The pvpanic device, where QEMU has it.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers, a byte each.
pub const ACPI_PM_PORT: u16 = 0x600;
/// The three registers.
pub const ACPI_PM_LEN: u16 = 3;
