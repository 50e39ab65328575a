//! The NIC with a switch that the test plays: it knows the protocol, and lets the packets lie.

use platform::AccessSize::Byte;
use testkit::conformance::Subject;
use testkit::hostile::Hostile;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use super::*;
use crate::testboard::TestBoard;
use crate::virtio::vhost::testing::{BackEnd, ENABLE, GET_BASE, SET_BASE, wait_until};

const RINGS: u64 = 0x10000;
const COMMAND: u64 = 0x40000;

fn board(switch: &BackEnd, queues: &str) -> Result<TestBoard, DeviceError> {
    let backend = format!("vhost-user:{}", switch.path().display());
    let keys = [("device", "virtio-net"), ("backend", &backend), ("queues", queues), ("mac", "2:0:0:0:0:1")];
    let keys = keys.map(|(key, value)| (format!("pci.0.5.0.{key}"), value));
    TestBoard::try_new(&keys.each_ref().map(|(key, value)| (key.as_str(), *value)))
}

/// A driver with two pairs of queues.
fn start(mut guest: VirtioGuest) -> (VirtioGuest, Vec<GuestQueue>) {
    guest.negotiate(!feature::EVENT_IDX);
    let queues = (0..5).map(|n| guest.open_queue(n, RINGS + 0x8000 * u64::from(n))).collect();
    guest.driver_ok();
    (guest, queues)
}

#[test]
fn the_switch_gets_the_queues_and_the_pairs_in_use() {
    let switch = BackEnd::start(!bit::GUEST_UFO);
    let board = board(&switch, "2").unwrap();
    let guest = board.virtio(5, true);
    let offered = guest.offered();
    assert_eq!(
        offered & (bit::MAC | bit::STATUS | bit::MQ | bit::CTRL_VQ),
        bit::MAC | bit::STATUS | bit::MQ | bit::CTRL_VQ
    );
    assert_eq!(
        offered & (bit::HOST_UFO | bit::GUEST_UFO | bit::CTRL_RX),
        bit::HOST_UFO,
        "what the switch can, and no more"
    );
    assert!(switch.asked(ENABLE).is_empty(), "the driver is not ready");
    let (guest, mut queues) = start(guest);
    assert_eq!(guest.device_config(6, Byte, false), 1, "the link");
    guest.notify(0);
    wait_until(|| switch.asked(ENABLE).len() == 4);
    assert_eq!(switch.asked(ENABLE), [[0, 1], [1, 1], [2, 0], [3, 0]]);
    for (command, answer) in [([4, 0, 2, 0], 0), ([4, 0, 3, 0], 1), ([4, 0, 0, 0], 1), ([0, 0, 1, 0], 1)] {
        board.ram.write(COMMAND, &command).unwrap();
        board.ram.write_u8(COMMAND + 8, 9).unwrap();
        queues[4].push(&[Buffer::readable(COMMAND, 4), Buffer::writable(COMMAND + 8, 1)]);
        guest.notify(4);
        queues[4].wait_used();
        assert_eq!(board.ram.read_u8(COMMAND + 8).unwrap(), answer, "{command:?}");
    }
    assert_eq!(switch.asked(ENABLE)[4..], [[2, 1], [3, 1]]);
    drop(guest);
    board.virtio(5, true).reset();
    assert_eq!(switch.asked(GET_BASE).iter().map(|[queue, _]| *queue).collect::<Vec<_>>(), [0, 1, 2, 3]);
    // Once more, with one pair again.
    let (guest, _queues) = start(board.virtio(5, true));
    guest.notify(1);
    wait_until(|| switch.asked(ENABLE).len() == 10);
    assert_eq!(switch.asked(ENABLE)[6..], [[0, 1], [1, 1], [2, 0], [3, 0]]);
    // Without the switch there is no link.
    switch.hang_up();
    wait_until(|| guest.device_config(6, Byte, false) == 0);
}

#[test]
fn a_switch_that_comes_back_goes_on_where_the_other_was() {
    let switch = BackEnd::start(!bit::GUEST_UFO);
    let board = board(&switch, "2").unwrap();
    let (guest, queues) = start(board.virtio(5, true));
    let bases = || switch.asked(SET_BASE);
    guest.notify(0);
    wait_until(|| switch.asked(ENABLE).len() == 4);
    assert_eq!(bases(), [[0, 0], [1, 0], [2, 0], [3, 0]]);
    // What it gave back before it went.
    board.ram.write_u16(queues[1].used + 2, 7).unwrap();
    switch.hang_up();
    wait_until(|| guest.device_config(6, Byte, false) == 0);
    switch.start_again();
    wait_until(|| guest.device_config(6, Byte, false) == 1);
    assert_eq!(bases()[4..], [[0, 0], [1, 7], [2, 0], [3, 0]]);
    assert_eq!(switch.asked(ENABLE)[4..], [[0, 1], [1, 1], [2, 0], [3, 0]]);
    // While it is away the driver may begin.
    switch.hang_up();
    wait_until(|| guest.device_config(6, Byte, false) == 0);
    drop(guest);
    board.virtio(5, true).reset();
    let (guest, _queues) = start(board.virtio(5, true));
    guest.notify(0);
    switch.start_again();
    wait_until(|| switch.asked(ENABLE).len() == 12);
    wait_until(|| guest.device_config(6, Byte, false) == 1);
}

#[test]
fn a_switch_with_fewer_queues_is_told() {
    let error = board(&BackEnd::start(!bit::GUEST_UFO), "3").err().unwrap().line();
    assert!(error.contains("serves no more than 2 pairs"), "{error}");
}

fn work(subject: &Subject) {
    subject.function().set_command(7);
    let (guest, mut queues) = start(VirtioGuest::modern(subject.function(), subject.ram.clone()));
    subject.ram.write(COMMAND, &[4, 0, 2, 0]).unwrap();
    queues[4].push(&[Buffer::readable(COMMAND, 4), Buffer::writable(COMMAND + 8, 1)]);
    guest.notify(0);
    guest.notify(4);
    queues[4].wait_used();
}

#[test]
fn fuzz() {
    let make = || {
        let switch = BackEnd::start(!bit::GUEST_UFO);
        board(&switch, "2").unwrap().subject(5).keeping(switch)
    };
    let request = |random: &mut Random, _| match random.below(4) {
        0 => vec![4, 0, random.below(4) as u8, 0],
        1 => random.bits().to_le_bytes().to_vec(),
        _ => vec![0; 12 + random.below(200) as usize],
    };
    Hostile { make, work, request }.check_unserved();
}
