//! SMBIOS 3.0 tables: who made the machine, its sockets, caches and memory. Firmware and `dmidecode` read them.
//!
//! There are both entry points: the 32-bit one, which bhyve's firmware looks for, and the 64-bit one.

use memory::HIGH_MEMORY_BASE;

use super::{Bytes, set_checksum};
use crate::board::{Board, Cache, CacheKind};

const VERSION: (u8, u8) = (3, 0);
/// The 32-bit entry point is 31 bytes, the 64-bit one 24; each begins on a 16-byte boundary, and so do the structures.
pub(super) const WIDE_ENTRY_OFFSET: u32 = 0x20;
pub(super) const WIDE_ENTRY_SIZE: usize = 24;
pub(super) const STRUCTURES_OFFSET: u32 = 0x40;
/// "There is no such structure", where a handle is asked for.
const NO_HANDLE: u16 = 0xffff;
/// "No error information", where a handle of it is asked for.
const NO_ERROR_HANDLE: u16 = 0xfffe;

/// Handles of the structures that others refer to.
const CHASSIS_HANDLE: u16 = 0x300;
const CACHE_HANDLE: u16 = 0x700;
const MEMORY_ARRAY_HANDLE: u16 = 0x1000;
const MEMORY_ERROR_HANDLE: u16 = 0x1200;

/// One structure: a formatted part that refers to strings by number, then the strings.
struct Structure {
    body: Bytes,
    strings: Bytes,
    count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let mut body = Bytes::default();
        body.u8(kind).u8(0).u16(handle);
        Self { body, strings: Bytes::default(), count: 0 }
    }

    /// Adds a string to the set and its number to the formatted part; an empty string has number 0.
    fn string(&mut self, text: &str) -> &mut Self {
        // A NUL would end the string, and the set has numbers up to 255; text as long as SMBIOS 2 allows is enough.
        let text: Vec<u8> = text.bytes().filter(|byte| *byte != 0).take(64).collect();
        if text.is_empty() {
            self.body.u8(0);
        } else {
            self.count += 1;
            self.body.u8(self.count);
            self.strings.raw(&text).u8(0);
        }
        self
    }

    fn finish(mut self) -> Vec<u8> {
        self.body.0[1] = self.body.len() as u8;
        let end = if self.count == 0 { 2 } else { 1 };
        self.body.raw(&self.strings.0).zeros(end);
        self.body.0
    }
}

/// The entry points for address `base`, followed by the structures. Sockets that do not fit before `end` are left out.
pub(super) fn build(board: &Board, base: u64, end: u64) -> Vec<u8> {
    let mut structures = vec![bios(board), system(board), baseboard(board), chassis(board)];
    structures.extend((0..).zip(&board.caches).map(|(index, data)| cache(index, data)));
    structures.push(memory_array(board));
    structures.push(memory_error());
    let ranges = [(0, board.low_memory), (HIGH_MEMORY_BASE, board.high_memory)];
    for (index, (start, size)) in (0..).zip(ranges.into_iter().filter(|range| range.1 > 0)) {
        structures.push(memory_device(index, size));
        structures.push(memory_range(index, start, size));
    }
    structures.push(boot_information());
    let last = Structure::new(127, 0x7f00).finish();

    let used = structures.iter().map(Vec::len).sum::<usize>() + last.len() + STRUCTURES_OFFSET as usize;
    let mut room = usize::try_from(end.saturating_sub(base)).unwrap_or(0).saturating_sub(used);
    for socket in 0..board.topology.sockets {
        let structure = processor(board, socket);
        let Some(left) = room.checked_sub(structure.len()) else { break };
        room = left;
        structures.push(structure);
    }
    structures.push(last);

    let table = base as u32 + STRUCTURES_OFFSET;
    let mut bytes = entry_point(&structures, table);
    bytes.resize(WIDE_ENTRY_OFFSET as usize, 0);
    bytes.extend(wide_entry_point(&structures, table));
    bytes.resize(STRUCTURES_OFFSET as usize, 0);
    bytes.extend(structures.concat());
    bytes
}

