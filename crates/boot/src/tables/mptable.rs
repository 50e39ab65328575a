//! The MP table (Intel MultiProcessor Specification 1.4): processors, buses and interrupts for guests without ACPI.

use super::{Bytes, IO_APIC, LOCAL_APIC, SCI, TableError, set_checksum};
use crate::board::{Board, InterruptRoute};

const SPEC_REVISION: u8 = 4;
const FLOATING_POINTER_SIZE: u32 = 16;
const CONFIGURATION_CHECKSUM: usize = 7;

const LOCAL_APIC_VERSION: u8 = 0x10;
/// Family 6, model 26, stepping 5.
const CPU_SIGNATURE: u32 = 0x106a5;
const CPU_FEATURES: u32 = 0xbfeb_fbff;
const IO_APIC_VERSION: u8 = 0x11;
const IO_APIC_ID: u8 = 0;

const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
/// The destination "all local APICs".
const ALL_APICS: u8 = 0xff;

/// Interrupt types (section 4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Interrupt flags: as usual for the bus, or level-triggered and active low.
const CONFORMING: u16 = 0;
const LEVEL_LOW: u16 = 0b1111;

/// The entries of the configuration table, and how many there are.
#[derive(Default)]
struct Entries {
    bytes: Bytes,
    count: u16,
}

