//! x86-64: the memory layout, the boot protocols, CPUID, MSRs, registers and ACPI.

pub mod acpi;
pub mod cmdline;
pub mod cpuid;
pub mod elf;
pub mod image;
pub mod layout;
pub mod linux_boot;
pub mod memory_map;
pub mod msrs;
pub mod pvh;
pub mod registers;
