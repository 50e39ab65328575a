//! What only some machines have: SPCR and TPM2, and the devices of the DSDT that are on no bus.

use super::super::{Bytes, GENERATION_ID_BASE, TPM};
use super::aml::{Resource, Seg, Term, absolute, device, int, method, name, notify, package, resources, scope, string};
use super::{ppi, table};
use crate::board::Board;

const GENERATION_COUNTER: Seg = *b"GENC";

/// The serial port console redirection table, version 2: COM1, 115200 bits per second, 8 bits, no parity, 1 stop bit.
pub(super) fn spcr() -> Vec<u8> {
    const SIXTEEN_550: u8 = 0;
    const PIC_AND_IO_APIC: u8 = 1 << 0 | 1 << 1;
    const IRQ: u8 = 4;
    const BAUD_115200: u8 = 7;
    const ONE_STOP_BIT: u8 = 1;
    const ANSI: u8 = 3;
    let mut spcr = Bytes::default();
    spcr.u8(SIXTEEN_550).zeros(3);
    spcr.u8(1).u8(8).u8(0).u8(1).u64(0x3f8); // ports, of 8 bits
    spcr.u8(PIC_AND_IO_APIC).u8(IRQ).u32(IRQ.into());
    spcr.u8(BAUD_115200).u8(0).u8(ONE_STOP_BIT).u8(0).u8(ANSI).u8(0);
    spcr.u16(0xffff).u16(0xffff).u8(0).u8(0).u8(0); // no PCI device
    spcr.u32(0).u8(0).u32(0);
    table(b"SPCR", 2, b"BVSPCR  ", &spcr.0)
}

/// The TPM2 table, revision 4 (TCG ACPI Specification 1.3, section 8): a client platform with a command response buffer.
/// Without an area for the event log: who hands the tables to firmware as files adds one.
pub(super) fn tpm2() -> Vec<u8> {
    const CLIENT: u16 = 0;
    const CONTROL_AREA: u64 = TPM.start.0 + 0x40;
    const COMMAND_RESPONSE_BUFFER: u32 = 7;
    let mut tpm2 = Bytes::default();
    tpm2.u16(CLIENT).u16(0).u64(CONTROL_AREA).u32(COMMAND_RESPONSE_BUFFER).zeros(12).u32(0).u64(0);
    table(b"TPM2", 4, b"BVTPM2  ", &tpm2.0)
}

/// The devices directly below `\_SB`.
pub(super) fn devices(board: &Board) -> Vec<Term> {
    let mut list = Vec::new();
    if board.generation_id.is_some() {
        list.push(generation_counter());
    }
    if board.fw_cfg {
        list.push(fw_cfg());
    }
    if board.tpm {
        list.push(tpm());
    }
    list
}

/// Handlers of general-purpose events: the first one says that the generation counter has changed.
pub(super) fn events(board: &Board) -> Option<Term> {
    const CHANGED: u8 = 0x80;
    let counter = absolute(&[*b"_SB_", GENERATION_COUNTER]);
    let handler = method(*b"_E00", 0, [notify(counter, CHANGED)]);
    board.generation_id.map(|_| scope(absolute(&[*b"_GPE"]), [handler]))
}

/// The VM generation counter (Microsoft's "Virtual Machine Generation ID"); `ADDR` is where it lies.
fn generation_counter() -> Term {
    device(
        GENERATION_COUNTER,
        [
            name(*b"_HID", string("Bhyve_V_Gen_Counter_V1")),
            name(*b"_CID", string("VM_Gen_Counter")),
            name(*b"_DDN", string("VM_Gen_Counter")),
            name(*b"ADDR", package(vec![int(GENERATION_ID_BASE), int(0u8)])),
        ],
    )
}

fn fw_cfg() -> Term {
    const PRESENT: u8 = 0x0b;
    device(
        *b"FWCF",
        [
            name(*b"_HID", string("QEMU0002")),
            name(*b"_STA", int(PRESENT)),
            // Selector, data, DMA address.
            name(*b"_CRS", resources([Resource::ports(0x510, 12)])),
        ],
    )
}

fn tpm() -> Term {
    const PRESENT: u8 = 0x0f;
    let mut terms = vec![
        name(*b"_HID", string("MSFT0101")),
        name(*b"_CID", string("MSFT0101")),
        name(*b"_UID", int(1u8)),
        name(*b"_STA", int(PRESENT)),
        name(*b"_CRS", resources([Resource::memory32(TPM.start.0 as u32, TPM.size as u32)])),
    ];
    terms.extend(ppi::terms());
    device(*b"TPM_", terms)
}
