//! Requests, service, priorities, the 8259 pair's way in, errors.

use crate::lapic::LocalSource;
use crate::message::TriggerMode;
use crate::test_support::{Board, Signal};

fn enabled() -> Board {
    let board = Board::new(1);
    board.apic(0).enable();
    board
}

fn post(board: &Board, vector: u8) -> bool {
    board.apic(0).inbox.post(vector, TriggerMode::Edge)
}

#[test]
fn the_highest_class_above_the_priority_is_delivered() {
    let board = enabled();
    let apic = board.apic(0);
    assert_eq!(apic.pending(), None);
    post(&board, 0x31);
    post(&board, 0x52);
    assert_eq!(apic.pending(), Some(0x52));
    assert_eq!(apic.acknowledge(), 0x52);
    assert_eq!((apic.get(0x120), apic.get(0x220)), (1 << 18, 0));
    assert_eq!(apic.get(0xa0), 0x50, "processor priority follows what is in service");
    post(&board, 0x5f);
    assert_eq!(apic.pending(), None, "same class");
    post(&board, 0x61);
    assert_eq!(apic.pending(), Some(0x61), "nested");
    assert_eq!(apic.acknowledge(), 0x61);
    apic.eoi();
    assert_eq!(apic.get(0xa0), 0x50);
    apic.eoi();
    assert_eq!(apic.serve(), Some(0x5f));
    assert_eq!(apic.serve(), Some(0x31));
    assert_eq!(apic.serve(), None);
}

#[test]
fn the_task_priority_holds_back_and_lets_go() {
    let board = enabled();
    let apic = board.apic(0);
    apic.put(0x80, 0x45);
    assert_eq!((apic.cr8(), apic.get(0xa0)), (4, 0x45));
    post(&board, 0x4f);
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.acknowledge(), 0xff, "nothing deliverable: the spurious vector");
    board.pins[0].take_interrupts();
    apic.set_cr8(3);
    assert_eq!(board.pins[0].take_interrupts(), 1, "the vCPU is told that something became deliverable");
    assert_eq!(apic.get(0x80), 0x30);
    assert_eq!(apic.pending(), Some(0x4f));
    apic.set_cr8(4);
    assert_eq!(apic.pending(), None);
    apic.put(0x80, 0);
    assert_eq!(apic.serve(), Some(0x4f));
    apic.set_cr8(0xff);
    assert_eq!(apic.cr8(), 15);
}

#[test]
fn one_announcement_per_request() {
    let board = enabled();
    post(&board, 0x40);
    post(&board, 0x40);
    assert_eq!(board.pins[0].take_interrupts(), 1);
    assert_eq!(board.apic(0).serve(), Some(0x40));
    assert_eq!(board.apic(0).serve(), None);
}

#[test]
fn software_disabled_means_masked_and_deaf() {
    let board = enabled();
    let apic = board.apic(0);
    apic.put(0x350, 0x400);
    apic.put(0xf0, 0xff);
    assert_eq!(apic.get(0x350), 0x1_0400);
    apic.put(0x350, 0x400);
    assert_eq!(apic.get(0x350), 0x1_0400, "cannot be unmasked");
    assert!(!board.apic(0).inbox.accepts_fixed());
    apic.put(0x300, 0x4_0041);
    assert_eq!(apic.pending(), None);
}

#[test]
fn errors_are_latched_by_writing_and_raise_an_interrupt_once() {
    let board = enabled();
    let apic = board.apic(0);
    apic.put(0x370, 0xe0);
    assert!(!post(&board, 15));
    assert_eq!(apic.get(0x280), 0, "not before a write");
    assert_eq!(apic.serve(), Some(0xe0));
    post(&board, 3);
    assert_eq!(apic.serve(), None, "the error is known");
    apic.put(0x280, 0);
    assert_eq!(apic.get(0x280), 1 << 6);
    apic.put(0x280, 0);
    assert_eq!(apic.get(0x280), 0);
    apic.put(0x3f0, 0x55);
    assert_eq!(apic.serve(), Some(0xe0), "self-IPI register does not exist in xAPIC mode");
    apic.put(0x300, 0x4_000f);
    apic.put(0x280, 0);
    assert_eq!(apic.get(0x280), 1 << 7 | 1 << 5);
    apic.put(0x370, 3);
    apic.get(0x40);
    apic.put(0x280, 0);
    assert_eq!(apic.get(0x280), 1 << 7 | 1 << 6, "the error entry's own vector is illegal");
}

