//! The tables of fixed layout: MADT, FADT, HPET, MCFG, FACS.

use super::super::{Bytes, ECAM, HPET, IO_APIC, LOCAL_APIC, SCI};
use super::{HEADER_SIZE, table};
use crate::board::Board;

pub(super) const FADT_SIZE: usize = 0x10c;
pub(super) const FACS_ALIGNMENT: usize = 64;

/// Ports of the power-management block and what is written to them.
const SMI_COMMAND: u32 = 0xb2;
const ACPI_ENABLE: u8 = 0xa0;
const ACPI_DISABLE: u8 = 0xa1;
const PM1A_EVENT: Register = Register { port: 0x400, bytes: 4, access: WORD };
const PM1A_CONTROL: Register = Register { port: 0x404, bytes: 2, access: WORD };
const PM_TIMER: Register = Register { port: 0x408, bytes: 4, access: DWORD };
/// General-purpose events, of which the first reports a new VM generation.
const GPE0: Register = Register { port: 0x40c, bytes: 4, access: BYTE };
const RESET: Register = Register { port: 0xcf9, bytes: 1, access: BYTE };
const RESET_VALUE: u8 = 6;
const ABSENT: Register = Register { port: 0, bytes: 0, access: UNDEFINED };

/// Access sizes of generic addresses (section 5.2.3.2).
const UNDEFINED: u8 = 0;
const BYTE: u8 = 1;
const WORD: u8 = 2;
const DWORD: u8 = 3;

/// A block of I/O ports.
struct Register {
    port: u16,
    bytes: u8,
    access: u8,
}

impl Register {
    fn narrow(&self) -> u32 {
        self.port.into()
    }
}

fn generic_address(table: &mut Bytes, register: &Register) {
    const SYSTEM_IO: u8 = 1;
    table.u8(SYSTEM_IO).u8(register.bytes * 8).u8(0).u8(register.access).u64(register.port.into());
}

/// The fixed ACPI description table, revision 5.1 (section 5.2.9).
pub(super) fn fadt(board: &Board, facs: u64, dsdt: u64) -> Vec<u8> {
    /// Latencies in µs beyond the limits: "there is no such state".
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;
    const CENTURY: u8 = 0x32;
    /// No VGA; no PCIe active-state power management.
    const BOOT_FLAGS: u16 = 1 << 2 | 1 << 4;
    /// WBINVD works; C1 works; no sleep button; 32-bit timer; reset register; headless; physical APIC destinations.
    const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 8 | 1 << 10 | 1 << 12 | 1 << 19;
    const MINOR_REVISION: u8 = 1;
    let gpe0 = if board.generation_id.is_some() { GPE0 } else { ABSENT };

    let mut fadt = Bytes::default();
    fadt.u32(facs as u32).u32(dsdt as u32).u8(0).u8(0).u16(SCI.into());
    fadt.u32(SMI_COMMAND).u8(ACPI_ENABLE).u8(ACPI_DISABLE).u8(0).u8(0);
    // PM1a and PM1b events, PM1a and PM1b control, PM2 control, timer, general-purpose events 0 and 1.
    fadt.u32(PM1A_EVENT.narrow()).u32(0).u32(PM1A_CONTROL.narrow()).u32(0).u32(0).u32(PM_TIMER.narrow());
    fadt.u32(gpe0.narrow()).u32(0);
    fadt.u8(PM1A_EVENT.bytes).u8(PM1A_CONTROL.bytes).u8(0).u8(PM_TIMER.bytes).u8(gpe0.bytes).u8(0).u8(0).u8(0);
    fadt.u16(NO_C2).u16(NO_C3).u16(0).u16(0).u8(0).u8(0).u8(0).u8(0).u8(CENTURY).u16(BOOT_FLAGS).u8(0).u32(FLAGS);
    generic_address(&mut fadt, &RESET);
    fadt.u8(RESET_VALUE).u16(0).u8(MINOR_REVISION).u64(facs).u64(dsdt);
    for register in [PM1A_EVENT, ABSENT, PM1A_CONTROL, ABSENT, ABSENT, PM_TIMER, gpe0, ABSENT] {
        generic_address(&mut fadt, &register);
    }
    fadt.zeros(FADT_SIZE - HEADER_SIZE - fadt.len()); // no sleep registers
    table(b"FACP", 5, b"BVFACP  ", &fadt.0)
}