/// The 32-bit entry point structure (section 5.2.1).
fn entry_point(structures: &[Vec<u8>], table: u32) -> Vec<u8> {
    let largest = structures.iter().map(Vec::len).max().unwrap_or(0) as u16;
    let total = structures.iter().map(Vec::len).sum::<usize>() as u16;
    let mut entry = Bytes::default();
    entry.raw(b"_SM_").u8(0).u8(0x1f).u8(VERSION.0).u8(VERSION.1).u16(largest).u8(0).zeros(5);
    entry.raw(b"_DMI_").u8(0).u16(total).u32(table).u16(structures.len() as u16).u8(VERSION.0 << 4 | VERSION.1);
    set_checksum(&mut entry.0[16..], 5);
    set_checksum(&mut entry.0, 4);
    entry.0
}

/// The 64-bit entry point structure (section 5.2.2).
fn wide_entry_point(structures: &[Vec<u8>], table: u32) -> Vec<u8> {
    const REVISION: u8 = 1;
    let total = structures.iter().map(Vec::len).sum::<usize>() as u32;
    let mut entry = Bytes::default();
    entry
        .raw(b"_SM3_")
        .u8(0)
        .u8(0x18)
        .u8(VERSION.0)
        .u8(VERSION.1)
        .u8(0)
        .u8(REVISION)
        .u8(0)
        .u32(total)
        .u64(table.into());
    set_checksum(&mut entry.0, 5);
    entry.0
}

fn bios(board: &Board) -> Vec<u8> {
    /// ISA, PCI, shadowing, CD boot, selectable boot, EDD.
    const CHARACTERISTICS: u64 = 1 << 4 | 1 << 7 | 1 << 12 | 1 << 15 | 1 << 16 | 1 << 19;
    const ACPI: u8 = 1 << 0;
    const BIOS_BOOT_SPECIFICATION: u8 = 1 << 0;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    const NO_RELEASE: u8 = 0xff;
    let mut bios = Structure::new(0, 0);
    bios.string(&board.smbios.bios_vendor).string(&board.smbios.bios_version);
    bios.body.u16(0xf000);
    bios.string(&board.smbios.bios_release_date);
    bios.body.u8(0).u64(CHARACTERISTICS).u8(ACPI).u8(BIOS_BOOT_SPECIFICATION | VIRTUAL_MACHINE);
    bios.body.raw(&[0, 0, NO_RELEASE, NO_RELEASE]);
    bios.finish()
}

fn system(board: &Board) -> Vec<u8> {
    const POWER_SWITCH: u8 = 6;
    let names = &board.smbios;
    let mut system = Structure::new(1, 0x100);
    system.string(&names.system_manufacturer).string(&names.system_product_name);
    system.string(&names.system_version).string(&names.system_serial_number);
    // The first three fields are little-endian numbers (section 7.2.1).
    let [a, b, c, d, e, f, g, h, rest @ ..] = board.uuid;
    system.body.raw(&[d, c, b, a, f, e, h, g]).raw(&rest);
    system.body.u8(POWER_SWITCH);
    system.string(&names.system_sku).string(&names.system_family_name);
    system.finish()
}

fn baseboard(board: &Board) -> Vec<u8> {
    const HOSTING_BOARD: u8 = 1;
    const MOTHERBOARD: u8 = 0x0a;
    let names = &board.smbios;
    let mut baseboard = Structure::new(2, 0x200);
    baseboard.string(&names.board_manufacturer).string(&names.board_product_name);
    baseboard.string(&names.board_version).string(&names.board_serial_number).string(&names.board_asset_tag);
    baseboard.body.u8(HOSTING_BOARD);
    baseboard.string(&names.board_location);
    baseboard.body.u16(CHASSIS_HANDLE).u8(MOTHERBOARD).u8(0);
    baseboard.finish()
}

fn chassis(board: &Board) -> Vec<u8> {
    const UNKNOWN: u8 = 2;
    const SAFE: u8 = 3;
    const NO_SECURITY: u8 = 3;
    let names = &board.smbios;
    let mut chassis = Structure::new(3, CHASSIS_HANDLE);
    chassis.string(&names.chassis_manufacturer);
    chassis.body.u8(UNKNOWN);
    chassis.string(&names.chassis_version).string(&names.chassis_serial_number).string(&names.chassis_asset_tag);
    chassis.body.raw(&[SAFE, SAFE, SAFE, NO_SECURITY]).u32(0).raw(&[0, 0, 0, 0]);
    chassis.string(&names.chassis_sku);
    chassis.finish()
}

