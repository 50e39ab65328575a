//! The tables as files for QEMU's firmware configuration device: ACPI with the script that tells firmware how to link it, SMBIOS
//! as entry point and structures.
//!
//! Firmware places each blob where it likes, adds its address to every pointer, and computes the checksums (the linker and
//! loader interface of QEMU, `hw/acpi/bios-linker-loader`). So the blob is made for address 0, where every pointer is an offset.

use super::{TableError, acpi, smbios};
use crate::board::Board;

/// Names of the files.
const RSDP: &str = "etc/acpi/rsdp";
const TABLES: &str = "etc/acpi/tables";
const SCRIPT: &str = "etc/table-loader";
const TPM_LOG: &str = "etc/tpm/log";
const SMBIOS_ANCHOR: &str = "etc/smbios/smbios-anchor";
const SMBIOS_TABLES: &str = "etc/smbios/smbios-tables";

/// The RSDP's size, and where its fields are (ACPI 6.5, section 5.2.5.3).
const RSDP_SIZE: usize = 36;
const RSDP_FIRST_PART: u32 = 20;
const RSDP_CHECKSUM: u32 = 8;
const RSDP_RSDT: usize = 16;
const RSDP_XSDT: usize = 24;
const RSDP_EXTENDED_CHECKSUM: u32 = 32;
/// A table's header (section 5.2.6).
const HEADER: usize = 36;
const LENGTH: usize = 4;
const CHECKSUM: usize = 9;
/// Pointers of the FADT: offset and size (section 5.2.9).
const FADT_POINTERS: [(usize, u8); 4] = [(36, 4), (40, 4), (132, 8), (140, 8)];
/// The TPM2 table's log area: where its length and address are (TCG ACPI Specification 1.3, section 8), and its size in bytes.
const LOG_LENGTH: usize = 64;
const LOG_ADDRESS: usize = 68;
const LOG_SIZE: u32 = 64 << 10;
/// Alignment of the blob: that of the FACS.
const ALIGNMENT: u32 = 64;
/// Most bytes of SMBIOS structures.
const SMBIOS_ROOM: u64 = 0xffff;

/// The files that hold `board`'s tables: name and contents.
///
/// # Errors
/// The machine cannot be described by them.
pub fn table_files(board: &Board) -> Result<Vec<(String, Vec<u8>)>, TableError> {
    let mut files = Vec::new();
    if board.acpi {
        let mut tables = acpi::build(board, 0)?;
        let script = Linker::link(&mut tables);
        files.push((RSDP.to_owned(), tables.get(..RSDP_SIZE).unwrap_or_default().to_vec()));
        files.push((TABLES.to_owned(), tables));
        files.push((SCRIPT.to_owned(), script));
        if board.tpm {
            files.push((TPM_LOG.to_owned(), vec![0; LOG_SIZE as usize]));
        }
    }
    let (anchor, structures) = smbios_files(&smbios::build(board, 0, SMBIOS_ROOM));
    files.push((SMBIOS_ANCHOR.to_owned(), anchor));
    files.push((SMBIOS_TABLES.to_owned(), structures));
    Ok(files)
}

/// The 64-bit entry point and the structures: OVMF takes SMBIOS 3 by no other (SMBIOS 3.6, section 5.2.2).
fn smbios_files(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let part = |start: u32, end: usize| bytes.get(start as usize..end).unwrap_or_default().to_vec();
    let entry_end = smbios::WIDE_ENTRY_OFFSET as usize + smbios::WIDE_ENTRY_SIZE;
    (part(smbios::WIDE_ENTRY_OFFSET, entry_end), part(smbios::STRUCTURES_OFFSET, bytes.len()))
}

/// Whether firmware allocates the blob below 1 MiB or anywhere below 4 GiB.
const BIOS_AREA: u8 = 2;
const HIGH: u8 = 1;

/// Writes the script while it walks the tables, whose checksums become zero.
struct Linker<'a> {
    tables: &'a mut [u8],
    script: Vec<u8>,
}

/// Bytes of a command, and of a file's name in it.
const COMMAND: usize = 128;
const NAME: usize = 56;

