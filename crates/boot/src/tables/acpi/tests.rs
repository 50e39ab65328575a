//! The tables as a guest finds them, and the AML as `iasl` reads it.

use std::collections::BTreeMap;
use std::process::Command;

use super::*;
use crate::PciBus;
use crate::fixture::{Folder, board, checksum, number};
use crate::tables::ACPI_BASE;

/// Follows the pointers from the RSDP, checking sums and lengths: signature to table.
fn follow(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let at = |address: u64| (address - ACPI_BASE) as usize;
    let read = |address: u64| {
        let start = at(address);
        bytes[start..start + number(bytes, start + 4, 4) as usize].to_vec()
    };
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!((checksum(&bytes[..20]), checksum(&bytes[..36])), (0, 0));
    assert_eq!((&bytes[9..15], bytes[15]), (&OEM_ID[..], 2));
    let (rsdt, xsdt) = (read(number(bytes, 16, 4)), read(number(bytes, 24, 8)));
    let narrow: Vec<u64> = rsdt[36..].chunks(4).map(|chunk| number(chunk, 0, 4)).collect();
    let wide: Vec<u64> = xsdt[36..].chunks(8).map(|chunk| number(chunk, 0, 8)).collect();
    assert_eq!(narrow, wide);

    let mut tables = vec![rsdt, xsdt];
    tables.extend(wide.iter().map(|address| read(*address)));
    let fadt = tables.iter().find(|table| table.starts_with(b"FACP")).unwrap().clone();
    assert_eq!((number(&fadt, 36, 4), number(&fadt, 40, 4)), (number(&fadt, 132, 8), number(&fadt, 140, 8)));
    tables.push(read(number(&fadt, 140, 8)));
    for table in &tables {
        let signature = String::from_utf8_lossy(&table[..4]).into_owned();
        assert_eq!(checksum(table), 0, "{signature}");
        assert_eq!(&table[10..16], OEM_ID, "{signature}");
        assert_eq!((number(table, 24, 4), &table[28..32]), (1, &CREATOR[..]), "{signature}");
    }
    let facs = number(&fadt, 132, 8);
    assert_eq!(facs % 64, 0);
    tables.push(read(facs));
    tables.into_iter().map(|table| (String::from_utf8_lossy(&table[..4]).into_owned(), table)).collect()
}

fn tables(board: &Board) -> BTreeMap<String, Vec<u8>> {
    follow(&build(board, ACPI_BASE).unwrap())
}

/// A board with everything that a board may have.
fn full_board() -> Board {
    let domain = |cpu| crate::NumaDomain { size: 256 << 20, cpus: vec![cpu] };
    Board { fw_cfg: true, tpm: true, generation_id: Some([7; 16]), numa: vec![domain(0), domain(1)], ..board() }
}

fn entries(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (entry, tail) = rest.split_at(rest[1].into());
        found.push(entry);
        rest = tail;
    }
    found
}

#[test]
fn every_table_can_be_reached() {
    let found: Vec<_> = tables(&board()).into_keys().collect();
    assert_eq!(found, ["APIC", "DSDT", "FACP", "FACS", "HPET", "MCFG", "RSDT", "SPCR", "XSDT"]);
    let without = tables(&Board { hpet: None, ..board() });
    assert!(!without.contains_key("HPET"));
    let full: Vec<_> = tables(&full_board()).into_keys().collect();
    assert_eq!(full, ["APIC", "DSDT", "FACP", "FACS", "HPET", "MCFG", "RSDT", "SPCR", "SRAT", "TPM2", "XSDT"]);
}

#[test]
fn the_fadt_names_the_power_registers() {
    let fadt = &tables(&board())["FACP"];
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (0x10c, 5, 1), "length, revision, minor revision");
    let fields = [
        (46, 2, 9),        // SCI
        (48, 4, 0xb2),     // SMI command
        (52, 1, 0xa0),     // enable
        (53, 1, 0xa1),     // disable
        (56, 4, 0x400),    // PM1a events
        (64, 4, 0x404),    // PM1a control
        (76, 4, 0x408),    // timer
        (88, 1, 4),        // PM1 event length
        (89, 1, 2),        // PM1 control length
        (91, 1, 4),        // timer length
        (108, 1, 0x32),    // century
        (109, 2, 0x14),    // no VGA, no ASPM
        (112, 4, 0x81525), // flags
        (128, 1, 6),       // reset value
    ];
    for (at, len, value) in fields {
        assert_eq!(number(fadt, at, len), value, "offset {at}");
    }
    for (at, [width, access], port) in
        [(116, [8, 1], 0xcf9), (148, [32, 2], 0x400), (172, [16, 2], 0x404), (208, [32, 3], 0x408)]
    {
        assert_eq!(fadt[at..at + 4], [1, width, 0, access], "offset {at}");
        assert_eq!(number(fadt, at + 4, 8), port, "offset {at}");
    }
    for at in [160, 184, 196, 220, 232] {
        assert_eq!(number(fadt, at + 4, 8), 0, "offset {at}");
    }
}