fn processor(board: &Board, socket: u32) -> Vec<u8> {
    const CENTRAL_PROCESSOR: u8 = 3;
    const UNKNOWN: u8 = 2;
    const POPULATED_ENABLED: u8 = 0x41;
    const IS_64_BIT: u16 = 1 << 2;
    // Beyond 255, "see the wide field".
    let count = |number: u32| u8::try_from(number).unwrap_or(0xff);
    let wide = |number: u32| u16::try_from(number).unwrap_or(0xfffe);
    let (all_cores, all_threads) = (board.topology.cores, board.topology.cores.saturating_mul(board.topology.threads));
    let (cores, threads) = (count(all_cores), count(all_threads));
    let cache = |level| {
        let of_level = |cache: &&(u16, &Cache)| cache.1.level == level && cache.1.kind != CacheKind::Instruction;
        (CACHE_HANDLE..).zip(&board.caches).find(|cache| of_level(&cache)).map_or(NO_HANDLE, |(handle, _)| handle)
    };
    let mut processor = Structure::new(4, 0x400u16.wrapping_add(socket as u16));
    processor.string(&format!("CPU #{socket}"));
    processor.body.u8(CENTRAL_PROCESSOR).u8(UNKNOWN).u8(0).u64(0).u8(0);
    processor.body.u8(0).u16(0).u16(0).u16(0).u8(POPULATED_ENABLED).u8(UNKNOWN);
    processor.body.u16(cache(1)).u16(cache(2)).u16(cache(3));
    processor.body.raw(&[0, 0, 0, cores, cores, threads]).u16(IS_64_BIT).u16(u16::from(UNKNOWN));
    processor.body.u16(wide(all_cores)).u16(wide(all_cores)).u16(wide(all_threads));
    processor.finish()
}

/// Cache information (section 7.8).
fn cache(index: u16, cache: &Cache) -> Vec<u8> {
    const ENABLED: u16 = 1 << 7;
    const WRITE_BACK: u16 = 1 << 8;
    /// The size is in units of 64 KiB.
    const LARGE: u16 = 1 << 15;
    const UNKNOWN_SRAM: u16 = 1 << 1;
    const UNKNOWN: u8 = 2;
    let kib = cache.size >> 10;
    let size = match u16::try_from(kib) {
        Ok(kib) if kib < LARGE => kib,
        _ => LARGE | u16::try_from(kib >> 6).unwrap_or(LARGE - 1).min(LARGE - 1),
    };
    let (name, kind) = match cache.kind {
        CacheKind::Instruction => ("i", 3),
        CacheKind::Data => ("d", 4),
        CacheKind::Unified => ("", 5),
    };
    let associativity = match cache.ways {
        0 => 6,
        1 => 3,
        2 => 4,
        4 => 5,
        8 => 7,
        12 => 9,
        16 => 8,
        20 => 14,
        24 => 10,
        32 => 11,
        48 => 12,
        64 => 13,
        _ => 1,
    };
    let mut structure = Structure::new(7, CACHE_HANDLE + index);
    structure.string(&format!("L{}{name}", cache.level));
    structure.body.u16(ENABLED | WRITE_BACK | u16::from(cache.level.saturating_sub(1) & 7));
    structure.body.u16(size).u16(size).u16(UNKNOWN_SRAM).u16(UNKNOWN_SRAM).u8(0).u8(UNKNOWN).u8(kind).u8(associativity);
    structure.finish()
}

/// 32-bit memory error information (section 7.19): there is none.
fn memory_error() -> Vec<u8> {
    const NO_ERROR: u8 = 3;
    const UNKNOWN: u8 = 2;
    const UNKNOWN_ADDRESS: u32 = 0x8000_0000;
    let mut error = Structure::new(18, MEMORY_ERROR_HANDLE);
    error
        .body
        .u8(NO_ERROR)
        .u8(UNKNOWN)
        .u8(UNKNOWN)
        .u32(0)
        .u32(UNKNOWN_ADDRESS)
        .u32(UNKNOWN_ADDRESS)
        .u32(UNKNOWN_ADDRESS);
    error.finish()
}

