//! The device with a virtiofsd that the test plays: it takes the queues, and lets the requests lie.

use testkit::conformance::Subject;
use testkit::hostile::Hostile;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, VirtioGuest};

use super::*;
use crate::testboard::TestBoard;
use crate::virtio::vhost::testing::{BackEnd, ENABLE, GET_BASE, wait_until};

const RINGS: u64 = 0x10000;
const DATA: u64 = 0x40000;

fn board(daemon: &BackEnd) -> TestBoard {
    TestBoard::new(&[
        ("pci.0.5.0.device", "virtio-fs"),
        ("pci.0.5.0.tag", "share"),
        ("pci.0.5.0.socket", &daemon.path().display().to_string()),
        ("pci.0.5.0.queues", "2"),
    ])
}

/// Brings the device into use; its queues are the other side's when this returns.
fn work(guest: VirtioGuest, daemon: &BackEnd) {
    let mut guest = guest;
    let before = daemon.asked(ENABLE).len();
    guest.negotiate(!feature::EVENT_IDX);
    let mut queue = guest.open_queue(1, RINGS);
    guest.driver_ok();
    queue.push(&[Buffer::readable(DATA, 40), Buffer::writable(DATA + 0x1000, 80)]);
    guest.notify(1);
    wait_until(|| daemon.asked(ENABLE).len() > before);
}

#[test]
fn the_tag_and_the_queues_are_told() {
    let daemon = BackEnd::start(!0);
    let board = board(&daemon);
    let guest = board.virtio(5, true);
    let tag: Vec<_> = (0..40).map(|at| guest.device_config(at, platform::AccessSize::Byte, false) as u8).collect();
    assert_eq!(tag, [&b"share"[..], &[0; 31], &[2, 0, 0, 0]].concat());
    work(guest, &daemon);
    let state = board.pci.function(crate::pci::PciAddress::new(0, 5, 0).unwrap()).unwrap();
    assert!(state.save().is_err(), "the state is in the daemon");
    state.reset();
    assert_eq!(daemon.asked(GET_BASE).iter().map(|[queue, _]| *queue).collect::<Vec<_>>(), [1]);
    assert!(state.save().is_ok());
}

fn request(random: &mut Random, _: u16) -> Vec<u8> {
    // The header of a FUSE request: its length, opcode and other words.
    let len = 40 + random.below(200) as u32;
    let mut bytes = vec![0; len as usize];
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&(random.below(50) as u32).to_le_bytes());
    bytes
}

#[test]
fn fuzz() {
    let daemon = std::sync::Mutex::new(Arc::new(BackEnd::start(!0)));
    let make = || {
        let fresh = Arc::new(BackEnd::start(!0));
        *daemon.lock().unwrap() = fresh.clone();
        board(&fresh).subject(5).keeping(fresh)
    };
    let work = |subject: &Subject| {
        subject.function().set_command(7);
        let daemon = daemon.lock().unwrap().clone();
        work(VirtioGuest::modern(subject.function(), subject.ram.clone()), &daemon);
    };
    Hostile { make, work, request }.check_unserved();
}
