//! The boot processor's first state: segments, control registers and page tables.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::image::Entry;
use super::layout::{GDT, PAGE_TABLES, PVH_START_INFO, RESET_VECTOR, ZERO_PAGE};

/// Segment descriptors of a flat memory model (Intel SDM, 3.4.5): null, 32-bit code, and 64-bit code and data at the
/// selectors that the boot protocol names, `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18.
const GDT_ENTRIES: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE32: u16 = 1;
const CODE64: u16 = 2;
const DATA: u16 = 3;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always one.
const RFLAGS: u64 = 2;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

/// `mov al, 0xfe; out 0x64, al; hlt`: the keyboard controller's reset line. The same in every mode.
const RESET_CODE: [u8; 5] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];

/// Writes what stands for the BIOS. A Linux with EFI support, told of hardware-reduced ACPI and given no `reboot=`,
/// reboots by a jump there (arch/x86/kernel/reboot.c: BOOT_EFI, then BOOT_BIOS), and would run on through zeros.
///
/// # Errors
/// It lies outside of guest memory.
pub fn write_reset_vector(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))
}

/// Writes what the registers of [`boot_sregs`] point to.
///
/// # Errors
/// The tables lie outside of guest memory.
pub fn write_tables(memory: &GuestMemoryMmap, entry: Entry) -> Result<(), GuestMemoryError> {
    for (i, descriptor) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT + 8 * i as u64))?;
    }
    match entry {
        Entry::Pvh(_) => Ok(()),
        Entry::Linux64(_) => write_page_tables(memory),
    }
}

/// Maps the first GiB to itself in 2 MiB pages: the kernel, `boot_params` and the command line must be mapped.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let (pml4, pdpt, directory) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let pages: Vec<u8> =
        (0..512u64).flat_map(|i| (i << 21 | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes()).collect();
    memory.write_slice(&pages, GuestAddress(directory))
}

/// General registers at the entry point.
#[must_use]
pub fn boot_regs(entry: Entry) -> kvm_regs {
    match entry {
        Entry::Pvh(rip) => {
            kvm_regs { rip: rip.into(), rbx: PVH_START_INFO, rflags: RFLAGS, ..Default::default() }
        }
        Entry::Linux64(rip) => kvm_regs { rip, rsi: ZERO_PAGE, rflags: RFLAGS, ..Default::default() },
    }
}

/// Turns the reset state of the special registers into that of the entry point. The rest (the APIC base) stays.
pub fn boot_sregs(sregs: &mut kvm_sregs, entry: Entry) {
    let code = match entry {
        Entry::Pvh(_) => CODE32,
        Entry::Linux64(_) => CODE64,
    };
    sregs.cs = segment(code);
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = segment(DATA);
    }
    // An available TSS with a base of 0: hardware refuses to enter a guest whose TR is no busy TSS.
    sregs.tr = kvm_segment { type_: 0xb, present: 1, limit: 0x67, ..Default::default() };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = size_of_val(&GDT_ENTRIES) as u16 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    if let Entry::Linux64(_) = entry {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
}

/// A segment register loaded with descriptor `index` of the GDT.
fn segment(index: u16) -> kvm_segment {
    let descriptor = GDT_ENTRIES[usize::from(index)];
    let bit = |n: u32| ((descriptor >> n) & 1) as u8;
    kvm_segment {
        base: 0,
        // Granularity is 4 KiB in every descriptor above.
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: ((descriptor >> 40) & 0xf) as u8,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_the_protocols_ask_for() {
        let (code64, data, code32) = (segment(CODE64), segment(DATA), segment(CODE32));
        assert_eq!((code64.l, code64.db, code64.type_, code64.selector), (1, 0, 0xb, 0x10));
        assert_eq!((code32.l, code32.db, code32.type_, code32.selector), (0, 1, 0xb, 8));
        assert_eq!((data.type_, data.s, data.present, data.g), (3, 1, 1, 1));
    }

    #[test]
    fn pvh_starts_without_paging() {
        let mut sregs = kvm_sregs::default();
        boot_sregs(&mut sregs, Entry::Pvh(0x100_0000));
        assert_eq!((sregs.cr0 & CR0_PG, sregs.efer), (0, 0));
        assert_eq!(boot_regs(Entry::Pvh(0x100_0000)).rbx, PVH_START_INFO);
    }

    #[test]
    fn page_tables_map_the_first_gib_to_itself() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory, Entry::Linux64(0x100_0000)).unwrap();
        let last: u64 = memory.read_obj(GuestAddress(PAGE_TABLES + 0x2000 + 511 * 8)).unwrap();
        assert_eq!(last, 511 << 21 | LARGE_PAGE | PRESENT_WRITABLE);
    }
}