fn memory_array(board: &Board) -> Vec<u8> {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_ERROR_CORRECTION: u8 = 3;
    /// "See the extended field", in KiB.
    const EXTENDED: u32 = 0x8000_0000;
    let size = board.low_memory.saturating_add(board.high_memory);
    let kib = u32::try_from(size >> 10).ok().filter(|kib| *kib < EXTENDED);
    let devices = u16::from(board.low_memory > 0) + u16::from(board.high_memory > 0);
    let mut array = Structure::new(16, MEMORY_ARRAY_HANDLE);
    array.body.u8(SYSTEM_BOARD).u8(SYSTEM_MEMORY).u8(NO_ERROR_CORRECTION);
    array.body.u32(kib.unwrap_or(EXTENDED)).u16(MEMORY_ERROR_HANDLE).u16(devices);
    array.body.u64(if kib.is_none() { size } else { 0 });
    array.finish()
}

fn memory_device(index: u16, size: u64) -> Vec<u8> {
    const UNKNOWN: u8 = 2;
    const UNKNOWN_DETAIL: u16 = 1 << 2;
    /// "See the extended field", in MiB.
    const EXTENDED: u16 = 0x7fff;
    let mib = size >> 20;
    let short = u16::try_from(mib).ok().filter(|mib| *mib < EXTENDED);
    let mut device = Structure::new(17, 0x1100 + index);
    device.body.u16(MEMORY_ARRAY_HANDLE).u16(NO_ERROR_HANDLE).u16(64).u16(64);
    device.body.u16(short.unwrap_or(EXTENDED)).u8(UNKNOWN).u8(0);
    device.string(&format!("DIMM {index}")).string("");
    device.body.u8(UNKNOWN).u16(UNKNOWN_DETAIL).u16(0);
    device.string("").string("").string("").string("");
    device.body.u8(0).u32(if short.is_none() { mib as u32 } else { 0 }).zeros(8);
    device.finish()
}

fn memory_range(index: u16, start: u64, size: u64) -> Vec<u8> {
    /// "See the extended fields", in KiB.
    const EXTENDED: u32 = u32::MAX;
    let last = start.saturating_add(size) - 1;
    let short = u32::try_from(last >> 10).ok().filter(|kib| *kib < EXTENDED);
    let mut range = Structure::new(19, 0x1300 + index);
    match short {
        Some(last_kib) => range.body.u32((start >> 10) as u32).u32(last_kib),
        None => range.body.u32(EXTENDED).u32(EXTENDED),
    };
    range.body.u16(MEMORY_ARRAY_HANDLE).u8(1);
    let (start, last) = if short.is_some() { (0, 0) } else { (start, last) };
    range.body.u64(start).u64(last);
    range.finish()
}

