//! IA32_APIC_BASE, the MSR interface, INIT, snapshots.

use platform::Persist;
use platform::state::{StateError, decode, encode};

use crate::lapic::{Features, GeneralProtection, LocalApicState};
use crate::soft::ChipOptions;
use crate::test_support::Board;
use crate::{ApicMode, LocalApic};

const ENABLED: u64 = 0xfee0_0800;
const X2APIC: u64 = 0xfee0_0c00;

#[test]
fn mode_transitions() {
    let board = Board::new(2);
    let apic = board.apic(1);
    assert_eq!(board.apic(0).read_msr(0x1b), Ok(0xfee0_0900));
    assert_eq!(apic.read_msr(0x1b), Ok(ENABLED));
    assert_eq!(apic.mmio_base(), Some(0xfee0_0000));
    let gp = Err(GeneralProtection);
    assert_eq!(apic.write_msr(0x1b, 0xfee0_0400), gp, "x2APIC without enable");
    assert_eq!(apic.write_msr(0x1b, ENABLED | 1), gp, "reserved bit");
    assert_eq!(apic.write_msr(0x1b, ENABLED | 1 << 52), gp, "beyond physical addresses");
    assert_eq!(apic.write_msr(0x1b, 0x1_2340_0800), Ok(()));
    assert_eq!(apic.mmio_base(), Some(0x1_2340_0000), "the page moves");
    assert_eq!(apic.write_msr(0x1b, X2APIC), Ok(()));
    assert_eq!((apic.mode(), apic.mmio_base()), (ApicMode::X2Apic, None));
    assert_eq!(apic.get(0x30), u32::MAX, "no page in x2APIC mode");
    assert_eq!(apic.write_msr(0x1b, ENABLED), gp, "no way back but through disabled");
    apic.write_msr(0x80f, 0x1ff).unwrap();
    assert_eq!(apic.write_msr(0x1b, 0xfee0_0000), Ok(()));
    assert_eq!((apic.mode(), apic.read_msr(0x802)), (ApicMode::Disabled, Err(GeneralProtection)));
    assert_eq!(apic.write_msr(0x1b, X2APIC), gp);
    assert_eq!(apic.write_msr(0x1b, ENABLED), Ok(()));
    assert_eq!(apic.get(0xf0), 0xff, "disabling reset it");
}

#[test]
fn features_can_be_absent() {
    let features = Features { x2apic: false, tsc_deadline: false, eoi_suppression: true };
    let board = Board::with_ids(vec![0], ChipOptions { features, physical_bits: 36, ..Default::default() });
    let apic = board.apic(0);
    assert_eq!(apic.write_msr(0x1b, 0xf_fee0_0900), Ok(()));
    assert_eq!(apic.write_msr(0x1b, 0x1f_fee0_0900), Err(GeneralProtection));
    assert_eq!(apic.write_msr(0x1b, X2APIC), Err(GeneralProtection));
    assert_eq!(apic.read_msr(0x6e0), Err(GeneralProtection));
    assert_eq!(apic.write_msr(0x6e0, 1), Err(GeneralProtection));
    apic.enable();
    apic.put(0x320, 0x4_0030);
    assert_eq!(apic.get(0x320), 0x30);
    assert_eq!(apic.get(0x30), 0x0106_0014);
    apic.put(0xf0, 0x11ff);
    assert_eq!(apic.get(0xf0), 0x11ff);
}

#[test]
fn a_disabled_apic_lets_the_pic_through_and_takes_no_messages() {
    let board = Board::new(1);
    let apic = board.apic(0);
    apic.enable();
    apic.put(0x350, 0x1_0000);
    board.init_pic();
    board.chip.router().source(3).unwrap().pulse();
    assert_eq!(apic.pending(), None);
    apic.write_msr(0x1b, 0xfee0_0100).unwrap();
    assert_eq!(apic.pending(), Some(0x23));
    assert_eq!(apic.acknowledge(), 0x23);
    board.chip.msi().send(platform::MsiMessage { address: 0xfee0_0000, data: 0x50 });
    assert_eq!(apic.pending(), None);
}

