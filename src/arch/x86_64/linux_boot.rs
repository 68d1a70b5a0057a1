//! The 64-bit boot protocol's `boot_params` (Linux, Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::image::Image;
use super::layout::{CMDLINE, ZERO_PAGE};
use super::memory_map::Entry;

/// Where the initramfs is in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// First address, page-aligned.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// `type_of_loader`: a boot loader without a registered number.
const LOADER_UNDEFINED: u8 = 0xff;
/// What the header says when the kernel is an ELF file and has none of its own.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// What every boot protocol tells the kernel.
pub struct BootInfo<'a> {
    /// The kernel.
    pub image: &'a Image,
    /// Bytes of the command line, without its NUL.
    pub cmdline_len: usize,
    /// The initramfs.
    pub initrd: Option<Initrd>,
    /// The memory map.
    pub memory_map: &'a [Entry],
    /// The address of the ACPI RSDP.
    pub rsdp: u64,
}

/// Writes `boot_params`. A map of more than 128 entries is cut; ours has four.
///
/// # Errors
/// The zero page is outside of guest memory.
pub fn write_boot_params(memory: &GuestMemoryMmap, info: &BootInfo) -> Result<(), GuestMemoryError> {
    let mut params = boot_params { acpi_rsdp_addr: info.rsdp, ..Default::default() };
    match info.image.setup_header {
        Some(header) => params.hdr = header,
        None => {
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.header = HEADER_MAGIC;
            params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
        }
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = info.cmdline_len as u32 + 1;
    if let Some(initrd) = info.initrd {
        // Both are below 2 GiB: `layout::INITRD_MAX`.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    for (slot, e) in params.e820_table.iter_mut().zip(info.memory_map) {
        *slot = boot_e820_entry { addr: e.start, size: e.len, r#type: e.kind as u32 };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE))
}
