//! The I/O APIC alone (messages recorded) and on a board (EOIs from a real local APIC).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::message::{DeliveryMode, Destination, Message, TriggerMode};
use crate::soft::ChipOptions;
use crate::test_support::{Board, Random, Signal};

#[derive(Default)]
struct Recorder {
    messages: Mutex<Vec<Message>>,
    refuse: AtomicBool,
}

impl MessageSink for Recorder {
    fn deliver(&self, message: &Message) -> bool {
        self.messages.lock().unwrap().push(*message);
        !self.refuse.load(Ordering::Relaxed)
    }
}

impl Recorder {
    fn take(&self) -> Vec<Message> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }
    fn count(&self) -> usize {
        self.take().len()
    }
}

fn chip() -> (IoApic, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    (IoApic::new(24, false, recorder.clone()), recorder)
}

fn put(chip: &IoApic, register: u64, value: u64) {
    chip.write(0, AccessSize::Dword, register);
    chip.write(0x10, AccessSize::Dword, value);
}

fn get(chip: &IoApic, register: u64) -> u64 {
    chip.write(0, AccessSize::Byte, register);
    chip.read(0x10, AccessSize::Dword)
}

const LEVEL: u64 = 0x8000;
const REMOTE_IRR: u64 = 0x4000;
const MASKED: u64 = 0x1_0000;

#[test]
fn registers() {
    let (chip, _) = chip();
    assert_eq!((get(&chip, 0), get(&chip, 1)), (0, 0x17_0011));
    put(&chip, 0, 0xffff_ffff);
    assert_eq!((get(&chip, 0), get(&chip, 2)), (0x0f00_0000, 0x0f00_0000));
    put(&chip, 1, 0);
    assert_eq!(get(&chip, 1), 0x17_0011);
    assert_eq!((get(&chip, 0x10), get(&chip, 0x3f)), (MASKED, 0));
    put(&chip, 0x3e, 0xffff_ffff);
    put(&chip, 0x3f, 0xffff_ffff);
    assert_eq!((get(&chip, 0x3e), get(&chip, 0x3f)), (0x1_afff, 0xfffe_0000));
    assert_eq!((get(&chip, 0x40), get(&chip, 3)), (0xffff_ffff, 0xffff_ffff), "no such registers");
    chip.write(0, AccessSize::Dword, 1);
    assert_eq!(chip.read(0x12, AccessSize::Word), 0x17);
    assert_eq!(chip.read(0, AccessSize::Dword), 1);
    chip.write(0, AccessSize::Dword, 0x10);
    chip.write(0x10, AccessSize::Byte, 0);
    assert_eq!(get(&chip, 0x10), MASKED, "the window takes 32 bits only");
    let newer = IoApic::new(32, true, Arc::new(Recorder::default()));
    assert_eq!(get(&newer, 1), 0x1f_0020);
    assert_eq!(IoApic::new(99, true, Arc::new(Recorder::default())).pins(), 32);
}

#[test]
fn an_edge_sends_one_message() {
    let (chip, recorder) = chip();
    put(&chip, 0x15, 0x0300_0000);
    put(&chip, 0x14, 0x941);
    chip.set_level(2, true);
    chip.set_level(2, true);
    chip.set_level(2, false);
    let message = Message {
        destination: Destination::Logical(3),
        mode: DeliveryMode::LowestPriority,
        vector: 0x41,
        trigger: TriggerMode::Edge,
    };
    assert_eq!(recorder.take(), [message]);
    put(&chip, 0x15, 0x0302_0000);
    put(&chip, 0x14, 0x41);
    chip.set_level(2, true);
    assert_eq!(recorder.take()[0].destination, Destination::Physical(0x103), "extended destination");
    chip.set_level(99, true);
    assert_eq!(recorder.count(), 0);
}

#[test]
fn an_edge_at_a_masked_pin_is_lost() {
    let (chip, recorder) = chip();
    put(&chip, 0x14, 0x41 | MASKED);
    chip.set_level(2, true);
    put(&chip, 0x14, 0x41);
    assert_eq!(recorder.count(), 0);
    chip.set_level(2, false);
    chip.set_level(2, true);
    assert_eq!(recorder.count(), 1);
}

