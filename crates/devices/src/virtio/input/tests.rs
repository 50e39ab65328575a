//! The host's device is a recorded stream of events.

use std::os::unix::net::UnixStream;

use backend::evdev::InputInfo;
use platform::AccessSize::Byte;
use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::irq::PATIENCE;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use super::*;
use crate::pci::PciAddress;
use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const DATA: u64 = 0x40000;

fn info() -> InputInfo {
    InputInfo {
        name: b"keyboard".to_vec(),
        serial: b"1".to_vec(),
        ids: [3, 0x1234, 0x5678, 1],
        properties: vec![0, 0, 0, 0],
        events: [(1, vec![0, 0, 0, 0x40, 0, 0]), (0x11, vec![7])].into(),
        axes: [(0, [0, 100, 1, 2, 3])].into(),
    }
}

/// A board with the device, and the far end of its stream.
fn board() -> (TestBoard, Evdev) {
    let board = TestBoard::bare();
    let (ours, theirs) = UnixStream::pair().unwrap();
    for stream in [&ours, &theirs] {
        stream.set_nonblocking(true).unwrap();
    }
    let config = config::Config::new(config::NoWarnings);
    let context = BuildContext {
        address: PciAddress::new(0, 5, 0).unwrap(),
        pci: &board.pci,
        memory: &board.ram,
        config: &config,
        cpus: 1,
    };
    let device = Evdev::recorded(theirs.into(), info());
    let function = transport::build(&context, spec(), |virtio| Input::new(virtio, device)).unwrap();
    board.pci.add(function).unwrap();
    board.pci.finish().unwrap();
    (board, Evdev::recorded(ours.into(), InputInfo::default()))
}

fn start(mut guest: VirtioGuest) -> (VirtioGuest, Vec<GuestQueue>) {
    guest.negotiate(0);
    let mut queues: Vec<_> = (0..2).map(|n| guest.open_queue(n, RINGS + 0x4000 * u64::from(n))).collect();
    guest.driver_ok();
    for slot in 0..8 {
        queues[0].push(&[Buffer::writable(DATA + slot * 8, 8)]);
    }
    guest.notify(0);
    (guest, queues)
}

const KEY: InputEvent = InputEvent { kind: 1, code: 30, value: 1 };
const END: InputEvent = InputEvent { kind: 0, code: 0, value: 0 };

#[test]
fn events_reach_the_guest_in_groups() {
    let (board, far) = board();
    assert_eq!(board.guest(5, 0).config32(0), 0x1052_1af4);
    let (guest, mut queues) = start(board.virtio(5, true));
    far.write(KEY).unwrap();
    far.write(END).unwrap();
    assert_eq!([queues[0].wait_used().1, queues[0].wait_used().1], [8, 8]);
    assert_eq!(board.ram.read_u64(DATA).unwrap(), 1 | 30 << 16 | 1 << 32);
    assert_eq!(board.ram.read_u64(DATA + 8).unwrap(), 0);
    // A light, the other way.
    board.ram.write_u64(DATA + 0x1000, 0x11 | 1 << 16 | 1 << 32).unwrap();
    queues[1].push(&[Buffer::readable(DATA + 0x1000, 8)]);
    guest.notify(1);
    queues[1].wait_used();
    assert_eq!(far.read().unwrap(), [InputEvent { kind: 0x11, code: 1, value: 1 }]);
}

#[test]
fn a_group_without_room_is_lost_as_a_whole() {
    let (board, far) = board();
    let (guest, mut queues) = start(board.virtio(5, true));
    // Seven events and the end do not fit after these two.
    far.write(KEY).unwrap();
    far.write(END).unwrap();
    for _ in 0..2 {
        queues[0].wait_used();
    }
    (0..7).for_each(|_| far.write(KEY).unwrap());
    far.write(END).unwrap();
    for _ in 0..6 {
        queues[0].wait_used();
    }
    let values: Vec<_> = (2..8).map(|slot| board.ram.read_u64(DATA + slot * 8).unwrap()).collect();
    assert_eq!(values, [0; 6], "nothing of it");
    drop(guest);
}

#[test]
fn the_driver_asks_what_it_is() {
    let (board, _far) = board();
    let guest = board.guest(5, 0);
    let bar = guest.bar(0);
    let ask = |select: u8, subselect: u8| -> Vec<u8> {
        guest.write(bar, 20, Byte, select.into());
        guest.write(bar, 21, Byte, subselect.into());
        let size = guest.read(bar, 22, Byte);
        (0..size).map(|at| guest.read(bar, 28 + at, Byte) as u8).collect()
    };
    assert_eq!(ask(1, 0), b"keyboard");
    assert_eq!(ask(2, 0), b"1");
    assert_eq!(ask(3, 0), [3, 0, 0x34, 0x12, 0x78, 0x56, 1, 0]);
    assert_eq!(ask(0x10, 0), b"");
    assert_eq!(ask(0x11, 1), [0, 0, 0, 0x40], "without the zeroes at the end");
    assert_eq!(ask(0x11, 2), b"");
    assert_eq!(ask(0x12, 0), [0u32, 100, 1, 2, 3].map(u32::to_le_bytes).concat());
    assert_eq!(ask(0x12, 9), b"");
    assert_eq!(ask(9, 9), b"");
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let kind = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let (guest, mut queues) = start(kind(subject.function(), subject.ram.clone()));
        queues[1].push(&[Buffer::readable(DATA, 8)]);
        guest.notify(1);
        queues[1].wait_used();
    }
}

#[test]
fn conforms() {
    let far = std::cell::RefCell::new(Vec::new());
    let make = || {
        let (board, end) = board();
        far.borrow_mut().push(end);
        board.subject(5)
    };
    conformance::check(make, work(false));
    conformance::check(make, work(true));
}

#[test]
fn fuzz() {
    let far = std::cell::RefCell::new(Vec::new());
    let make = || {
        let (board, end) = board();
        far.borrow_mut().push(end);
        board.subject(5)
    };
    let request = |random: &mut Random, _: u16| (0..random.below(20)).map(|_| random.bits() as u8).collect();
    Hostile { make, work: work(true), request }.check();
}

#[test]
fn hostile_drivers_and_devices_do_no_harm() {
    let (board, far) = board();
    let mut random = Random::new(11);
    for _ in 0..10 {
        let (mut guest, mut queues) = start(board.virtio(5, true));
        for _ in 0..10_000 {
            match random.below(3) {
                0 => {
                    // A full stream loses some, as a device would.
                    let _ = far.write(InputEvent {
                        kind: random.below(4) as u16,
                        code: random.below(3) as u16,
                        value: random.bits() as u32,
                    });
                }
                1 => {
                    queues[1].push(&[Buffer::readable(DATA + random.below(100), random.below(20) as u32 + 1)]);
                    guest.notify(1);
                    queues[1].wait_used();
                    let _ = far.read();
                }
                _ => {
                    if let Some((_, len)) = queues[0].take_used() {
                        assert!(len <= 8);
                        queues[0].push(&[Buffer::writable(DATA + random.below(8) * 8, random.below(9) as u32 + 1)]);
                    }
                }
            }
        }
        guest.reset();
    }
    let start_time = std::time::Instant::now();
    let (_guest, mut queues) = start(board.virtio(5, true));
    // What is left of the stream comes first.
    let _ = far.write(KEY);
    while far.write(END).is_err() || queues[0].take_used().is_none() {
        assert!(start_time.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}
