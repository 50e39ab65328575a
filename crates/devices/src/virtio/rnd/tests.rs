use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::irq::PATIENCE;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, VirtioGuest};

use super::*;
use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const DATA: u64 = 0x40000;

fn board() -> TestBoard {
    TestBoard::new(&[("pci.0.5.0.device", "virtio-rnd")])
}

#[test]
fn fills_what_is_writable_and_nothing_else() {
    let board = board();
    for modern in [false, true] {
        let mut guest = board.virtio(5, modern);
        guest.negotiate(0);
        let mut queue = guest.open_queue(0, RINGS);
        assert_eq!(queue.size, 64);
        guest.driver_ok();
        board.ram.fill(DATA, 0x1000, 0xee).unwrap();
        queue.push(&[
            Buffer::readable(DATA, 64),
            Buffer::writable(DATA + 0x100, 100),
            Buffer::writable(DATA + 0x200, 28),
        ]);
        guest.notify(0);
        assert_eq!(queue.wait_used().1, 128);
        let mut bytes = [0; 0x300];
        board.ram.read(DATA, &mut bytes).unwrap();
        let changed = |range: std::ops::Range<usize>| bytes[range].iter().filter(|byte| **byte != 0xee).count();
        assert_eq!(changed(0..0x100) + changed(0x164..0x200) + changed(0x21c..0x300), 0);
        // One byte in 256 stays the same by chance.
        assert!(changed(0x100..0x164) > 80 && changed(0x200..0x21c) > 20);
    }
}

#[test]
fn asks_to_be_told_of_the_next_request() {
    let board = board();
    let mut guest = board.virtio(5, true);
    guest.negotiate(super::super::feature::EVENT_IDX);
    let mut queue = guest.open_queue(0, RINGS);
    guest.driver_ok();
    for round in 1..4 {
        queue.push(&[Buffer::writable(DATA, 8)]);
        guest.notify(0);
        queue.wait_used();
        // A driver kicks only for the index that the device asked for.
        let deadline = std::time::Instant::now() + PATIENCE;
        while queue.available_event() != round {
            assert!(std::time::Instant::now() < deadline, "the device never asked for buffer {round}");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_greedy_request_gets_a_part() {
    let board = board();
    let mut guest = board.virtio(5, true);
    guest.negotiate(0);
    let mut queue = guest.open_queue(0, RINGS);
    guest.driver_ok();
    queue.push(&[Buffer::writable(DATA, 0x20000)]);
    queue.push(&[Buffer::readable(DATA, 1)]);
    guest.notify(0);
    assert_eq!(queue.wait_used().1 as usize, MAX_BYTES);
    assert_eq!(queue.wait_used().1, 0, "nothing to write to");
}

#[test]
fn the_thread_has_a_name_and_ends_with_the_device() {
    let names = || -> Vec<String> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()).collect()
    };
    let board = TestBoard::new(&[("pci.0.29.7.device", "virtio-rnd")]);
    let start = std::time::Instant::now();
    // A thread takes its name when it first runs.
    while !names().iter().any(|name| name == "rnd-29:7\n") {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    drop(board);
    assert!(!names().iter().any(|name| name == "rnd-29:7\n"));
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut guest = make(subject.function(), subject.ram.clone());
        guest.negotiate(u64::MAX);
        let mut queue = guest.open_queue(0, RINGS);
        guest.driver_ok();
        queue.push(&[Buffer::writable(DATA, 32)]);
        guest.notify(0);
        assert_eq!(queue.wait_used().1, 32);
    }
}

#[test]
fn conforms() {
    conformance::check(|| board().subject(5), work(false));
    conformance::check(|| board().subject(5), work(true));
}

#[test]
fn fuzz() {
    let make = || board().subject(5);
    let request = |random: &mut Random, _: u16| vec![0; random.below(3) as usize];
    Hostile { make, work: work(true), request }.check();
}