#[test]
fn a_level_is_sent_once_per_eoi() {
    let (chip, recorder) = chip();
    put(&chip, 0x14, 0x41 | LEVEL | MASKED);
    chip.set_level(2, true);
    assert_eq!(recorder.count(), 0);
    put(&chip, 0x14, 0x41 | LEVEL);
    assert_eq!(recorder.take()[0].trigger, TriggerMode::Level);
    assert_eq!(get(&chip, 0x14), 0x41 | LEVEL | REMOTE_IRR);
    chip.set_level(2, false);
    chip.set_level(2, true);
    chip.end_of_interrupt(0x42);
    assert_eq!(recorder.count(), 0, "still being served");
    chip.end_of_interrupt(0x41);
    assert_eq!(recorder.count(), 1, "asserted again");
    chip.set_level(2, false);
    chip.end_of_interrupt(0x41);
    assert_eq!((recorder.count(), get(&chip, 0x14)), (0, 0x41 | LEVEL));
    chip.set_level(2, true);
    assert_eq!(recorder.count(), 1);
}

#[test]
fn masking_while_served_and_ending_by_trigger_mode() {
    let (chip, recorder) = chip();
    put(&chip, 0x14, 0x41 | LEVEL);
    chip.set_level(2, true);
    put(&chip, 0x14, 0x41 | LEVEL | MASKED);
    chip.end_of_interrupt(0x41);
    assert_eq!(recorder.count(), 1);
    put(&chip, 0x14, 0x41 | LEVEL);
    assert_eq!(recorder.count(), 1, "unmasked with the level up");
    // The way of software without an EOI register: edge for a moment.
    put(&chip, 0x14, 0x41 | MASKED);
    put(&chip, 0x14, 0x41 | LEVEL | MASKED);
    assert_eq!(get(&chip, 0x14) & REMOTE_IRR, 0);
    put(&chip, 0x14, 0x41 | LEVEL);
    assert_eq!(recorder.count(), 1);
}

#[test]
fn a_level_nobody_took_is_asked_again() {
    let (chip, recorder) = chip();
    recorder.refuse.store(true, Ordering::Relaxed);
    put(&chip, 0x14, 0x41 | LEVEL);
    chip.set_level(2, true);
    assert_eq!((recorder.count(), get(&chip, 0x14) & REMOTE_IRR), (1, 0));
    recorder.refuse.store(false, Ordering::Relaxed);
    put(&chip, 0x15, 0x0100_0000);
    assert_eq!((recorder.count(), get(&chip, 0x14) & REMOTE_IRR), (1, REMOTE_IRR), "another destination");
}

#[test]
fn other_delivery_modes_are_edges() {
    let (chip, recorder) = chip();
    for (mode, expected) in [(4, DeliveryMode::Nmi), (5, DeliveryMode::Init), (7, DeliveryMode::ExtInt)] {
        put(&chip, 0x14, 0x41 | LEVEL | mode << 8);
        chip.set_level(2, true);
        let message = recorder.take().pop().unwrap();
        assert_eq!((message.mode, message.trigger), (expected, TriggerMode::Edge));
        assert_eq!(get(&chip, 0x14) & REMOTE_IRR, 0);
        chip.set_level(2, false);
    }
    for reserved in [3, 6] {
        put(&chip, 0x14, 0x41 | reserved << 8);
        chip.set_level(2, true);
        chip.set_level(2, false);
        assert_eq!(recorder.count(), 0);
    }
}

#[test]
fn level_interrupts_all_the_way_to_eoi() {
    let board = Board::new(2);
    board.apic(1).enable();
    let (a, b) = (board.chip.router().source(18).unwrap(), board.chip.router().source(18).unwrap());
    board.redirect(18, 1 << 56 | 0x55 | LEVEL);
    a.set(true);
    assert_eq!(board.apic(1).pending(), Some(0x55));
    assert_eq!(board.apic(1).acknowledge(), 0x55);
    assert_eq!(board.apic(1).get(0x1a0), 1 << 21, "trigger mode");
    b.set(true);
    a.set(false);
    board.apic(1).eoi();
    assert_eq!(board.apic(1).pending(), Some(0x55), "shared with another device");
    assert_eq!(board.apic(1).acknowledge(), 0x55);
    b.set(false);
    board.apic(1).eoi();
    assert_eq!((board.apic(1).pending(), board.redirection(18) & REMOTE_IRR), (None, 0));
    board.redirect(18, 1 << 56 | 0x400);
    b.set(true);
    assert_eq!(board.pins[1].take_signals(), [Signal::Nmi]);
}