#[test]
fn the_madt_lists_processors_and_interrupts() {
    let madt = &tables(&board())["APIC"];
    assert_eq!((number(madt, 36, 4), number(madt, 40, 4)), (0xfee0_0000, 1));
    let wanted: [&[u8]; 6] = [
        &[0, 8, 0, 0, 1, 0, 0, 0],
        &[0, 8, 1, 1, 1, 0, 0, 0],
        &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        &[2, 10, 0, 9, 9, 0, 0, 0, 0xf, 0],
        &[4, 6, 0xff, 5, 0, 1],
    ];
    assert_eq!(entries(madt), wanted);
}

#[test]
fn large_ids_and_x2apic_mode_use_the_wide_form() {
    let wide = |board: &Board| {
        let tables = tables(board);
        entries(&tables["APIC"])
            .iter()
            .filter(|entry| entry[0] == 9)
            .map(|entry| number(entry, 4, 4))
            .collect::<Vec<_>>()
    };
    assert_eq!(wide(&Board { apic_ids: vec![0, 254, 255, 4096], ..board() }), [255, 4096]);
    assert_eq!(wide(&Board { apic_ids: vec![0, 1], x2apic: true, ..board() }), [0, 1]);
    let tables = tables(&Board { x2apic: true, ..board() });
    assert!(entries(&tables["APIC"]).contains(&&[10, 12, 5, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0][..]), "NMI for all");
}

#[test]
fn mcfg_and_hpet_give_their_addresses() {
    let tables = tables(&board());
    let mcfg = &tables["MCFG"];
    assert_eq!((mcfg.len(), number(mcfg, 44, 8), &mcfg[52..56]), (60, 0xe000_0000, &[0, 0, 0, 255][..]));
    let hpet = &tables["HPET"];
    assert_eq!((hpet.len(), number(hpet, 36, 4), number(hpet, 44, 8)), (56, 0x8086_0701, 0xfed0_0000));
}

#[test]
fn windows_must_fit_their_address_space() {
    let mut board = board();
    board.buses[0].io = Some(crate::Window { base: 0xf000, size: 0x1001 });
    let error = build(&board, ACPI_BASE).unwrap_err();
    assert!(error.to_string().contains("I/O window of PCI bus 0"), "{error}");
    board.buses[0].io = Some(crate::Window { base: 0xf000, size: 0x1000 });
    board.buses[0].mem32 = Some(crate::Window { base: u64::MAX, size: u64::MAX });
    assert!(build(&board, ACPI_BASE).is_err());
}

/// Runs `iasl`, and returns what it said if it could be run.
fn iasl(folder: &Folder, arguments: &[&str]) -> Option<String> {
    let output = Command::new("iasl").args(arguments).current_dir(folder.path()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "iasl {arguments:?} in {}:\n{text}", folder.path().display());
    Some(text)
}

/// The source of the DSDT.
fn disassemble(board: &Board) -> Option<String> {
    let folder = Folder::new();
    folder.file("dsdt.aml", &tables(board)["DSDT"]);
    iasl(&folder, &["-d", "dsdt.aml"])?;
    Some(std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap())
}

/// Disassembles the DSDT, compiles the result again, and returns the source and the compiled table.
fn round_trip(board: &Board) -> Option<(String, Vec<u8>, Vec<u8>)> {
    let source = disassemble(board)?;
    let folder = Folder::new();
    folder.file("dsdt.dsl", source.as_bytes());
    let said = iasl(&folder, &["-oa", "-p", "again", "dsdt.dsl"])?;
    assert!(said.contains(" 0 Errors, 0 Warnings"), "{said}\n{source}");
    let again = std::fs::read(folder.path().join("again.aml")).unwrap();
    Some((source, tables(board)["DSDT"].clone(), again))
}