#[test]
fn local_sources_follow_their_entries() {
    let board = enabled();
    let apic = board.apic(0);
    apic.put(0x340, 0x400);
    apic.raise_local(LocalSource::Performance);
    apic.raise_local(LocalSource::Performance);
    assert_eq!(board.pins[0].take_signals(), [Signal::Nmi], "the entry masks itself");
    assert_eq!(apic.get(0x340), 0x1_0400);
    apic.put(0x330, 0x77);
    apic.raise_local(LocalSource::Thermal);
    assert_eq!(apic.serve(), Some(0x77));
    apic.put(0x360, 0x400);
    apic.raise_local(LocalSource::Lint1);
    assert_eq!(board.pins[0].take_signals(), [Signal::Nmi]);
    apic.raise_local(LocalSource::Cmci);
    assert_eq!((apic.serve(), apic.get(0x2f0)), (None, 0x1_0000));
}

#[test]
fn the_pic_gets_through_in_virtual_wire_mode_from_the_beginning() {
    let board = Board::new(2);
    board.init_pic();
    board.chip.router().source(4).unwrap().pulse();
    assert_eq!(board.pins[0].take_interrupts(), 1);
    assert_eq!(board.pins[1].take_interrupts(), 0);
    assert_eq!(board.apic(1).pending(), None);
    assert_eq!(board.apic(0).pending(), Some(0x24));
    assert_eq!(board.apic(0).acknowledge(), 0x24);
    assert_eq!(board.apic(0).pending(), None, "in service at the 8259");
    assert_eq!(board.apic(0).get(0x110), 0, "not at the local APIC");
    board.outb(0x20, 0x20);
    assert_eq!(board.apic(0).pending(), None);
}

#[test]
fn unmasking_lint0_finds_a_waiting_pic() {
    let board = enabled();
    let apic = board.apic(0);
    apic.put(0x350, 0x1_0700);
    board.init_pic();
    board.chip.router().source(12).unwrap().set(true);
    assert_eq!((apic.pending(), board.pins[0].take_interrupts()), (None, 0));
    apic.put(0x350, 0x700);
    assert_eq!(board.pins[0].take_interrupts(), 1);
    assert_eq!(apic.pending(), Some(0x2c));
    post(&board, 0xf0);
    assert_eq!(apic.acknowledge(), 0x2c, "ahead of whatever the local APIC has");
    assert_eq!(apic.serve(), Some(0xf0));
}

#[test]
fn lint0_as_nmi_and_as_level_interrupt() {
    let board = enabled();
    let apic = board.apic(0);
    let line = board.chip.router().source(4).unwrap();
    apic.put(0x350, 0x400);
    board.init_pic();
    line.pulse();
    assert_eq!(board.pins[0].take_signals(), [Signal::Nmi]);
    apic.put(0x350, 0x8044);
    board.outb(0x20, 0x0b);
    board.init_pic();
    line.pulse();
    assert_eq!(apic.pending(), Some(0x44));
    assert_eq!(apic.get(0x350), 0xc044, "remote IRR");
    assert_eq!(apic.serve(), Some(0x44));
    assert_eq!(apic.pending(), Some(0x44), "still asserted at EOI");
    board.outb(0x21, 0xff);
    assert_eq!(apic.serve(), Some(0x44));
    assert_eq!((apic.pending(), apic.get(0x350)), (None, 0x8044));
}

#[test]
fn parts_of_registers_can_be_read_but_not_written() {
    use platform::AccessSize::{Byte, Dword, Qword, Word};
    let board = enabled();
    let apic = board.apic(0);
    assert_eq!(apic.read_mmio(0x32, Byte), 6, "LVT entries less one");
    assert_eq!(apic.read_mmio(0x30, Word), 0x14);
    assert_eq!(apic.read_mmio(0x30, Qword), 0x6_0014);
    assert_eq!(apic.read_mmio(0x34, Dword), 0xffff_ffff);
    assert_eq!(apic.read_mmio(0x1000, Dword), 0xffff_ffff);
    apic.write_mmio(0x80, Byte, 0x50);
    apic.write_mmio(0x81, Dword, 0x50);
    apic.write_mmio(0x1080, Dword, 0x50);
    assert_eq!(apic.get(0x80), 0);
    apic.put(0xe0, 0);
    apic.put(0xd0, u32::MAX);
    assert_eq!((apic.get(0xe0), apic.get(0xd0)), (0x0fff_ffff, 0xff00_0000));
    apic.put(0x20, u32::MAX);
    assert_eq!(apic.get(0x20), 0, "the ID cannot be changed");
}
