//! The 8259 pair through its ports.

use platform::Persist;

use super::*;
use crate::test_support::{Board, Random};

/// An initialised pair with vectors from 0x20 and 0x28.
fn board() -> Board {
    let board = Board::new(1);
    board.init_pic();
    board
}

fn set(board: &Board, line: u32, asserted: bool) {
    board.chip.pic().set_level(line, asserted);
}

fn pulse(board: &Board, line: u32) {
    set(board, line, true);
    set(board, line, false);
}

/// Takes what the pair requests.
fn take(board: &Board) -> Option<u8> {
    let pic = board.chip.pic();
    pic.is_asserted().then(|| {
        let expected = pic.peek();
        assert_eq!(pic.acknowledge(), expected);
        expected
    })
}

/// In-service registers: master, slave.
fn in_service(board: &Board) -> (u8, u8) {
    board.outb(0x20, 0x0b);
    board.outb(0xa0, 0x0b);
    let isr = (board.inb(0x20), board.inb(0xa0));
    board.outb(0x20, 0x0a);
    board.outb(0xa0, 0x0a);
    isr
}

#[test]
fn no_output_before_initialisation_but_the_mask_can_be_used() {
    let board = Board::new(1);
    board.outb(0x21, 0xfb);
    assert_eq!(board.inb(0x21), 0xfb, "software finds out by this whether there is a pair");
    board.outb(0x21, 0);
    pulse(&board, 1);
    assert_eq!(take(&board), None);
    assert_eq!(board.inb(0x20), 2);
    board.outb(0x20, 0x11);
    assert_eq!(board.inb(0x20), 0, "initialisation forgets edges");
    assert_eq!(take(&board), None);
}

#[test]
fn fully_nested_priorities() {
    let board = board();
    pulse(&board, 5);
    pulse(&board, 3);
    assert_eq!(take(&board), Some(0x23));
    pulse(&board, 3);
    assert_eq!(take(&board), None, "equal and lower ones wait");
    pulse(&board, 1);
    assert_eq!(take(&board), Some(0x21));
    assert_eq!(in_service(&board), (0b1010, 0));
    board.outb(0x20, 0x20);
    assert_eq!(in_service(&board), (0b1000, 0), "non-specific EOI ends the highest");
    board.outb(0x20, 0x63);
    assert_eq!(take(&board), Some(0x23));
    board.outb(0x20, 0x20);
    assert_eq!(take(&board), Some(0x25));
}

#[test]
fn the_slave_comes_through_input_2() {
    let board = board();
    pulse(&board, 14);
    pulse(&board, 8);
    assert_eq!(board.inb(0x20), 4);
    assert_eq!(take(&board), Some(0x28));
    assert_eq!(in_service(&board), (4, 1));
    pulse(&board, 3);
    assert_eq!(take(&board), None, "below the cascade");
    board.outb(0xa0, 0x20);
    board.outb(0x20, 0x20);
    assert_eq!(take(&board), Some(0x2e));
    board.outb(0xa0, 0x20);
    board.outb(0x20, 0x20);
    assert_eq!(take(&board), Some(0x23));
    set(&board, 2, true);
    assert_eq!(board.inb(0x20), 0, "nothing else is on input 2");
}

#[test]
fn masks_hold_back_without_forgetting() {
    let board = board();
    board.outb(0x21, 1 << 4);
    pulse(&board, 4);
    assert_eq!((take(&board), board.inb(0x20)), (None, 1 << 4));
    board.outb(0x21, 0);
    assert_eq!(take(&board), Some(0x24));
    board.outb(0x20, 0x20);
    board.outb(0x21, 1 << 2);
    pulse(&board, 9);
    assert_eq!(take(&board), None);
    board.outb(0x21, 0);
    assert_eq!(take(&board), Some(0x29));
}

#[test]
fn a_request_that_vanishes_is_spurious() {
    let board = board();
    board.outb(0x4d0, 1 << 5);
    set(&board, 5, true);
    assert!(board.chip.pic().is_asserted());
    set(&board, 5, false);
    assert_eq!(board.chip.pic().acknowledge(), 0x27);
    assert_eq!(in_service(&board), (0, 0), "needs no EOI");
}

#[test]
fn level_inputs_ask_again() {
    let board = board();
    board.outb(0x4d0, 0xff);
    board.outb(0x4d1, 0xff);
    assert_eq!((board.inb(0x4d0), board.inb(0x4d1)), (0xf8, 0xde), "some inputs are always edge-triggered");
    set(&board, 10, true);
    assert_eq!(take(&board), Some(0x2a));
    board.outb(0xa0, 0x20);
    board.outb(0x20, 0x20);
    assert_eq!(take(&board), Some(0x2a));
    set(&board, 10, false);
    board.outb(0xa0, 0x20);
    board.outb(0x20, 0x20);
    assert_eq!(take(&board), None);
    set(&board, 11, true);
    board.init_pic();
    assert_eq!(take(&board), Some(0x2b), "levels survive initialisation");
}

#[test]
fn switching_an_input_to_level_takes_its_level() {
    let board = board();
    pulse(&board, 10);
    board.outb(0x4d1, 4);
    assert_eq!(take(&board), None, "the line is down");
    set(&board, 10, true);
    board.outb(0x4d1, 0);
    assert_eq!(take(&board), Some(0x2a));
}