#[test]
fn the_dsdt_survives_disassembly_and_compilation() {
    let mut large = board();
    large.buses.extend([1, 0xaf].map(|number| PciBus { number, ..large.buses[0].clone() }));
    let boards = [
        board(),
        large,
        // iasl compiles no such hardware id as bhyve's generation counter has.
        Board { generation_id: None, ..full_board() },
        Board { lpc: None, hpet: None, ..board() },
        Board { buses: vec![PciBus::default()], ..board() },
    ];
    for board in boards {
        let Some((source, dsdt, again)) = round_trip(&board) else {
            println!("skipped: iasl (package acpica-tools) is not installed");
            return;
        };
        // Its header names its own maker; all else must be the same bytes.
        assert!(dsdt[36..] == again[36..], "compiles to something else:\n{source}");
    }
}

#[test]
fn the_generation_counter_has_an_event_of_its_own() {
    let fadt = &tables(&full_board())["FACP"];
    assert_eq!((number(fadt, 80, 4), fadt[92]), (0x40c, 4));
    assert_eq!((&fadt[220..224], number(fadt, 224, 8)), (&[1, 32, 0, 1][..], 0x40c));
}

#[test]
fn spcr_and_tpm2_name_their_registers() {
    let tables = tables(&full_board());
    let spcr = &tables["SPCR"];
    assert_eq!((spcr.len(), spcr[36], &spcr[40..44], number(spcr, 44, 8)), (80, 0, &[1, 8, 0, 1][..], 0x3f8));
    assert_eq!((spcr[52], spcr[53], number(spcr, 54, 4), number(spcr, 64, 4)), (3, 4, 4, 0xffff_ffff));
    let tpm2 = &tables["TPM2"];
    assert_eq!((tpm2.len(), tpm2[8]), (76, 4));
    assert_eq!((number(tpm2, 40, 8), number(tpm2, 48, 4)), (0xfed4_0040, 7));
}

/// The MADT lists processors first, and each has its own UID and id (section 5.2.12.1): Windows starts them in this order.
#[test]
fn processors_come_first_and_once() {
    let many = Board { apic_ids: (0..200).chain(300..400).collect(), ..full_board() };
    let tables = tables(&many);
    let madt = entries(&tables["APIC"]);
    let is_processor = |entry: &&&[u8]| matches!(entry[0], 0 | 9);
    let processors: Vec<_> = madt.iter().take_while(is_processor).collect();
    assert_eq!(processors.len(), 300);
    assert_eq!(madt.iter().filter(is_processor).count(), 300);
    let wide = |entry: &[u8]| (number(entry, 4, 4), number(entry, 12, 4));
    let ids =
        processors.iter().map(|entry| if entry[0] == 9 { wide(entry) } else { (entry[3].into(), entry[2].into()) });
    let ids: Vec<(u64, u64)> = ids.collect();
    let wanted: Vec<(u64, u64)> = (0..200).chain(300..400).zip(0..).collect();
    assert_eq!(ids, wanted, "APIC id and UID");
    assert!(madt.iter().any(|entry| entry[0] == 10), "NMI of the wide form");
}

/// Devices with the same hardware id have different unique ids (section 6.1.12), and paths are unique.
#[test]
fn no_two_devices_are_the_same() {
    let mut large = full_board();
    large.buses.extend([1, 0xaf].map(|number| PciBus { number, ..large.buses[0].clone() }));
    let Some(source) = disassemble(&large) else {
        println!("skipped: iasl (package acpica-tools) is not installed");
        return;
    };
    let mut found: Vec<(String, Option<String>)> = Vec::new();
    for device in source.split("Device (").skip(1) {
        let value = |name: &str| {
            let line = device.lines().find(|line| line.contains(&format!("Name ({name},")))?;
            Some(line.split_once(',')?.1.split("//").next()?.trim().to_owned())
        };
        found.extend(value("_HID").map(|id| (id, value("_UID"))));
    }
    assert!(found.len() > 15, "{found:?}");
    for (index, device) in found.iter().enumerate() {
        assert!(!found[..index].contains(device), "{device:?} twice");
        let alone = found.iter().filter(|other| other.0 == device.0).count() == 1;
        assert!(alone || device.1.is_some(), "{device:?} needs a _UID");
    }
}