impl Linker<'_> {
    fn link(tables: &mut [u8]) -> Vec<u8> {
        let mut linker = Linker { tables, script: Vec::new() };
        linker.allocate(RSDP, 16, BIOS_AREA);
        linker.allocate(TABLES, ALIGNMENT, HIGH);
        let roots = [(linker.field(RSDP_RSDT, 4), 4), (linker.field(RSDP_XSDT, 8), 8)];
        for (root, size) in roots {
            linker.root(root, size);
        }
        linker.pointer(RSDP, RSDP_RSDT, 4);
        linker.pointer(RSDP, RSDP_XSDT, 8);
        for at in [RSDP_CHECKSUM, RSDP_EXTENDED_CHECKSUM] {
            linker.clear(at as usize);
        }
        linker.checksum(RSDP, RSDP_CHECKSUM, 0, RSDP_FIRST_PART);
        linker.checksum(RSDP, RSDP_EXTENDED_CHECKSUM, 0, RSDP_SIZE as u32);
        linker.script
    }

    /// RSDT or XSDT: everything after the header are pointers of `size` bytes. The XSDT names the same tables as the RSDT, so
    /// that the tables' own pointers are linked with the XSDT alone.
    fn root(&mut self, table: usize, size: u8) {
        let length = self.field(table + LENGTH, 4);
        for at in (HEADER..length).step_by(size.into()) {
            self.pointer(TABLES, table + at, size);
            let pointee = self.field(table + at, size);
            if size == 8 {
                match self.tables.get(pointee..pointee + 4) {
                    Some(b"FACP") => self.fadt(pointee),
                    Some(b"TPM2") => self.tpm2(pointee),
                    _ => {}
                }
            }
        }
        self.table_checksum(table, length);
    }

    fn fadt(&mut self, table: usize) {
        for (at, size) in FADT_POINTERS {
            if self.field(table + at, size) != 0 {
                self.pointer(TABLES, table + at, size);
            }
        }
        let length = self.field(table + LENGTH, 4);
        self.table_checksum(table, length);
    }

    /// Gives the TPM a log area, which firmware allocates for good.
    fn tpm2(&mut self, table: usize) {
        self.allocate(TPM_LOG, 1, HIGH);
        if let Some(length) = self.tables.get_mut(table + LOG_LENGTH..table + LOG_ADDRESS) {
            length.copy_from_slice(&LOG_SIZE.to_le_bytes());
        }
        self.pointer_to(TPM_LOG, TABLES, table + LOG_ADDRESS, 8);
        let length = self.field(table + LENGTH, 4);
        self.table_checksum(table, length);
    }

    fn table_checksum(&mut self, table: usize, length: usize) {
        self.clear(table + CHECKSUM);
        self.checksum(TABLES, (table + CHECKSUM) as u32, table as u32, length as u32);
    }

    fn field(&self, at: usize, size: u8) -> usize {
        let bytes = self.tables.get(at..at + usize::from(size)).unwrap_or_default();
        bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    }

    fn clear(&mut self, at: usize) {
        if let Some(byte) = self.tables.get_mut(at) {
            *byte = 0;
        }
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(1, &[&name(file), &alignment.to_le_bytes(), &[zone]]);
    }

    /// A pointer in `file` to the tables.
    fn pointer(&mut self, file: &str, at: usize, size: u8) {
        self.pointer_to(TABLES, file, at, size);
    }

    /// A pointer in `file` to `target`.
    fn pointer_to(&mut self, target: &str, file: &str, at: usize, size: u8) {
        self.command(2, &[&name(file), &name(target), &(at as u32).to_le_bytes(), &[size]]);
    }

    fn checksum(&mut self, file: &str, at: u32, start: u32, length: u32) {
        self.command(3, &[&name(file), &at.to_le_bytes(), &start.to_le_bytes(), &length.to_le_bytes()]);
    }

    fn command(&mut self, number: u32, fields: &[&[u8]]) {
        let start = self.script.len();
        self.script.extend(number.to_le_bytes());
        fields.iter().for_each(|field| self.script.extend(*field));
        self.script.resize(start + COMMAND, 0);
    }
}

