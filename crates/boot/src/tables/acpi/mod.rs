//! ACPI tables: a chain of pointers from the RSDP to everything else.

mod affinity;
mod aml;
mod dsdt;
mod fixed;
mod isa;
mod optional;
mod ppi;

use super::{Bytes, TableError, set_checksum};
use crate::board::Board;

const OEM_ID: &[u8; 6] = b"BHYVE ";
const OEM_REVISION: u32 = 1;
const CREATOR: &[u8; 4] = b"BASL";
const CREATOR_REVISION: u32 = 0x2022_0504;

const HEADER_SIZE: usize = 36;
const RSDP_SIZE: usize = 36;
const ALIGNMENT: usize = 16;

/// A table with the common header (ACPI 6.5, section 5.2.6).
fn table(signature: &[u8; 4], revision: u8, oem_table_id: &[u8; 8], body: &[u8]) -> Vec<u8> {
    let mut table = Bytes::default();
    table.raw(signature).u32((HEADER_SIZE + body.len()) as u32).u8(revision).u8(0);
    table.raw(OEM_ID).raw(oem_table_id).u32(OEM_REVISION).raw(CREATOR).u32(CREATOR_REVISION);
    table.raw(body);
    set_checksum(&mut table.0, 9);
    table.0
}

/// Tables in the making, one after the other from a base address.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table and returns its address.
    fn put(&mut self, alignment: usize, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }

    /// Overwrites what is at `address`.
    fn replace(&mut self, address: u64, table: &[u8]) {
        let at = (address - self.base) as usize;
        self.bytes[at..at + table.len()].copy_from_slice(table);
    }
}

/// All ACPI tables of `board`, for address `base`: RSDP, RSDT, XSDT, MADT, FADT, HPET, MCFG, then what only some
/// machines have (SPCR, SRAT, TPM2), FACS, DSDT.
pub(super) fn build(board: &Board, base: u64) -> Result<Vec<u8>, TableError> {
    let dsdt = table(b"DSDT", 2, b"BVDSDT  ", &dsdt::body(board)?);
    let mut others: Vec<Vec<u8>> = board.hpet.map(fixed::hpet).into_iter().collect();
    others.push(fixed::mcfg());
    others.extend(board.lpc.filter(|lpc| lpc.uarts[0]).map(|_| optional::spcr()));
    if !board.numa.is_empty() {
        others.push(affinity::srat(board));
    }
    if board.tpm {
        others.push(optional::tpm2());
    }

    // The root tables point to what follows, so they get their place first and their contents last.
    let mut area = Area { base, bytes: Vec::new() };
    let listed = 2 + others.len();
    let rsdp = area.put(ALIGNMENT, &[0; RSDP_SIZE]);
    let rsdt = area.put(ALIGNMENT, &vec![0; HEADER_SIZE + 4 * listed]);
    let xsdt = area.put(ALIGNMENT, &vec![0; HEADER_SIZE + 8 * listed]);
    let madt = area.put(ALIGNMENT, &fixed::madt(board));
    let fadt = area.put(ALIGNMENT, &[0; fixed::FADT_SIZE]);
    let mut list = vec![madt, fadt];
    list.extend(others.iter().map(|table| area.put(ALIGNMENT, table)));
    let facs = area.put(fixed::FACS_ALIGNMENT, &fixed::facs());
    let dsdt = area.put(ALIGNMENT, &dsdt);

    area.replace(fadt, &fixed::fadt(board, facs, dsdt));
    let narrow: Vec<u8> = list.iter().flat_map(|address| (*address as u32).to_le_bytes()).collect();
    area.replace(rsdt, &table(b"RSDT", 1, b"BVRSDT  ", &narrow));
    let wide: Vec<u8> = list.iter().flat_map(|address| address.to_le_bytes()).collect();
    area.replace(xsdt, &table(b"XSDT", 1, b"BVXSDT  ", &wide));
    area.replace(rsdp, &root_pointer(rsdt, xsdt));
    Ok(area.bytes)
}

/// The root system description pointer (section 5.2.5.3).
fn root_pointer(rsdt: u64, xsdt: u64) -> Vec<u8> {
    const REVISION: u8 = 2;
    const FIRST_PART: usize = 20;
    let mut pointer = Bytes::default();
    pointer.raw(b"RSD PTR ").u8(0).raw(OEM_ID).u8(REVISION).u32(rsdt as u32);
    pointer.u32(RSDP_SIZE as u32).u64(xsdt).u8(0).zeros(3);
    set_checksum(&mut pointer.0[..FIRST_PART], 8);
    set_checksum(&mut pointer.0, 32);
    pointer.0
}

#[cfg(test)]
mod tests;