/// `_PRT` names each pin of a slot once (section 6.2.13), in the form "all functions", with a link that exists or a pin of
/// the I/O APIC.
#[test]
fn interrupt_routes_are_as_the_specification_wants_them() {
    let board = full_board();
    let Some(source) = disassemble(&board) else {
        println!("skipped: iasl (package acpica-tools) is not installed");
        return;
    };
    for (name, is_link) in [("PPRT", true), ("APRT", false)] {
        let list = source.split(&format!("Name ({name}, Package")).nth(1).unwrap();
        let list = list.split("Name (").next().unwrap();
        let entries: Vec<Vec<&str>> = list
            .split("Package (0x04)")
            .skip(1)
            .map(|entry| entry.split(['{', '}']).nth(1).unwrap().split(',').map(str::trim).collect())
            .collect();
        assert_eq!(entries.len(), board.buses[0].routes.len(), "{name}");
        for entry in &entries {
            assert!(entry[0].to_lowercase().ends_with("ffff"), "{entry:?}");
            let is_linked = entry[2].starts_with("\\_SB.PC00.ISA.LNK");
            assert_eq!((is_linked, entry[3] == "Zero" || !is_link), (is_link, true), "{entry:?}");
        }
        let mut pins: Vec<_> = entries.iter().map(|entry| (entry[0], entry[1])).collect();
        pins.sort_unstable();
        pins.dedup();
        assert_eq!(pins.len(), entries.len(), "a pin twice");
    }
}

/// Every table by itself: what `acpidump` and `iasl -d` would show in the guest.
#[test]
fn iasl_reads_every_table() {
    for (signature, table) in tables(&full_board()) {
        let folder = Folder::new();
        folder.file("table.dat", &table);
        let Some(said) = iasl(&folder, &["-d", "table.dat"]) else {
            println!("skipped: iasl (package acpica-tools) is not installed");
            return;
        };
        let source = std::fs::read_to_string(folder.path().join("table.dsl")).unwrap();
        // iasl expects the field that revision 6 adds behind the end of any FADT that is longer than that of revision 3.
        let excused = |line: &str| {
            line.contains("Unknown UUID") || signature == "FACP" && line.contains("in the middle of a data structure")
        };
        let complaints = ["Warning", "Error", "Invalid", "Unknown", "**** "];
        for line in said.lines().chain(source.lines()).filter(|line| !excused(line)) {
            assert!(!complaints.iter().any(|word| line.contains(word)), "{signature}: {line}\n{said}\n{source}");
        }
    }
}

#[test]
fn the_dsdt_says_what_the_board_is() {
    let Some(source) = disassemble(&full_board()) else {
        println!("skipped: iasl (package acpica-tools) is not installed");
        return;
    };
    let flat = source.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in [
        "Name (_S5, Package (0x02) // _S5_: S5 System State { 0x05, Zero })",
        "Method (_PIC, 1, NotSerialized) // _PIC: Interrupt Model { PICM = Arg0 }",
        "Device (PC00)",
        "Name (_HID, EisaId (\"PNP0A03\") /* PCI Bus */)",
        "Package (0x04) { 0x0003FFFF, One, Zero, 0x12 }",
        "Package (0x04) { 0x0003FFFF, One, \\_SB.PC00.ISA.LNKC, Zero }",
        "Package (0x04) { 0x0004FFFF, Zero, \\_SB.PC00.ISA.LNKH, Zero }",
        "Name (_ADR, 0x001F0000)",
        "Offset (0x60), PIRA, 8, PIRB, 8, PIRC, 8, PIRD, 8, Offset (0x68), PIRE, 8, PIRF, 8, PIRG, 8, PIRH, 8",
        "IRQ (Level, ActiveLow, Shared, ) {3,4,5,6,7,9,10,11,12,14,15}",
        "Device (COM4)",
        "Device (HPET)",
        "Device (GENC)",
        "Name (ADDR, Package (0x02) { 0x000FF000, Zero })",
        "Method (_E00, 0, NotSerialized) // _Exx: Edge-Triggered GPE, xx=0x00-0xFF { Notify (\\_SB.GENC, 0x80)",
        "Name (_HID, \"QEMU0002\")",
        "Name (_HID, \"MSFT0101\"",
        "ToUUID (\"3dddfaa6-361b-4eb4-a424-8d10089d1653\")",
        "ToUUID (\"376054ed-cc13-4675-901c-4756d7f2d45d\")",
    ] {
        assert!(flat.contains(wanted), "missing {wanted:?} in\n{source}");
    }
    assert!(!flat.contains("Device (COM3)"), "the board has none");
}