fn name(file: &str) -> [u8; NAME] {
    let mut name = [0; NAME];
    name[..file.len()].copy_from_slice(file.as_bytes());
    name
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::fixture::board;

    fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
        bytes[at..at + size].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn set(bytes: &mut [u8], at: usize, size: usize, value: u64) {
        bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    fn file_name(command: &[u8], at: usize) -> String {
        String::from_utf8(command[at..at + NAME].iter().copied().take_while(|byte| *byte != 0).collect()).unwrap()
    }

    /// Does what firmware does: places the blobs at addresses of its own.
    fn run(files: &HashMap<String, Vec<u8>>) -> HashMap<String, (u64, Vec<u8>)> {
        let mut placed = HashMap::new();
        let mut next = 0x7000_0000;
        for command in files[SCRIPT].chunks_exact(COMMAND) {
            let file = file_name(command, 4);
            match number(command, 0, 4) {
                1 => {
                    let alignment = number(command, 60, 4);
                    assert!(alignment.is_power_of_two());
                    placed.insert(file.clone(), (next, files[&file].clone()));
                    next += 0x10_0000;
                }
                2 => {
                    let base = placed[&file_name(command, 60)].0;
                    let (at, size) = (number(command, 116, 4) as usize, command[120].into());
                    let bytes = &mut placed.get_mut(&file).unwrap().1;
                    let value = number(bytes, at, size) + base;
                    set(bytes, at, size, value);
                }
                3 => {
                    let [at, start, length] = [60, 64, 68].map(|at| number(command, at, 4) as usize);
                    let bytes = &mut placed.get_mut(&file).unwrap().1;
                    let sum = bytes[start..start + length].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                    bytes[at] = sum.wrapping_neg();
                }
                other => panic!("command {other}"),
            }
        }
        placed
    }

    fn files() -> HashMap<String, Vec<u8>> {
        table_files(&board()).unwrap().into_iter().collect()
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    #[test]
    fn linked_tables_are_those_that_are_built_in_place() {
        let placed = run(&files());
        let (base, tables) = &placed[TABLES];
        let mut expected = acpi::build(&board(), *base).unwrap();
        // The copy of the RSDP in the tables is nobody's.
        let mut tables = tables.clone();
        tables[..RSDP_SIZE].fill(0);
        let rsdp: Vec<u8> = expected.drain(..RSDP_SIZE).collect();
        assert!(tables[RSDP_SIZE..] == expected[..], "the tables");
        assert_eq!(placed[RSDP].1, rsdp);
        assert!(sums_to_zero(&rsdp) && sums_to_zero(&rsdp[..20]));
    }

    #[test]
    fn a_tpm_gets_a_log_area_of_its_own() {
        let with: HashMap<_, _> = table_files(&Board { tpm: true, ..board() }).unwrap().into_iter().collect();
        let placed = run(&with);
        let (base, tables) = &placed[TABLES];
        let xsdt = (number(&placed[RSDP].1, RSDP_XSDT, 8) - base) as usize;
        let pointers = tables[xsdt + HEADER..xsdt + number(tables, xsdt + LENGTH, 4) as usize].chunks_exact(8);
        let starts = pointers.map(|pointer| (number(pointer, 0, 8) - base) as usize);
        let tpm2 = starts.map(|at| &tables[at..]).find(|table| table.starts_with(b"TPM2")).unwrap();
        assert!(sums_to_zero(&tpm2[..number(tpm2, LENGTH, 4) as usize]));
        let (log, contents) = &placed[TPM_LOG];
        assert_eq!((number(tpm2, LOG_LENGTH, 4), number(tpm2, LOG_ADDRESS, 8)), (65536, *log));
        assert!(contents.len() == 65536 && contents.iter().all(|byte| *byte == 0));
        assert!(!files().contains_key(TPM_LOG), "without a TPM");
    }

    #[test]
    fn smbios_has_its_entry_point_apart() {
        let files = files();
        let (anchor, structures) = (&files[SMBIOS_ANCHOR], &files[SMBIOS_TABLES]);
        assert!(anchor.starts_with(b"_SM3_") && sums_to_zero(anchor));
        assert_eq!((anchor.len(), number(anchor, 12, 4)), (24, structures.len() as u64), "OVMF compares these");
        assert_eq!(structures[0], 0, "the first structure is the firmware's");
        assert_eq!(structures[structures.len() - 6..][..2], [127, 4], "the last one is the end");
    }

    #[test]
    fn without_acpi_there_is_nothing_to_link() {
        let files: HashMap<_, _> = table_files(&Board { acpi: false, ..board() }).unwrap().into_iter().collect();
        assert!(!files.contains_key(SCRIPT) && files.contains_key(SMBIOS_TABLES));
    }
}
