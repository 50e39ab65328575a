//! Random accesses by a hostile guest: no panic, and what must hold always holds.

use platform::{MsiMessage, Persist};

use crate::ApicMode;
use crate::lapic::{ExtIntSource, LocalSource};
use crate::test_support::{Board, Random};

fn check(board: &Board) {
    for index in 0..board.pins.len() {
        let apic = board.apic(index);
        let state: crate::lapic::LocalApicState =
            platform::state::decode("lapic", 1, 1, &apic.save().unwrap()).unwrap();
        let in_service = state.isr.highest().map_or(0, |vector| vector >> 4);
        let priority = apic.inbox.priority() >> 4;
        assert_eq!(priority, in_service.max(state.tpr >> 4), "processor priority");
        assert_eq!(state.irr.0[0] & 0xffff, 0, "no reserved vector is ever requested");
        if let Some(vector) = apic.pending()
            && !board.chip.pic().is_asserted()
        {
            assert!(vector >> 4 > priority);
        }
        apic.restore(1, &apic.save().unwrap()).expect("a state it was in is one it can be in");
    }
}

fn access(board: &Board, random: &mut Random) {
    let apic = board.apic(random.below(board.pins.len() as u64) as usize);
    let interesting = [0, 1, 0xff, 0x1ff, 0xffff_ffff, 0x2_0031, 0x4_0031, 0x700, 0xc_0041, 0x8_0900];
    let value = match random.below(3) {
        0 => interesting[random.below(interesting.len() as u64) as usize],
        1 => random.below(0x1000),
        _ => random.next(),
    };
    match random.below(12) {
        0..=3 => apic.write_mmio(random.below(0x41) * 16, platform::AccessSize::Dword, value & 0xffff_ffff),
        4 => apic.write_mmio(random.below(0x1100), random.size(), value),
        5 => {
            apic.read_mmio(random.below(0x1100), random.size());
        }
        6 => {
            let _ = apic.write_msr(0x800 + random.below(0x48) as u32, value);
            let _ = apic.read_msr(0x800 + random.below(0x48) as u32);
        }
        7 => {
            let _ = apic.write_msr(0x6e0, value);
        }
        8 if random.below(8) == 0 => {
            let _ = apic.write_msr(0x1b, 0xfee0_0000 | value & 0xd00);
        }
        8 => apic.set_cr8(value as u8 & 3),
        9 => {
            apic.serve();
        }
        10 => {
            let address = 0xfee0_0000 | random.below(4) << 12 | value & 0xc;
            board.chip.msi().send(MsiMessage { address, data: value as u32 });
            apic.raise_local(LocalSource::Lint1);
        }
        _ => board.clock.advance(random.below(2_000_000)),
    }
}

#[test]
fn random_traffic() {
    for seed in 0..8 {
        let (board, mut random) = (Board::new(3), Random(seed));
        board.init_pic();
        for step in 0..4_000 {
            access(&board, &mut random);
            if step % 16 == 0 {
                check(&board);
            }
        }
        for index in 0..3 {
            let apic = board.apic(index);
            apic.init_reset();
            assert!(apic.mode() == ApicMode::Disabled || apic.inbox.irr.highest().is_none());
        }
    }
}
