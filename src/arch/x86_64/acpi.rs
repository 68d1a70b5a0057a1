//! The ACPI tables: RSDP, XSDT, FADT, MADT and DSDT (ACPI 6.5).
//!
//! The machine is "hardware-reduced" (ACPI 6.5, 4.1): no timer, no PM block, no SCI. Linux then asks for no PIT, no
//! 8259 PIC, no CMOS clock and no keyboard controller, which spares both the guest's probing and KVM's devices.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{self, VirtioSlot};

const OEM: [u8; 6] = *b"MICROV";
const TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;

/// `SLP_TYP` of S5 in our `\_S5` object.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;

/// FADT `IAPC_BOOT_ARCH`: no VGA to probe, and no CMOS clock. The bits for legacy devices and 8042 are off.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Which devices the tables tell of.
#[derive(Clone, Copy, Debug)]
pub struct AcpiConfig<'a> {
    /// Number of vCPUs, at most 254; APIC IDs count from 0.
    pub cpus: u32,
    /// COM1 is there.
    pub serial: bool,
    /// The virtio-mmio devices to tell of.
    pub virtio: &'a [VirtioSlot],
    /// The machine is hardware-reduced. Linux then has no interrupt but those that the tables describe: a kernel that is
    /// told of devices in another way needs a machine that is not, with ISA's interrupts.
    pub hardware_reduced: bool,
}

/// The tables could not be written.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// More tables than the BIOS area holds.
    #[error("the ACPI tables take {0} bytes, more than the BIOS area holds")]
    TooLarge(u64),
    /// Outside of guest memory.
    #[error("the ACPI tables do not fit guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the tables and returns the address of the RSDP.
///
/// # Errors
/// They do not fit.
pub fn write_tables(memory: &GuestMemoryMmap, config: AcpiConfig) -> Result<u64, AcpiError> {
    // The RSDP stands first: an operating system without a better hint scans the area from its start.
    let mut next = layout::ACPI_TABLES + Rsdp::len() as u64;
    let mut place = |bytes: Vec<u8>| -> Result<u64, AcpiError> {
        let address = next.next_multiple_of(16);
        next = address + bytes.len() as u64;
        let used = next - layout::ACPI_TABLES;
        if used > layout::ACPI_TABLES_LEN {
            return Err(AcpiError::TooLarge(used));
        }
        memory.write_slice(&bytes, GuestAddress(address))?;
        Ok(address)
    };
    let dsdt = place(dsdt(config))?;
    let fadt = place(fadt(dsdt, config.hardware_reduced))?;
    let madt = place(madt(config.cpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(layout::ACPI_TABLES))?;
    Ok(layout::ACPI_TABLES)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64, hardware_reduced: bool) -> Vec<u8> {
    let port = |offset| {
        let address = u64::from(layout::ACPI_PM_PORT) + offset;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
    };
    let mut fadt =
        FADTBuilder::new(OEM, TABLE, REVISION).dsdt_64(dsdt).flag(Flags::ResetRegSup).flag(Flags::Wbinvd);
    if hardware_reduced {
        fadt = fadt.flag(Flags::HwReducedAcpi);
    }
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(2);
    fadt.reset_value = RESET_VALUE;
    bytes(&fadt.finalize())
}

fn madt(cpus: u32) -> Vec<u8> {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LAPIC));
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

fn dsdt(config: AcpiConfig) -> Vec<u8> {
    let mut aml_code = Vec::new();
    let s5 = Package::new(vec![&S5_SLEEP_TYPE, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml_code);
    let io = |port, len| IO::new(port, port, 1, len);
    if config.serial {
        let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
        let ports = io(layout::SERIAL_PORT, layout::SERIAL_LEN as u8);
        let id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
        let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt, &ports]));
        let serial = Device::new("COM1".into(), vec![&id, &resources]);
        Scope::new("\\_SB_".into(), vec![&serial]).to_aml_bytes(&mut aml_code);
    }
    let id = Name::new("_HID".into(), &"QEMU0001");
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io(layout::PVPANIC_PORT, 1)]));
    let pvpanic = Device::new("PEVT".into(), vec![&id, &resources]);
    Scope::new("\\_SB_".into(), vec![&pvpanic]).to_aml_bytes(&mut aml_code);
    for (slot, uid) in config.virtio.iter().zip(0..) {
        add_virtio_device(&mut aml_code, *slot, uid);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&aml_code);
    dsdt.as_slice().to_vec()
}

/// Adds a virtio-mmio device, as `drivers/virtio/virtio_mmio.c` looks for it.
fn add_virtio_device(aml_code: &mut Vec<u8>, slot: VirtioSlot, uid: u32) {
    let memory = Memory32Fixed::new(true, slot.address as u32, layout::VIRTIO_MMIO_LEN as u32);
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi);
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let uid_name = Name::new("_UID".into(), &uid);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &interrupt]));
    let device = Device::new(format!("V{uid:03}").as_str().into(), vec![&hid, &uid_name, &resources]);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(aml_code);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_adds_up_to_zero() {
        let config = AcpiConfig { cpus: 32, serial: true, virtio: &[], hardware_reduced: true };
        let rsdp = bytes(&Rsdp::new(OEM, 0xe_1000));
        for table in [dsdt(config), fadt(0xe_0040, true), madt(32), rsdp] {
            let sum = table.iter().fold(0u8, |a, b| a.wrapping_add(*b));
            assert_eq!(sum, 0, "{:?}", String::from_utf8_lossy(&table[..4]));
        }
    }

    #[test]
    fn the_rsdp_is_found_by_scanning() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let rsdp =
            write_tables(&memory, AcpiConfig { cpus: 1, serial: false, virtio: &[], hardware_reduced: true })
                .unwrap();
        let mut signature = [0; 8];
        memory.read_slice(&mut signature, GuestAddress(rsdp)).unwrap();
        assert_eq!((rsdp % 16, &signature), (0, b"RSD PTR "));
    }

    #[test]
    fn the_machine_is_hardware_reduced_where_it_may() {
        let flags = |table: &[u8]| u32::from_le_bytes(table[112..116].try_into().unwrap());
        assert_eq!(flags(&fadt(0, true)) >> 20 & 1, 1);
        assert_eq!(flags(&fadt(0, false)) >> 20 & 1, 0);
    }

    #[test]
    fn all_virtio_devices_fit() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let slots: Vec<_> = layout::virtio_slots().collect();
        assert_eq!(slots.len(), layout::MAX_VIRTIO_DEVICES);
        write_tables(&memory, AcpiConfig { cpus: 32, serial: true, virtio: &slots, hardware_reduced: true })
            .unwrap();
        let code = dsdt(AcpiConfig { cpus: 1, serial: true, virtio: &slots, hardware_reduced: true });
        assert_eq!(code.windows(8).filter(|w| w == b"LNRO0005").count(), slots.len());
    }

    #[test]
    fn lengths_are_right() {
        for table in [
            dsdt(AcpiConfig { cpus: 4, serial: true, virtio: &[], hardware_reduced: true }),
            fadt(0, false),
            madt(4),
        ] {
            let length = u32::from_le_bytes(table[4..8].try_into().unwrap());
            assert_eq!(length as usize, table.len());
        }
    }
}
