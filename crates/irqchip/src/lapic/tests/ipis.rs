//! Inter-processor interrupts and message destinations.

use platform::MsiMessage;

use crate::soft::ChipOptions;
use crate::test_support::{Board, Signal};

fn enabled(cpus: u32) -> Board {
    let board = Board::new(cpus);
    for index in 0..cpus {
        board.apic(index as usize).enable();
    }
    board
}

/// Sends through APIC 0 in xAPIC mode.
fn send(board: &Board, destination: u32, low: u32) {
    board.apic(0).put(0x310, destination << 24);
    board.apic(0).put(0x300, low);
}

/// Who has what; served.
fn served(board: &Board) -> Vec<Option<u8>> {
    (0..board.pins.len()).map(|index| board.apic(index).serve()).collect()
}

fn msi(board: &Board, address: u64, data: u32) {
    board.chip.msi().send(MsiMessage { address, data });
}

#[test]
fn physical_destinations_and_shorthands() {
    let board = enabled(3);
    send(&board, 2, 0x4041);
    assert_eq!(served(&board), [None, None, Some(0x41)]);
    send(&board, 0xff, 0x4042);
    assert_eq!(served(&board), [Some(0x42); 3]);
    send(&board, 7, 0x4041);
    send(&board, 1, 0x4_4043);
    assert_eq!(served(&board), [Some(0x43), None, None], "self, whatever the destination");
    send(&board, 0, 0x8_4044);
    assert_eq!(served(&board), [Some(0x44); 3]);
    send(&board, 0, 0xc_4045);
    assert_eq!(served(&board), [None, Some(0x45), Some(0x45)]);
    assert_eq!(board.apic(0).get(0x300), 0xc_4045, "idle");
}

#[test]
fn start_up_sequence() {
    let board = enabled(3);
    send(&board, 0, 0xc_4500);
    send(&board, 0, 0xc_8500);
    send(&board, 0, 0xc_4608);
    send(&board, 1, 0x4699);
    assert!(board.pins[0].take_signals().is_empty());
    assert_eq!(
        board.pins[1].take_signals(),
        [Signal::Init, Signal::Startup(8), Signal::Startup(0x99)],
        "the de-assert of INIT is no INIT"
    );
    assert_eq!(board.pins[2].take_signals(), [Signal::Init, Signal::Startup(8)]);
    send(&board, 0, 0x8_4500);
    send(&board, 0, 0x4_4500);
    send(&board, 0, 0x4300);
    send(&board, 0, 0x4741);
    assert!(board.pins.iter().all(|pins| pins.take_signals().is_empty()), "invalid combinations");
    send(&board, 0, 0x4400);
    assert_eq!(board.pins[0].take_signals(), [Signal::Nmi]);
}

#[test]
fn software_disabled_processors_take_init_and_nmi_but_no_vectors() {
    let board = Board::new(2);
    board.apic(0).enable();
    send(&board, 1, 0x4400);
    send(&board, 1, 0x4041);
    assert_eq!(board.pins[1].take_signals(), [Signal::Nmi]);
    assert_eq!(board.apic(1).pending(), None);
}

#[test]
fn logical_destinations_in_both_models() {
    let board = enabled(4);
    for index in 0..4 {
        board.apic(index).put(0xd0, 0x0100_0000 << index);
    }
    send(&board, 0b0110, 0x4841);
    assert_eq!(served(&board), [None, Some(0x41), Some(0x41), None]);
    for (index, id) in [0x11, 0x12, 0x21, 0x24].into_iter().enumerate() {
        board.apic(index).put(0xe0, 0);
        board.apic(index).put(0xd0, id << 24);
    }
    send(&board, 0x13, 0x4842);
    assert_eq!(served(&board), [Some(0x42), Some(0x42), None, None]);
    send(&board, 0xf4, 0x4843);
    assert_eq!(served(&board), [None, None, None, Some(0x43)]);
    send(&board, 0xff, 0x4844);
    assert_eq!(served(&board), [Some(0x44); 4]);
}

#[test]
fn x2apic_destinations() {
    let board = Board::with_ids(vec![0, 0x11, 0x12, 0x1ff], ChipOptions::default());
    for index in 0..4 {
        board.apic(index).enter_x2apic();
        board.apic(index).write_msr(0x80f, 0x1ff).unwrap();
    }
    let send = |command| board.apic(0).write_msr(0x830, command).unwrap();
    send(0x1ff_0000_4041);
    assert_eq!(served(&board), [None, None, None, Some(0x41)]);
    send(0x1_0006_0000_4842);
    assert_eq!(served(&board), [None, Some(0x42), Some(0x42), None]);
    send(0xffff_ffff_0000_4043);
    assert_eq!(served(&board), [Some(0x43); 4]);
    send(0xff_0000_4043);
    assert_eq!(served(&board), [None; 4], "0xff is an ID like any other");
    msi(&board, 0xfeef_f000, 0x44);
    assert_eq!(served(&board), [Some(0x44); 4], "but for devices it is everybody");
    msi(&board, 0xfeef_f020, 0x45);
    assert_eq!(served(&board), [None, None, None, Some(0x45)], "15-bit destination");
    msi(&board, 0xfee0_100c, 0x46);
    assert_eq!(served(&board), [Some(0x46), None, None, None], "logical, cluster 0");
}

#[test]
fn lowest_priority_goes_to_the_least_busy_and_takes_turns() {
    let board = enabled(3);
    board.apic(0).set_cr8(5);
    for _ in 0..3 {
        msi(&board, 0xfeef_f008, 0x81);
        msi(&board, 0xfeef_f000, 0x182);
    }
    let got: Vec<_> = (0..3).map(|index| (board.apic(index).get(0x240) & 6).count_ones()).collect();
    assert_eq!(got, [0, 2, 2], "both vectors are pending at both idle ones");
    assert_eq!(served(&board)[0], None);
    send(&board, 0, 0xc_4183);
    assert_eq!(served(&board).iter().filter(|vector| **vector == Some(0x83)).count(), 1);
    board.apic(1).set_cr8(9);
    while served(&board).iter().any(Option::is_some) {}
    msi(&board, 0xfeef_f000, 0x184);
    assert_eq!(served(&board), [None, None, Some(0x84)]);
    board.apic(2).put(0xf0, 0xff);
    msi(&board, 0xfeef_f000, 0x185);
    assert_eq!(served(&board), [Some(0x85), None, None], "a disabled one is no candidate");
}

#[test]
fn posting_from_other_threads_loses_nothing() {
    const ROUNDS: u32 = 20_000;
    let board = enabled(3);
    std::thread::scope(|scope| {
        let receiver = board.apic(0);
        for sender in [1, 2] {
            let apic = board.apic(sender);
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    apic.put(0x310, 0);
                    apic.put(0x300, 0x4030 + sender as u32 * 16);
                    // The receiver answers, so that no two requests merge.
                    while apic.serve() != Some(0x99) {
                        std::thread::yield_now();
                    }
                }
            });
        }
        let mut left = 2 * ROUNDS;
        while left > 0 {
            let Some(vector) = receiver.serve() else {
                std::thread::yield_now();
                continue;
            };
            receiver.put(0x310, u32::from(vector - 0x30) << 20);
            receiver.put(0x300, 0x4099);
            left -= 1;
        }
        assert_eq!(receiver.serve(), None);
    });
}