impl Entries {
    fn processor(&mut self, apic_id: u8, boots: bool) {
        const ENABLED: u8 = 1 << 0;
        const BOOT_PROCESSOR: u8 = 1 << 1;
        let flags = if boots { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        self.bytes.u8(0).u8(apic_id).u8(LOCAL_APIC_VERSION).u8(flags).u32(CPU_SIGNATURE).u32(CPU_FEATURES).zeros(8);
        self.count += 1;
    }

    fn bus(&mut self, id: u8, name: &[u8; 6]) {
        self.bytes.u8(1).u8(id).raw(name);
        self.count += 1;
    }

    fn io_apic(&mut self) {
        self.bytes.u8(2).u8(IO_APIC_ID).u8(IO_APIC_VERSION).u8(1).u32(IO_APIC);
        self.count += 1;
    }

    fn io_interrupt(&mut self, kind: u8, flags: u16, source: (u8, u8), pin: u8) {
        self.interrupt(3, kind, flags, source, (IO_APIC_ID, pin));
    }

    fn local_interrupt(&mut self, kind: u8, pin: u8) {
        self.interrupt(4, kind, CONFORMING, (ISA_BUS, 0), (ALL_APICS, pin));
    }

    fn interrupt(&mut self, entry: u8, kind: u8, flags: u16, source: (u8, u8), to: (u8, u8)) {
        self.bytes.u8(entry).u8(kind).u16(flags).u8(source.0).u8(source.1).u8(to.0).u8(to.1);
        self.count += 1;
    }

    /// Interrupts of the ISA bus: n on pin n, but the timer on pin 2 and the 8259 pair on pin 0.
    fn isa_interrupts(&mut self) {
        self.io_interrupt(EXT_INT, CONFORMING, (ISA_BUS, 0), 0);
        for irq in (0..16).filter(|irq| *irq != 2) {
            let pin = if irq == 0 { 2 } else { irq };
            let flags = if irq == SCI { LEVEL_LOW } else { CONFORMING };
            self.io_interrupt(INT, flags, (ISA_BUS, irq), pin);
        }
    }

    fn pci_interrupts(&mut self, routes: &[InterruptRoute]) {
        for route in routes {
            // What the eight bits of an entry cannot name, an OS without ACPI cannot use.
            let (Ok(pin), 1..=4) = (u8::try_from(route.gsi), route.pin) else { continue };
            self.io_interrupt(INT, CONFORMING, (PCI_BUS, route.slot << 2 | (route.pin - 1)), pin);
        }
    }
}

/// The floating pointer structure for address `base`, followed by the configuration table.
///
/// Processors that do not fit before `end`, or whose APIC id does not fit into a byte, are left out: an OS that has
/// so many uses ACPI.
pub(super) fn build(board: &Board, base: u64, end: u64) -> Result<Vec<u8>, TableError> {
    if let Some(bus) = board.buses.iter().find(|bus| bus.number != 0) {
        return Err(TableError::MpBus(bus.number));
    }
    let mut rest = Entries::default();
    rest.bus(PCI_BUS, b"PCI   ");
    rest.bus(ISA_BUS, b"ISA   ");
    rest.io_apic();
    rest.isa_interrupts();
    board.buses.iter().for_each(|bus| rest.pci_interrupts(&bus.routes));
    rest.local_interrupt(EXT_INT, 0);
    rest.local_interrupt(NMI, 1);

    const HEADER_SIZE: usize = 44;
    const PROCESSOR_SIZE: usize = 20;
    let fixed = FLOATING_POINTER_SIZE as usize + HEADER_SIZE + rest.bytes.len();
    let room = usize::try_from(end.saturating_sub(base)).unwrap_or(0).saturating_sub(fixed) / PROCESSOR_SIZE;
    let mut entries = Entries::default();
    let nameable = board.apic_ids.iter().enumerate().filter_map(|(index, id)| Some((index, u8::try_from(*id).ok()?)));
    for (index, id) in nameable.filter(|(_, id)| *id != ALL_APICS).take(room) {
        entries.processor(id, index == 0);
    }
    entries.bytes.raw(&rest.bytes.0);
    entries.count += rest.count;

    let mut bytes = floating_pointer(base as u32 + FLOATING_POINTER_SIZE);
    bytes.extend(configuration_table(&entries));
    Ok(bytes)
}

fn floating_pointer(table: u32) -> Vec<u8> {
    let mut pointer = Bytes::default();
    pointer.raw(b"_MP_").u32(table).u8(1).u8(SPEC_REVISION).u8(0).zeros(5);
    set_checksum(&mut pointer.0, 10);
    pointer.0
}

fn configuration_table(entries: &Entries) -> Vec<u8> {
    let mut table = Bytes::default();
    table.raw(b"PCMP").u16(0).u8(SPEC_REVISION).u8(0);
    table.raw(b"BHyVe   ").raw(b"Hypervisor  ");
    table.u32(0).u16(0); // no table of the maker's own
    table.u16(entries.count).u32(LOCAL_APIC).u32(0).raw(&entries.bytes.0);
    let size = table.len() as u16;
    table.0[4..6].copy_from_slice(&size.to_le_bytes());
    set_checksum(&mut table.0, CONFIGURATION_CHECKSUM);
    table.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{board, checksum, number};
    use crate::tables::{MPTABLE_BASE, SMBIOS_BASE};

    fn build(board: &Board) -> Vec<u8> {
        super::build(board, MPTABLE_BASE, SMBIOS_BASE).unwrap()
    }

    /// Splits the table into its entries, checking every header field on the way.
    fn entries(bytes: &[u8]) -> Vec<Vec<u8>> {
        assert_eq!(&bytes[..4], b"_MP_");
        assert_eq!(number(bytes, 4, 4), 0xf0010);
        assert_eq!((bytes[8], bytes[9]), (1, 4));
        assert_eq!(checksum(&bytes[..16]), 0);
        let table = &bytes[16..];
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(number(table, 4, 2) as usize, table.len());
        assert_eq!(checksum(table), 0);
        assert_eq!(&table[8..28], b"BHyVe   Hypervisor  ");
        assert_eq!(number(table, 36, 4), 0xfee0_0000);
        let mut rest = &table[44..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(if rest[0] == 0 { 20 } else { 8 });
            found.push(entry.to_vec());
            rest = tail;
        }
        assert_eq!(number(table, 34, 2) as usize, found.len());
        found
    }

    #[test]
    fn describes_processors_buses_and_interrupts() {
        let found = entries(&build(&board()));
        let of = |kind: u8| found.iter().filter(move |entry| entry[0] == kind).collect::<Vec<_>>();
        let processors: Vec<_> = of(0).iter().map(|entry| (entry[1], entry[2], entry[3])).collect();
        assert_eq!(processors, [(0, 0x10, 3), (1, 0x10, 1)]);
        assert_eq!(of(1), [b"\x01\x00PCI   ", b"\x01\x01ISA   "]);
        assert_eq!(of(2), [&[2, 0, 0x11, 1, 0, 0, 0xc0, 0xfe]]);
        assert_eq!(of(4), [&[4, 3, 0, 0, 1, 0, 0xff, 0], &[4, 1, 0, 0, 1, 0, 0xff, 1]]);

        let io = of(3);
        let isa: Vec<_> = io.iter().filter(|entry| entry[4] == 1).map(|entry| (entry[1], entry[5], entry[7])).collect();
        assert_eq!(isa[..4], [(EXT_INT, 0, 0), (INT, 0, 2), (INT, 1, 1), (INT, 3, 3)]);
        assert_eq!(isa.len(), 16);
        assert!(io.iter().any(|entry| entry[..] == [3, 0, 0xf, 0, 1, 9, 0, 9]), "SCI level, active low");
        let pci: Vec<_> = io.iter().filter(|entry| entry[4] == 0).map(|entry| (entry[5], entry[7])).collect();
        assert_eq!(pci, [(2 << 2, 16), (3 << 2, 17), (3 << 2 | 1, 18), (4 << 2, 23)]);
    }

    #[test]
    fn refuses_a_second_bus_and_names_the_way_out() {
        let mut board = board();
        board.buses.push(crate::PciBus { number: 3, ..Default::default() });
        let error = super::build(&board, MPTABLE_BASE, SMBIOS_BASE).unwrap_err();
        assert!(error.to_string().contains("-Y") && error.to_string().contains("bus 3"), "{error}");
    }

    #[test]
    fn leaves_out_processors_that_it_cannot_hold() {
        let board = Board { apic_ids: (0..1000).collect(), ..board() };
        let bytes = build(&board);
        assert!(bytes.len() <= (SMBIOS_BASE - MPTABLE_BASE) as usize);
        let processors = entries(&bytes).iter().filter(|entry| entry[0] == 0).count();
        assert!((150..255).contains(&processors), "{processors}");
    }
}
