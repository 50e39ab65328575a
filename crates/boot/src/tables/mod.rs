//! The firmware tables: where they lie and how they get there.

mod acpi;
mod files;
mod mptable;
mod smbios;

pub use files::table_files;

use memory::{GuestMemory, MemoryError};
use platform::{GuestAddress, GuestRange};

use crate::board::Board;
use crate::e820::ONE_MIB;

/// Where the MP floating pointer structure lies.
pub const MPTABLE_BASE: u64 = 0xf0000;
/// Where the SMBIOS entry point lies.
pub const SMBIOS_BASE: u64 = 0xf1000;
/// Where the ACPI root pointer (RSDP) lies.
pub const ACPI_BASE: u64 = 0xf2400;
/// Where the VM generation counter's value lies, in a page that nothing else is in.
pub const GENERATION_ID_BASE: u64 = 0xff000;

/// The PCI Express configuration window: 256 buses.
pub(crate) const ECAM: GuestRange = GuestRange { start: GuestAddress(0xe000_0000), size: 0x1000_0000 };
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const HPET: u32 = 0xfed0_0000;
/// The ISA interrupt that reports ACPI events, level-triggered and active low.
const SCI: u8 = 9;
/// The registers of the TPM: locality 0 of its command response buffer.
const TPM: GuestRange = GuestRange { start: GuestAddress(0xfed4_0000), size: 0x1000 };
/// The physical presence interface of the TPM, a piece of memory.
const TPM_PPI: GuestRange = GuestRange { start: GuestAddress(0xfed4_5000), size: 0x400 };

/// Why a machine cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// A table outgrew the room between its fixed address and the next one.
    #[error("the {table} of this machine take {size} bytes, and there is room for {room}: use fewer devices or vCPUs")]
    TooLarge {
        /// Which tables.
        table: &'static str,
        /// Bytes they need.
        size: usize,
        /// Bytes there are.
        room: u64,
    },
    /// The MP table knows one PCI bus.
    #[error(
        "the MP table can describe PCI bus 0 only, and there are devices on bus {0}: give -Y to do without the table"
    )]
    MpBus(u8),
    /// A bus window that cannot be: beyond the end of its address space.
    #[error("the {kind} window of PCI bus {bus} ({size:#x} from {base:#x}) does not fit into its address space")]
    Window {
        /// The bus.
        bus: u8,
        /// I/O or memory.
        kind: &'static str,
        /// Its first port or address.
        base: u64,
        /// How many.
        size: u64,
    },
    /// There is no RAM where the tables belong.
    #[error("cannot write the {table} at {address:#x}: the machine needs at least 1 MiB of memory")]
    NoMemory {
        /// Which tables.
        table: &'static str,
        /// Where they belong.
        address: u64,
        /// The failed access.
        source: MemoryError,
    },
}

/// Writes the tables that `board` asks for into low memory.
///
/// # Errors
/// They do not fit, or the machine cannot be described by them; nothing is written then, unless it is RAM that is missing.
pub fn write_tables(board: &Board, memory: &GuestMemory) -> Result<(), TableError> {
    let mut tables = Vec::new();
    if board.mptable {
        tables.push(("MP table", MPTABLE_BASE, SMBIOS_BASE, mptable::build(board, MPTABLE_BASE, SMBIOS_BASE)?));
    }
    tables.push(("SMBIOS tables", SMBIOS_BASE, ACPI_BASE, smbios::build(board, SMBIOS_BASE, ACPI_BASE)));
    if board.acpi {
        tables.push(("ACPI tables", ACPI_BASE, GENERATION_ID_BASE, acpi::build(board, ACPI_BASE)?));
    }
    if let Some(id) = board.generation_id {
        tables.push(("VM generation counter", GENERATION_ID_BASE, ONE_MIB, id.to_vec()));
    }
    for (table, base, end, bytes) in &tables {
        let room = end - base;
        if bytes.len() as u64 > room {
            return Err(TableError::TooLarge { table, size: bytes.len(), room });
        }
    }
    for (table, base, _, bytes) in &tables {
        memory.write(*base, bytes).map_err(|source| TableError::NoMemory { table, address: *base, source })?;
    }
    Ok(())
}

/// Little-endian bytes in the making.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// Sets the byte at `at`, which is zero so far, so that all of `bytes` add up to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{board, bytes_at, memory_of};

    #[test]
    fn writes_what_the_board_asks_for_at_its_address() {
        let board = board();
        let memory = memory_of(&board);
        write_tables(&board, &memory).unwrap();
        assert_eq!(bytes_at(&memory, MPTABLE_BASE, 4), b"_MP_");
        assert_eq!(bytes_at(&memory, SMBIOS_BASE, 4), b"_SM_");
        assert_eq!(bytes_at(&memory, ACPI_BASE, 8), b"RSD PTR ");

        let board = Board { acpi: false, mptable: false, ..board };
        let memory = memory_of(&board);
        write_tables(&board, &memory).unwrap();
        assert_eq!(bytes_at(&memory, MPTABLE_BASE, 4), [0; 4]);
        assert_eq!(bytes_at(&memory, ACPI_BASE, 8), [0; 8]);
    }

    #[test]
    fn says_what_is_wrong() {
        let mut small = board();
        small.low_memory = 0x8000;
        let error = write_tables(&small, &memory_of(&small)).unwrap_err();
        assert!(error.to_string().contains("at least 1 MiB"), "{error}");

        let mut crowded = board();
        crowded.mptable = false;
        crowded.buses = (0..=255)
            .map(|number| {
                let route = crowded.buses[0].routes[0];
                let routes = (0..32).map(|slot| crate::InterruptRoute { slot, ..route }).collect();
                crate::PciBus { number, routes, ..Default::default() }
            })
            .collect();
        let error = write_tables(&crowded, &memory_of(&crowded)).unwrap_err();
        assert!(matches!(error, TableError::TooLarge { table: "ACPI tables", .. }), "{error}");
    }
}