#[test]
fn x2apic_registers_and_their_faults() {
    let board = Board::with_ids(vec![0, 0x25], ChipOptions::default());
    let apic = board.apic(1);
    assert_eq!(apic.read_msr(0x802), Err(GeneralProtection), "not in xAPIC mode");
    apic.enter_x2apic();
    assert_eq!(apic.read_msr(0x802), Ok(0x25));
    assert_eq!(apic.read_msr(0x80d), Ok(0x2_0020));
    assert_eq!(apic.read_msr(0x803), Ok(0x6_0014));
    for absent in [0x800, 0x801, 0x804, 0x809, 0x80c, 0x80e, 0x829, 0x831, 0x83a, 0x840, 0x8ff] {
        assert_eq!(apic.read_msr(absent), Err(GeneralProtection), "{absent:#x}");
        assert_eq!(apic.write_msr(absent, 0), Err(GeneralProtection), "{absent:#x}");
    }
    for read_only in [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x818, 0x820, 0x839] {
        assert!(apic.read_msr(read_only).is_ok());
        assert_eq!(apic.write_msr(read_only, 0), Err(GeneralProtection), "{read_only:#x}");
    }
    for write_only in [0x80b, 0x83f] {
        assert_eq!(apic.read_msr(write_only), Err(GeneralProtection), "{write_only:#x}");
    }
    let reserved =
        [(0x80b, 1), (0x828, 1), (0x808, 0x100), (0x832, 1 << 32), (0x832, 0x2000), (0x83e, 4), (0x830, 1 << 13)];
    for (register, value) in reserved {
        assert_eq!(apic.write_msr(register, value), Err(GeneralProtection), "{register:#x}");
    }
    apic.write_msr(0x80f, 0x1ff).unwrap();
    apic.write_msr(0x83f, 0x41).unwrap();
    apic.write_msr(0x808, 0x20).unwrap();
    assert_eq!(apic.cr8(), 2);
    assert_eq!(apic.serve(), Some(0x41));
    apic.write_msr(0x830, 0x7_0000_0141 | 1 << 12).unwrap();
    assert_eq!(apic.read_msr(0x830), Ok(0x7_0000_0141), "one 64-bit register; delivery status reads 0");
    apic.write_msr(0x83f, 2).unwrap();
    apic.write_msr(0x828, 0).unwrap();
    assert_eq!(apic.read_msr(0x828), Ok(1 << 5));
    assert!(LocalApic::owns_msr(0x6e0) && LocalApic::owns_msr(0x8ff) && !LocalApic::owns_msr(0x900));
}

#[test]
fn init_keeps_mode_and_id_only() {
    let board = Board::new(2);
    let apic = board.apic(1);
    apic.enter_x2apic();
    apic.write_msr(0x80f, 0x1ff).unwrap();
    apic.write_msr(0x808, 0x30).unwrap();
    apic.write_msr(0x83f, 0x80).unwrap();
    apic.init_reset();
    assert_eq!((apic.mode(), apic.read_msr(0x802)), (ApicMode::X2Apic, Ok(1)));
    assert_eq!((apic.read_msr(0x80f), apic.read_msr(0x808), apic.read_msr(0x824)), (Ok(0xff), Ok(0), Ok(0)));
    assert_eq!((apic.read_msr(0x835), apic.pending()), (Ok(0x1_0000), None));
    let boot = board.apic(0);
    boot.init_reset();
    assert_eq!(boot.get(0x350), 0x700, "virtual wire");
}

#[test]
fn state_round_trip() {
    let board = Board::new(1);
    let apic = board.apic(0);
    apic.enable();
    apic.put(0x80, 0x20);
    apic.put(0x320, 0x2_0033);
    apic.put(0x3e0, 0xb);
    apic.put(0x380, 1 << 27);
    apic.put(0x310, 0x0500_0000);
    apic.put(0x300, 0x4_0090);
    assert_eq!(apic.acknowledge(), 0x90);
    apic.put(0x300, 0x4_0044);
    board.clock.advance(300_000_000);
    let bytes = apic.save().unwrap();
    let other = Board::new(1);
    other.clock.advance(12_345_678);
    let copy = other.apic(0);
    copy.restore(1, &bytes).unwrap();
    assert_eq!(copy.save().unwrap(), bytes);
    assert_eq!(copy.pending(), None, "0x90 is in service");
    copy.eoi();
    assert_eq!(copy.serve(), Some(0x44));
    other.clock.advance(699_999_000);
    assert_eq!(copy.serve(), None);
    other.clock.advance(1_001);
    assert_eq!(copy.serve(), Some(0x33), "the second is over");
    other.clock.advance(1_000_000_000);
    assert_eq!(copy.serve(), Some(0x33));
}

#[test]
fn impossible_states_are_refused() {
    let board = Board::new(2);
    let bytes = board.apic(0).save().unwrap();
    let good: LocalApicState = decode("lapic", 1, 1, &bytes).unwrap();
    let refused = |break_it: &dyn Fn(&mut LocalApicState)| {
        let mut state = good.clone();
        break_it(&mut state);
        let result = board.apic(0).restore(1, &encode("lapic", &state).unwrap());
        assert!(matches!(result, Err(StateError::Invalid { .. })), "{state:?}");
    };
    refused(&|state| state.id = 1);
    refused(&|state| state.base = 0x400);
    refused(&|state| state.base |= 1);
    refused(&|state| state.lvt[0] |= 1 << 31);
    refused(&|state| state.svr = 1 << 20);
    refused(&|state| state.divide = 4);
    refused(&|state| state.irr.insert(14));
    refused(&|state| state.ticks_left = Some(1 << 40));
    assert!(matches!(board.apic(0).restore(2, &bytes), Err(StateError::Version { .. })));
    assert!(board.apic(0).restore(1, &bytes[1..]).is_err());
    board.apic(0).restore(1, &bytes).unwrap();
}
