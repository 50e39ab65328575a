//! The DSDT: PCI root buses and their interrupts, and the sleep state for power-off.

use super::super::TableError;
use super::aml::{
    Resource, Seg, Term, absolute, arg0, concat, device, eisa_id, else_, if_, int, method, name, name_of, package,
    resources, return_, scope, store,
};
use super::{isa, optional};
use crate::board::{Board, PciBus, Window};

/// The interrupt model that the OS told: 0 for the 8259 pair, 1 for the I/O APIC.
const MODEL: Seg = *b"PICM";
/// Interrupts of a bus in each model.
const APIC_ROUTES: Seg = *b"APRT";
const PIC_ROUTES: Seg = *b"PPRT";

/// The name of a root bus: `PC00` to `PCFF`.
fn bus_name(number: u8) -> Seg {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    [b'P', b'C', DIGITS[usize::from(number >> 4)], DIGITS[usize::from(number & 0xf)]]
}

/// The AML of the DSDT.
pub(super) fn body(board: &Board) -> Result<Vec<u8>, TableError> {
    let buses = board.buses.iter().map(|bus| root_bus(board, bus)).collect::<Result<Vec<_>, _>>()?;
    let mut terms = vec![
        name(*b"_S5_", package(vec![int(5u8), int(0u8)])),
        name(MODEL, int(0u8)),
        method(*b"_PIC", 1, [store(arg0(), name_of(MODEL))]),
        scope(absolute(&[*b"_SB_"]), buses.into_iter().chain(optional::devices(board))),
    ];
    terms.extend(optional::events(board));
    Ok(concat(terms))
}

fn root_bus(board: &Board, bus: &PciBus) -> Result<Term, TableError> {
    let mut terms = vec![
        name(*b"_HID", eisa_id(b"PNP0A03")),
        name(*b"_UID", int(bus.number)),
        name(*b"_BBN", int(bus.number)),
        name(*b"_CRS", resources(windows(board, bus)?)),
    ];
    terms.extend(interrupts(board, bus));
    if bus.number == 0 {
        terms.extend(board.lpc.map(|lpc| isa::bridge(&lpc)));
        terms.extend(board.hpet.map(|_| isa::hpet()));
    }
    Ok(device(bus_name(bus.number), terms))
}

/// What the bus decodes. Bus 0 also has the ports of the chipset, and the configuration ports in their midst.
fn windows(board: &Board, bus: &PciBus) -> Result<Vec<Resource>, TableError> {
    const CONFIG: u32 = 0xcf8;
    const CONFIG_END: u32 = 0xd00;
    const IO_END: u64 = 0x1_0000;
    /// Where the ports of BARs begin if no bus has any.
    const NO_WINDOW: u64 = 0x2000;
    let mut list = vec![Resource::bus(bus.number)];
    if bus.number == 0 {
        let first = board.buses.iter().filter_map(|bus| bus.io).map(|window| window.base).min().unwrap_or(NO_WINDOW);
        list.push(Resource::ports(CONFIG as u16, (CONFIG_END - CONFIG) as u8));
        list.push(Resource::io_window(0, CONFIG));
        let gap = u32::try_from(first.min(IO_END)).unwrap_or(0).saturating_sub(CONFIG_END);
        if gap > 0 {
            list.push(Resource::io_window(CONFIG_END, gap));
        }
    }
    if let Some((base, size)) = narrow(bus, "I/O", bus.io, IO_END)? {
        list.push(Resource::io_window(base, size));
    }
    if let Some((base, size)) = narrow(bus, "32-bit memory", bus.mem32, 1 << 32)? {
        list.push(Resource::mem32_window(base, size));
    }
    if let Some(window) = bus.mem64.filter(|window| window.size > 0) {
        list.push(Resource::mem64_window(window.base, window.size));
    }
    Ok(list)
}

/// Base and size of a window that must end at or before `end`; nothing if it is empty.
fn narrow(
    bus: &PciBus,
    kind: &'static str,
    window: Option<Window>,
    end: u64,
) -> Result<Option<(u32, u32)>, TableError> {
    let Some(Window { base, size }) = window.filter(|window| window.size > 0) else { return Ok(None) };
    match (u32::try_from(base), u32::try_from(size)) {
        (Ok(narrow_base), Ok(narrow_size)) if base + size <= end => Ok(Some((narrow_base, narrow_size))),
        _ => Err(TableError::Window { bus: bus.number, kind, base, size }),
    }
}

/// `_PRT` and the lists that it chooses from. Without an ISA bridge there are no links, so I/O APIC routes only.
fn interrupts(board: &Board, bus: &PciBus) -> Vec<Term> {
    let routes = |target: &dyn Fn(&crate::InterruptRoute) -> [Term; 2]| {
        let entry = |route: &crate::InterruptRoute| {
            const ANY_FUNCTION: u32 = 0xffff;
            let address = u32::from(route.slot) << 16 | ANY_FUNCTION;
            let [source, index] = target(route);
            package(vec![int(address), int(route.pin.saturating_sub(1)), source, index])
        };
        package(bus.routes.iter().map(entry).collect())
    };
    let apic = routes(&|route| [int(0u8), int(route.gsi)]);
    if board.lpc.is_none() {
        return vec![name(*b"_PRT", apic)];
    }
    let pic = routes(&|route| [absolute(&[*b"_SB_", bus_name(0), isa::BRIDGE, isa::link_name(route.link)]), int(0u8)]);
    vec![
        name(PIC_ROUTES, pic),
        name(APIC_ROUTES, apic),
        method(
            *b"_PRT",
            0,
            [if_(name_of(MODEL), [return_(name_of(APIC_ROUTES))]), else_([return_(name_of(PIC_ROUTES))])],
        ),
    ]
}
