//! The PVH boot protocol's `hvm_start_info` (Xen, docs/misc/pvh.pandoc; `include/xen/interface/hvm/start_info.h`).

use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{CMDLINE, PVH_START_INFO};
use super::linux_boot::BootInfo;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Writes the start info, and the module list and memory map right behind it.
///
/// # Errors
/// It lies outside of guest memory.
pub fn write_start_info(memory: &GuestMemoryMmap, info: &BootInfo) -> Result<(), GuestMemoryError> {
    let modules = PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    let map = modules + size_of::<hvm_modlist_entry>() as u64;
    if let Some(initrd) = info.initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
        memory.write_obj(module, GuestAddress(modules))?;
    }
    let entries = info.memory_map.iter().map(|e| hvm_memmap_table_entry {
        addr: e.start,
        size: e.len,
        type_: e.kind as u32,
        reserved: 0,
    });
    for (i, entry) in entries.enumerate() {
        memory.write_obj(entry, GuestAddress(map + (i * size_of::<hvm_memmap_table_entry>()) as u64))?;
    }
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: info.initrd.is_some().into(),
        modlist_paddr: modules,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: info.rsdp,
        memmap_paddr: map,
        memmap_entries: info.memory_map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(start_info, GuestAddress(PVH_START_INFO))
}
