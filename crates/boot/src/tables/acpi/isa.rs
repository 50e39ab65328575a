//! The ISA bridge in the DSDT: interrupt links and the devices at fixed ports.

use super::super::{ECAM, HPET};
use super::aml::{
    Resource, Seg, Term, and, arg0, byte_fields, call, create_word_field, device, eisa_id, else_, find_set_right_bit,
    if_, int, local0, method, name, name_of, nowhere, pci_config_region, resources, return_, serialized_method,
    shift_left, shift_right, store, subtract,
};
use crate::board::Lpc;

/// The name of the bridge under bus 0.
pub(super) const BRIDGE: Seg = *b"ISA_";

/// The bridge's configuration registers.
const REGISTERS: Seg = *b"LPCR";
/// PIRQ routing registers A–H of the bridge: offset in its configuration space.
const PIRQ_REGISTERS: [u8; 8] = [0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6a, 0x6b];
/// In a routing register: the link is off.
const PIRQ_DISABLED: u8 = 0x80;
/// In a routing register: the ISA interrupt.
const PIRQ_IRQ: u8 = 0x0f;
/// ISA interrupts that a link may use: 3–7, 9–12, 14, 15.
const LINK_IRQS: u16 = 0xdef8;
/// The method that tells whether a routing register holds a usable interrupt.
const IS_ROUTED: Seg = *b"PIRV";

/// The name of a link: `LNKA` to `LNKH`.
pub(super) fn link_name(link: u8) -> Seg {
    [b'L', b'N', b'K', letter(link)]
}

fn letter(link: u8) -> u8 {
    b'A' + link % 8
}

/// `Device (ISA) { … }`
pub(super) fn bridge(lpc: &Lpc) -> Term {
    let fields: Vec<(u8, Seg)> = (0..).zip(PIRQ_REGISTERS).map(|(link, at)| (at, register_name(link))).collect();
    let mut terms = vec![
        name(*b"_ADR", int(u32::from(lpc.slot) << 16 | u32::from(lpc.function))),
        pci_config_region(REGISTERS, 0, 0x100),
        byte_fields(REGISTERS, &fields),
        is_routed(),
    ];
    terms.extend((0..8).map(link));
    terms.extend((0..).zip(lpc.uarts).filter(|(_, present)| *present).map(|(index, _)| uart(index)));
    terms.extend(fixed_devices());
    device(BRIDGE, terms)
}

fn register_name(link: u8) -> Seg {
    [b'P', b'I', b'R', letter(link)]
}

fn is_routed() -> Term {
    method(
        IS_ROUTED,
        1,
        [
            if_(and(arg0(), int(PIRQ_DISABLED), nowhere()), [return_(int(0u8))]),
            and(arg0(), int(PIRQ_IRQ), local0()),
            return_(and(shift_right(int(LINK_IRQS), local0(), nowhere()), int(1u8), nowhere())),
        ],
    )
}

/// An interrupt link device (ACPI 6.5, section 6.2.13) over its routing register.
fn link(link: u8) -> Term {
    const PRESENT_DISABLED: u8 = 0x09;
    const PRESENT_ENABLED: u8 = 0x0b;
    let register = || name_of(register_name(link));
    let current: Seg = [b'C', b'R', b'S', letter(link)];
    let current_mask: Seg = [b'C', b'I', b'R', letter(link)];
    let wanted_mask: Seg = [b'S', b'I', b'R', letter(link)];
    device(
        link_name(link),
        [
            name(*b"_HID", eisa_id(b"PNP0C0F")),
            name(*b"_UID", int(link + 1)),
            method(
                *b"_STA",
                0,
                [
                    if_(call(IS_ROUTED, [register()]), [return_(int(PRESENT_ENABLED))]),
                    else_([return_(int(PRESENT_DISABLED))]),
                ],
            ),
            name(*b"_PRS", resources([Resource::pci_irq(LINK_IRQS)])),
            name(current, resources([Resource::pci_irq(0)])),
            create_word_field(name_of(current), Resource::PCI_IRQ_MASK, current_mask),
            method(
                *b"_CRS",
                0,
                [
                    if_(
                        call(IS_ROUTED, [register()]),
                        [shift_left(int(1u8), and(register(), int(PIRQ_IRQ), nowhere()), name_of(current_mask))],
                    ),
                    else_([store(int(0u8), name_of(current_mask))]),
                    return_(name_of(current)),
                ],
            ),
            method(*b"_DIS", 0, [store(int(PIRQ_DISABLED), register())]),
            serialized_method(
                *b"_SRS",
                1,
                [
                    create_word_field(arg0(), Resource::PCI_IRQ_MASK, wanted_mask),
                    find_set_right_bit(name_of(wanted_mask), local0()),
                    subtract(local0(), int(1u8), register()),
                ],
            ),
        ],
    )
}

/// COM1–COM4, `index` from 0.
fn uart(index: u8) -> Term {
    const PORTS_AND_IRQS: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
    let (port, irq) = PORTS_AND_IRQS[usize::from(index % 4)];
    device(
        [b'C', b'O', b'M', b'1' + index],
        [
            name(*b"_HID", eisa_id(b"PNP0501")),
            name(*b"_UID", int(index + 1)),
            name(*b"_CRS", resources([Resource::ports(port, 8), Resource::isa_irq(irq)])),
        ],
    )
}

fn fixed_devices() -> Vec<Term> {
    let fixed = |segment: Seg, id: &[u8; 7], list: Vec<Resource>| {
        device(segment, [name(*b"_HID", eisa_id(id)), name(*b"_CRS", resources(list))])
    };
    let ports = Resource::ports;
    let irq = Resource::isa_irq;
    let ecam = Resource::memory32(ECAM.start.0 as u32, ECAM.size as u32);
    vec![
        fixed(*b"KBD_", b"PNP0303", vec![ports(0x60, 1), ports(0x64, 1), irq(1)]),
        fixed(*b"MOU_", b"PNP0F13", vec![irq(12)]),
        fixed(*b"RTC_", b"PNP0B00", vec![ports(0x70, 2), irq(8)]),
        fixed(*b"PIC_", b"PNP0000", vec![ports(0x20, 2), ports(0xa0, 2), irq(2)]),
        fixed(*b"TIMR", b"PNP0100", vec![ports(0x40, 4), irq(0)]),
        // What belongs to the board as a whole: ELCR, NMI and speaker, power management, SMI, POST codes, the rest of NVRAM.
        fixed(
            *b"SIO_",
            b"PNP0C02",
            vec![
                ports(0x4d0, 2),
                ports(0x61, 1),
                ports(0x400, 8),
                ports(0x408, 8),
                ports(0xb2, 1),
                ports(0x84, 1),
                ports(0x72, 4),
                ecam,
            ],
        ),
    ]
}

/// The HPET, which is no ISA device but as fixed as they are.
pub(super) fn hpet() -> Term {
    device(
        *b"HPET",
        [
            name(*b"_HID", eisa_id(b"PNP0103")),
            name(*b"_UID", int(0u8)),
            name(*b"_CRS", resources([Resource::memory32(HPET, 0x400)])),
        ],
    )
}