/// Flags of interrupts in the MADT (section 5.2.12.5).
const CONFORMING: u16 = 0;
const EDGE_HIGH: u16 = 0b0101;
const LEVEL_LOW: u16 = 0b1111;

/// The multiple APIC description table (section 5.2.12).
pub(super) fn madt(board: &Board) -> Vec<u8> {
    const HAS_8259: u32 = 1;
    const NMI_PIN: u8 = 1;
    let mut madt = Bytes::default();
    madt.u32(LOCAL_APIC).u32(HAS_8259);
    let mut has_x2apic = false;
    for (uid, id) in (0u32..).zip(&board.apic_ids) {
        has_x2apic |= local_apic(&mut madt, board.x2apic, uid, *id);
    }
    madt.u8(1).u8(12).u8(0).u8(0).u32(IO_APIC).u32(0);
    interrupt_override(&mut madt, 0, 2, CONFORMING);
    interrupt_override(&mut madt, SCI, SCI.into(), LEVEL_LOW);
    const ALL: u8 = 0xff;
    madt.u8(4).u8(6).u8(ALL).u16(EDGE_HIGH).u8(NMI_PIN);
    if has_x2apic {
        madt.u8(10).u8(12).u16(EDGE_HIGH).u32(u32::MAX).u8(NMI_PIN).zeros(3);
    }
    table(b"APIC", 3, b"BVMADT  ", &madt.0)
}

/// One processor; returns whether it needed the form that has room for any id.
fn local_apic(madt: &mut Bytes, x2apic: bool, uid: u32, id: u32) -> bool {
    const ENABLED: u32 = 1;
    match (u8::try_from(uid), u8::try_from(id)) {
        (Ok(uid), Ok(id)) if !x2apic && id != 0xff && uid != 0xff => {
            madt.u8(0).u8(8).u8(uid).u8(id).u32(ENABLED);
            false
        }
        _ => {
            madt.u8(9).u8(16).u16(0).u32(id).u32(ENABLED).u32(uid);
            true
        }
    }
}

fn interrupt_override(madt: &mut Bytes, irq: u8, gsi: u32, flags: u16) {
    const ISA: u8 = 0;
    madt.u8(2).u8(10).u8(ISA).u8(irq).u32(gsi).u16(flags);
}

/// The HPET description table (IA-PC HPET specification 1.0a, section 3.2.4); `id` is the low half of the capabilities.
pub(super) fn hpet(id: u32) -> Vec<u8> {
    const SYSTEM_MEMORY: u8 = 0;
    const PAGE_IS_ITS_OWN: u8 = 1;
    let mut hpet = Bytes::default();
    hpet.u32(id).u8(SYSTEM_MEMORY).u8(0).u8(0).u8(0).u64(HPET.into());
    hpet.u8(0).u16(0).u8(PAGE_IS_ITS_OWN);
    table(b"HPET", 1, b"BVHPET  ", &hpet.0)
}

/// The PCI Express configuration table (PCI Firmware Specification 3.3, section 4.1.2): one segment, all buses.
pub(super) fn mcfg() -> Vec<u8> {
    let mut mcfg = Bytes::default();
    mcfg.zeros(8).u64(ECAM.start.0).u16(0).u8(0).u8(255).zeros(4);
    table(b"MCFG", 1, b"BVMCFG  ", &mcfg.0)
}

/// The firmware control structure (section 5.2.10): it has no checksum, the guest writes to it.
pub(super) fn facs() -> Vec<u8> {
    const SIZE: u32 = 64;
    const VERSION: u8 = 2;
    let mut facs = Bytes::default();
    facs.raw(b"FACS").u32(SIZE).u32(0).u32(0).u32(0).u32(0).u64(0).u8(VERSION);
    facs.zeros(SIZE as usize - facs.len());
    facs.0
}