#[test]
fn suppressed_eois_are_written_by_software() {
    let mut options = ChipOptions::default();
    options.features.eoi_suppression = true;
    let board = Board::with_ids(vec![0], options);
    board.apic(0).put(0xf0, 0x11ff);
    board.redirect(18, 0x55 | LEVEL);
    board.chip.router().set_level(18, true);
    assert_eq!(board.apic(0).serve(), Some(0x55));
    assert_eq!(board.redirection(18) & REMOTE_IRR, REMOTE_IRR);
    assert!(board.memory.write(IOAPIC_ADDRESS + 0x40, AccessSize::Dword, 0x55));
    assert_eq!(board.apic(0).serve(), Some(0x55));
}

#[test]
fn the_pic_reaches_pin_0_as_ext_int() {
    let board = Board::new(1);
    board.apic(0).enable();
    board.apic(0).put(0x350, MASKED as u32);
    board.redirect(0, 0x700);
    board.init_pic();
    let (keyboard, serial) = (board.chip.router().source(1).unwrap(), board.chip.router().source(4).unwrap());
    serial.pulse();
    keyboard.pulse();
    assert_eq!(board.apic(0).pending(), Some(0x21));
    assert_eq!(board.apic(0).acknowledge(), 0x21);
    assert_eq!(board.apic(0).pending(), None, "the other one is blocked by the one in service");
    board.outb(0x20, 0x20);
    assert_eq!(board.apic(0).pending(), Some(0x24));
    assert_eq!(board.apic(0).acknowledge(), 0x24);
}

#[test]
fn state_is_restored_silently_and_checked() {
    let (chip, recorder) = chip();
    put(&chip, 0x14, 0x41 | LEVEL);
    put(&chip, 0x16, 0x42);
    chip.set_level(2, true);
    chip.set_level(3, true);
    let bytes = chip.save().unwrap();
    recorder.take();
    chip.reset();
    assert_eq!(get(&chip, 0x14), MASKED);
    chip.restore(1, &bytes).unwrap();
    chip.set_level(2, true);
    chip.set_level(3, true);
    assert_eq!(recorder.count(), 0, "no new edges");
    chip.end_of_interrupt(0x41);
    assert_eq!(recorder.count(), 1);
    assert!(IoApic::new(32, false, recorder.clone()).restore(1, &bytes).is_err(), "other pins");
    let broken = IoApicState { id: 0, select: 0, entries: vec![1 << 12; 24], levels: 0 };
    assert!(chip.restore(1, &encode(KIND, &broken).unwrap()).is_err());
    let broken = IoApicState { id: 0, select: 0, entries: vec![0; 24], levels: 1 << 24 };
    assert!(chip.restore(1, &encode(KIND, &broken).unwrap()).is_err());
}

#[test]
fn random_traffic() {
    let mut random = Random(4711);
    for pins in [1, 24, 32] {
        let recorder = Arc::new(Recorder::default());
        let chip = IoApic::new(pins, random.below(2) == 0, recorder.clone());
        for _ in 0..50_000 {
            match random.below(6) {
                0 => chip.write(random.below(0x50), random.size(), random.next()),
                1 => put(&chip, random.below(0x60), random.next()),
                2 => chip.end_of_interrupt(random.next() as u8),
                3 => recorder.refuse.store(random.below(2) == 0, Ordering::Relaxed),
                4 => assert!(chip.read(random.below(0x1000), AccessSize::Word) <= 0xffff),
                _ => chip.set_level(random.below(40) as u32, random.below(2) == 0),
            }
            assert!(recorder.count() <= pins as usize);
            let state: IoApicState = decode(KIND, VERSION, VERSION, &chip.save().unwrap()).unwrap();
            for entry in &state.entries {
                assert!(entry & REMOTE_IRR == 0 || entry & LEVEL != 0, "remote IRR is for levels");
            }
            chip.restore(VERSION, &encode(KIND, &state).unwrap()).unwrap();
        }
    }
}