#[test]
fn rotation() {
    let board = board();
    board.outb(0x20, 0xc4);
    pulse(&board, 0);
    pulse(&board, 5);
    assert_eq!(take(&board), Some(0x25), "5 is the highest when 4 is the lowest");
    board.outb(0x20, 0xa0);
    assert_eq!(take(&board), Some(0x20));
    pulse(&board, 5);
    pulse(&board, 1);
    board.outb(0x20, 0xe0);
    assert_eq!(take(&board), Some(0x21), "0 is the lowest now");
}

#[test]
fn automatic_eoi_with_rotation() {
    let board = Board::new(1);
    for (port, value) in [(0x20, 0x13), (0x21, 0x40), (0x21, 3), (0x21, 0), (0x20, 0x80)] {
        board.outb(port, value);
    }
    for line in [0, 1, 3] {
        pulse(&board, line);
    }
    assert_eq!((take(&board), in_service(&board).0), (Some(0x40), 0));
    pulse(&board, 0);
    assert_eq!(take(&board), Some(0x41), "0 has gone to the end");
    board.outb(0x20, 0);
    assert_eq!(take(&board), Some(0x43));
    assert_eq!(take(&board), Some(0x40));
    pulse(&board, 1);
    assert_eq!(take(&board), Some(0x41));
}

#[test]
fn special_mask_mode_lets_lower_ones_through() {
    let board = board();
    pulse(&board, 1);
    assert_eq!(take(&board), Some(0x21));
    pulse(&board, 6);
    board.outb(0x21, 1 << 1);
    assert_eq!(take(&board), None);
    board.outb(0x20, 0x68);
    assert_eq!(take(&board), Some(0x26));
    board.outb(0x20, 0x20);
    assert_eq!(in_service(&board).0, 1 << 1, "EOI spares what is masked");
    board.outb(0x20, 0x48);
    board.outb(0x20, 0x20);
    assert_eq!(in_service(&board).0, 0);
}

#[test]
fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
    let board = board();
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 0x11), (0x21, 0)] {
        board.outb(port, value);
    }
    pulse(&board, 12);
    assert_eq!(take(&board), Some(0x2c));
    pulse(&board, 9);
    assert_eq!(take(&board), Some(0x29));
    pulse(&board, 3);
    assert_eq!(take(&board), None, "other inputs still wait");
}

#[test]
fn polling_serves() {
    let board = board();
    pulse(&board, 11);
    board.outb(0xa0, 0x0c);
    assert_eq!(board.inb(0xa0), 0x83);
    assert_eq!(in_service(&board), (0, 1 << 3));
    assert_eq!(take(&board), None, "gone from the master's input");
    board.outb(0x20, 0x0c);
    assert_eq!(board.inb(0x21), 0, "nothing; either port answers");
    assert_eq!(board.inb(0x21), 0);
}

#[test]
fn rising_output_is_announced() {
    let board = board();
    pulse(&board, 4);
    pulse(&board, 3);
    assert_eq!(board.pins[0].take_interrupts(), 1, "one rise");
    assert_eq!(take(&board), Some(0x23));
    assert_eq!(board.pins[0].take_interrupts(), 0);
    board.outb(0x20, 0x20);
    assert_eq!(board.pins[0].take_interrupts(), 1);
}

#[test]
fn word_accesses_are_two_bytes() {
    let board = board();
    assert!(board.ports.write(0x4d0, AccessSize::Word, 0x0c20));
    assert_eq!(board.ports.read(0x4d0, AccessSize::Word), Some(0x0c20));
    assert!(board.ports.write(0x20, AccessSize::Word, 0xfb0a));
    assert_eq!(board.inb(0x21), 0xfb);
}

#[test]
fn state_round_trip() {
    let one = board();
    one.outb(0x4d1, 4);
    one.outb(0x20, 0xc2);
    set(&one, 10, true);
    pulse(&one, 6);
    assert_eq!(take(&one), Some(0x26));
    let bytes = one.chip.pic().save().unwrap();
    let two = Board::new(1);
    two.chip.pic().restore(1, &bytes).unwrap();
    assert_eq!(two.chip.pic().save().unwrap(), bytes);
    assert_eq!((take(&two), in_service(&two)), (None, (1 << 6, 0)));
    two.outb(0x20, 0x20);
    assert_eq!(take(&two), Some(0x2a));
    assert!(two.chip.pic().restore(1, &bytes[1..]).is_err());
    assert!(two.chip.pic().restore(2, &bytes).is_err());
    two.chip.pic().reset();
    assert_eq!((take(&two), two.inb(0x4d1)), (None, 0));
}

#[test]
fn random_traffic() {
    let ports = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
    for seed in 0..4 {
        let (board, mut random) = (board(), Random(seed));
        for _ in 0..20_000 {
            let port = ports[random.below(6) as usize];
            match random.below(5) {
                0 => set(&board, random.below(20) as u32, random.below(2) == 0),
                1 => {
                    board.inb(port);
                }
                2 => {
                    take(&board);
                }
                3 if random.below(50) == 0 => board.init_pic(),
                _ => board.outb(port, random.next() as u8),
            }
            let bytes = board.chip.pic().save().unwrap();
            let asserted = board.chip.pic().is_asserted();
            board.chip.pic().restore(1, &bytes).expect("a state it was in is one it can be in");
            assert_eq!(board.chip.pic().is_asserted(), asserted, "the output follows from the state");
        }
    }
}