fn boot_information() -> Vec<u8> {
    let mut boot = Structure::new(32, 0x2000);
    boot.body.zeros(7);
    boot.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{board, checksum, number};
    use crate::tables::{ACPI_BASE, SMBIOS_BASE};

    struct Parsed {
        kind: u8,
        body: Vec<u8>,
        strings: Vec<String>,
    }

    fn parse(bytes: &[u8]) -> Vec<Parsed> {
        assert_eq!((&bytes[..4], &bytes[16..21]), (&b"_SM_"[..], &b"_DMI_"[..]));
        assert_eq!((checksum(&bytes[..31]), checksum(&bytes[16..31])), (0, 0));
        assert_eq!((&bytes[0x20..0x25], checksum(&bytes[0x20..0x38])), (&b"_SM3_"[..], 0));
        assert_eq!((number(bytes, 24, 4), number(bytes, 0x30, 8)), (SMBIOS_BASE + 0x40, SMBIOS_BASE + 0x40));
        let mut rest = &bytes[0x40..];
        assert_eq!((number(bytes, 22, 2) as usize, number(bytes, 0x2c, 4) as usize), (rest.len(), rest.len()));
        let mut found = Vec::new();
        let mut largest = 0;
        while !rest.is_empty() {
            let length = usize::from(rest[1]);
            let end = (length..).find(|at| rest[*at..*at + 2] == [0, 0]).unwrap() + 2;
            let strings = String::from_utf8(rest[length..end - 2].to_vec()).unwrap();
            let strings = strings.split('\0').filter(|text| !text.is_empty()).map(str::to_owned).collect();
            found.push(Parsed { kind: rest[0], body: rest[..length].to_vec(), strings });
            largest = largest.max(end);
            rest = &rest[end..];
        }
        assert_eq!(number(bytes, 28, 2) as usize, found.len());
        assert_eq!(number(bytes, 8, 2) as usize, largest);
        found
    }

    fn build(board: &Board) -> Vec<Parsed> {
        parse(&super::build(board, SMBIOS_BASE, ACPI_BASE))
    }

    #[test]
    fn has_every_structure_in_its_specified_length() {
        let found = build(&Board { high_memory: 8 << 40, low_memory: 3 << 30, caches: caches(), ..board() });
        let shapes: Vec<_> = found.iter().map(|structure| (structure.kind, structure.body.len())).collect();
        let memory = [(17, 0x28), (19, 0x1f), (17, 0x28), (19, 0x1f)];
        let mut wanted = vec![(0, 0x18), (1, 0x1b), (2, 0x0f), (3, 0x16), (7, 0x13), (7, 0x13), (7, 0x13)];
        wanted.extend([(16, 0x17), (18, 0x17)]);
        wanted.extend(memory);
        wanted.extend([(32, 0x0b), (4, 0x30), (4, 0x30), (127, 4)]);
        assert_eq!(shapes, wanted);
        let large = &found[11].body;
        assert_eq!((number(large, 12, 2), number(large, 28, 4)), (0x7fff, 8 << 20), "MiB of the large device");
        let range = &found[12].body;
        assert_eq!((number(range, 15, 8), number(range, 23, 8)), (4 << 30, (8 << 40) + (4 << 30) - 1));
        assert_eq!(number(&found[10].body, 8, 4), (3 << 20) - 1, "last KiB of low memory");
    }

    fn caches() -> Vec<Cache> {
        let cache = |level, kind, size, ways| Cache { level, kind, size, ways };
        vec![
            cache(1, CacheKind::Instruction, 32 << 10, 8),
            cache(1, CacheKind::Data, 48 << 10, 12),
            cache(3, CacheKind::Unified, 96 << 20, 16),
        ]
    }

    #[test]
    fn sockets_name_their_caches() {
        let found = build(&Board { caches: caches(), ..board() });
        let of = |kind| found.iter().filter(move |structure| structure.kind == kind).collect::<Vec<_>>();
        let sizes: Vec<_> =
            of(7).iter().map(|cache| (number(&cache.body, 7, 2), cache.body[17], cache.body[18])).collect();
        assert_eq!(sizes, [(32, 3, 7), (48, 4, 9), (0x8000 | 96 << 4, 5, 8)]);
        let handles: Vec<_> = of(7).iter().map(|cache| number(&cache.body, 2, 2)).collect();
        let socket = &of(4)[0].body;
        assert_eq!([26, 28, 30].map(|at| number(socket, at, 2)), [handles[1], 0xffff, handles[2]]);
        let error = &of(18)[0].body;
        assert_eq!(number(&of(16)[0].body, 11, 2), number(error, 2, 2), "the memory array names its error");
    }

    #[test]
    fn shows_uuid_and_strings() {
        let mut board = board();
        board.smbios.system_serial_number = "S/N\0 42".to_owned();
        board.smbios.system_sku = String::new();
        let found = build(&board);
        assert_eq!(found[0].strings, ["BHYVE", "14.0", "10/17/2021"]);
        assert_eq!(found[1].strings, ["FreeBSD", "BHYVE", "1.0", "S/N 42", "Virtual Machine"]);
        let uuid = [0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0x88, 0x77, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0];
        assert_eq!(found[1].body[8..24], uuid);
        assert_eq!(found[1].body[25..27], [0, 5], "no SKU; family is string 5");
    }

    #[test]
    fn stays_in_its_room() {
        let board = Board { topology: crate::Topology { sockets: 4096, cores: 1, threads: 1 }, ..board() };
        assert!(super::build(&board, SMBIOS_BASE, ACPI_BASE).len() <= (ACPI_BASE - SMBIOS_BASE) as usize);
    }
}
