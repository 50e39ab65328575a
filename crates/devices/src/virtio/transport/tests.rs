//! The registers of both interfaces, interrupts, and reset, by way of a disk (whose requests for identification touch
//! no file) and of an entropy source.

use std::fs::File;
use std::sync::Arc;

use platform::AccessSize::{Byte, Dword, Qword, Word};
use platform::{MsiMessage, Persist};
use testkit::virtqueue::{Buffer, EVENT_IDX, GuestQueue, INDIRECT, VERSION_1, VirtioGuest};

use super::*;
use crate::pci::PciAddress;
use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const DATA: u64 = 0x40000;

struct Bench {
    board: TestBoard,
    _dir: tempfile::TempDir,
}

fn bench(more: &[(&str, &str)]) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let path = path.to_str().unwrap();
    let keys = [
        ("pci.0.3.0.device", "virtio-blk"),
        ("pci.0.3.0.path", path),
        ("pci.0.3.0.ser", "abc"),
        ("pci.0.4.0.device", "virtio-rnd"),
    ];
    Bench { board: TestBoard::new(&[&keys, more].concat()), _dir: dir }
}

impl Bench {
    fn disk(&self, modern: bool) -> VirtioGuest {
        self.board.virtio(3, modern)
    }

    fn function(&self) -> Arc<PciFunction> {
        self.board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap()
    }

    /// Waits until the device does nothing.
    fn settle(&self) {
        self.function().save().unwrap();
    }

    /// A disk with queue 0 open and the driver ready.
    fn ready(&self, modern: bool, features: u64) -> (VirtioGuest, GuestQueue) {
        let mut guest = self.disk(modern);
        guest.negotiate(features);
        let queue = guest.open_queue(0, RINGS);
        guest.driver_ok();
        (guest, queue)
    }
}

/// A request for the identification string.
fn identify(queue: &mut GuestQueue, ram: &memory::GuestMemory) {
    ram.write(DATA, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    queue.push(&[Buffer::readable(DATA, 16), Buffer::writable(DATA + 0x100, 20), Buffer::writable(DATA + 0x200, 1)]);
}

/// Makes a request, and waits for its answer.
fn request(b: &Bench, guest: &VirtioGuest, queue: &mut GuestQueue) {
    identify(queue, &b.board.ram);
    guest.notify(0);
    assert_eq!(queue.wait_used().1, 21);
    let mut id = [0; 4];
    b.board.ram.read(DATA + 0x100, &mut id).unwrap();
    assert_eq!(&id, b"abc\0");
}

#[test]
fn identity_and_layout() {
    let b = bench(&[]);
    let disk = b.board.guest(3, 0);
    assert_eq!(disk.config32(0), 0x1001_1af4);
    assert_eq!(disk.config32(8), 0x0100_0000);
    assert_eq!(disk.config32(0x2c), 0x0002_1af4);
    assert_eq!(disk.config(0x3d, Byte), 1);
    assert!(disk.bar(0).io && !disk.bar(1).io && !disk.bar(2).io);
    assert_eq!(disk.capabilities(0x11), [0x40], "MSI-X first");
    assert_eq!(disk.config32(0x44), 1, "table in BAR 1");
    assert_eq!(disk.config32(0x48), 0x1001, "pending bits a page behind");
    assert_eq!(disk.config(0x42, Word), 1, "two vectors");
    assert_eq!(disk.capabilities(5).len(), 1);
    assert_eq!(disk.capabilities(9).len(), 5);
    disk.set_config(0x10, Dword, u32::MAX);
    assert_eq!(disk.config32(0x10), 0xff81, "24 bytes of registers and 60 of configuration take 128 ports");
    let rnd = b.board.guest(4, 0);
    assert_eq!((rnd.config32(0), rnd.config32(0x2c)), (0x1005_1af4, 0x0004_1af4));
    assert_eq!(rnd.config32(8), 0x1000_0000);
    assert_eq!(rnd.capabilities(9).len(), 4, "no device configuration");
}

#[test]
fn keys_hide_msix_and_the_modern_interface() {
    let b = bench(&[("virtio_msix", "false"), ("virtio.modern", "false")]);
    let disk = b.board.guest(3, 0);
    assert!(disk.capabilities(0x11).is_empty() && disk.capabilities(9).is_empty());
    assert_eq!(disk.capabilities(5), [0x40]);
    assert_eq!((disk.config32(0x14), disk.config32(0x18)), (0, 0), "no BAR 1 and 2");
    let (guest, mut queue) = b.ready(false, u64::MAX);
    request(&b, &guest, &mut queue);
}

#[test]
fn features_of_both_interfaces() {
    let b = bench(&[("cpus", "2")]);
    let (legacy, modern) = (b.disk(false).offered(), b.disk(true).offered());
    assert_eq!(legacy >> 32, 0);
    assert_eq!(modern & (VERSION_1 | feature::RING_RESET), VERSION_1 | feature::RING_RESET);
    assert_eq!(legacy & modern & (INDIRECT | EVENT_IDX), INDIRECT | EVENT_IDX);
    assert_eq!(legacy & feature::NOTIFY_ON_EMPTY, feature::NOTIFY_ON_EMPTY);
    assert_eq!(modern & (feature::NOTIFY_ON_EMPTY | feature::ANY_LAYOUT), 0, "legacy only");
    assert_eq!((legacy & 1 << 12, modern & 1 << 12), (0, 1 << 12), "several queues are for the modern interface");
    assert_eq!(b.disk(true).queue_count(), 2);
}

#[test]
fn a_driver_that_takes_too_much_is_not_accepted() {
    let b = bench(&[]);
    let mut guest = b.disk(true);
    for features in [VERSION_1 | 1 << 50, INDIRECT, 0] {
        guest.reset();
        guest.set_status(3);
        guest.write_features(features);
        guest.set_status(3 | 8);
        assert_eq!(guest.status(), 3, "{features:#x}");
    }
    guest.negotiate(INDIRECT);
    assert_eq!(guest.status(), 3 | 8);
    guest.write_features(0);
    assert_eq!(b.function().save().unwrap(), {
        guest.write_features(VERSION_1);
        b.function().save().unwrap()
    });
}

#[test]
fn both_interfaces_carry_requests() {
    let b = bench(&[]);
    for modern in [false, true, false] {
        for features in [0, !(1 << 40), INDIRECT, EVENT_IDX] {
            let (guest, mut queue) = b.ready(modern, features & b.disk(modern).offered());
            for _ in 0..300 {
                request(&b, &guest, &mut queue);
            }
        }
    }
}

#[test]
fn a_modern_device_waits_for_driver_ok_a_legacy_one_does_not() {
    let b = bench(&[]);
    let mut guest = b.disk(true);
    guest.negotiate(0);
    let mut queue = guest.open_queue(0, RINGS);
    identify(&mut queue, &b.board.ram);
    guest.notify(0);
    b.settle();
    assert_eq!(queue.used_index(), 0);
    guest.driver_ok();
    queue.wait_used();

    let mut guest = b.disk(false);
    guest.negotiate(0);
    let mut queue = guest.open_queue(0, RINGS);
    request(&b, &guest, &mut queue);
}

#[test]
fn legacy_registers() {
    let b = bench(&[]);
    let mut guest = b.disk(false);
    guest.negotiate(0);
    let (function, bar) = (b.board.guest(3, 0), b.board.guest(3, 0).bar(0));
    let read = |offset, size| function.read(bar, offset, size);
    assert_eq!(read(12, Word), 128);
    let queue = guest.open_queue(0, RINGS);
    assert_eq!(read(8, Dword), RINGS >> 12);
    assert_eq!(queue.used, RINGS + 0x1000, "the used ring is on a page of its own");
    function.write(bar, 14, Word, 5);
    assert_eq!((read(14, Word), read(12, Word), read(8, Dword)), (5, 0, 0), "no queue 5");
    function.write(bar, 14, Word, 0);
    assert_eq!((read(8, Byte), read(9, Byte)), (RINGS >> 12, 0), "parts of a register can be read");
    function.write(bar, 8, Byte, 0);
    assert_eq!(read(8, Dword), RINGS >> 12, "but not written");
    assert_eq!((read(12, Dword), read(17, Word)), (0xffff_ffff, 0xffff), "two registers at once");
    assert_eq!((read(20, Qword), guest.device_config(0, Qword, false)), (2048, 2048), "capacity");
    function.enable_msix(0);
    assert_eq!(read(20, Word), 0xffff, "a vector register now");
    assert_eq!(guest.device_config(0, Qword, true), 2048);
    assert_eq!((guest.set_queue_vector(0, 1), guest.set_queue_vector(0, 2)), (1, 0xffff));
    assert_eq!((guest.set_config_vector(0), guest.set_config_vector(0xffff)), (0, 0xffff));
    function.write(bar, 8, Dword, 0);
    assert_eq!(read(8, Dword), 0, "page 0 closes the queue");
    assert_eq!(guest.status(), 3);
    guest.reset();
    assert_eq!(guest.status(), 0);
}

#[test]
fn modern_registers() {
    let b = bench(&[]);
    let mut guest = b.disk(true);
    guest.negotiate(0);
    let (function, bar) = (b.board.guest(3, 0), b.board.guest(3, 0).bar(2));
    let read = |offset, size| function.read(bar, offset, size);
    let write = |offset, size, value| function.write(bar, offset, size, value);
    write(22, Word, 0);
    for bad in [0, 3, 129, 256] {
        write(24, Word, bad);
        assert_eq!(read(24, Word), 128, "size {bad}");
    }
    write(24, Word, 64);
    write(32, Qword, 0x1_2345_6780);
    assert_eq!((read(24, Word), read(32, Dword), read(36, Dword)), (64, 0x2345_6780, 1));
    assert_eq!(read(32, Qword), 0x1_2345_6780);
    write(28, Word, 1);
    write(32, Dword, 0);
    write(24, Word, 32);
    write(28, Word, 0);
    assert_eq!((read(32, Dword), read(24, Word), read(28, Word)), (0x2345_6780, 64, 1), "fixed while enabled");
    write(22, Word, 9);
    assert_eq!((read(24, Word), read(28, Word), read(30, Word)), (0, 0, 0), "no queue 9");
    write(28, Word, 1);
    write(0, Dword, 2);
    assert_eq!(read(4, Dword), 0, "features end with bit 63");
    assert_eq!(guest.set_queue_vector(0, 7), 0xffff);
    assert_eq!(read(0x2000, Qword), 2048, "device configuration");
    assert_eq!((read(60, Dword), read(0x3ffc, Dword), read(0x203c, Dword)), (0, 0, 0));
    guest.reset();
    assert!(!guest.queue_enabled(0));
}

#[test]
fn one_queue_can_be_reset() {
    let b = bench(&[("cpus", "2")]);
    let mut guest = b.disk(true);
    guest.negotiate(feature::RING_RESET);
    let mut first = guest.open_queue(0, RINGS);
    guest.open_queue(1, RINGS + 0x4000);
    guest.driver_ok();
    request(&b, &guest, &mut first);
    guest.reset_queue(0);
    assert!(!guest.queue_enabled(0) && guest.queue_enabled(1));
    let mut first = guest.open_queue(0, RINGS + 0x8000);
    request(&b, &guest, &mut first);
}

#[test]
fn the_pin_is_asserted_until_the_status_is_read() {
    for modern in [false, true] {
        let b = bench(&[]);
        let (guest, mut queue) = b.ready(modern, 0);
        request(&b, &guest, &mut queue);
        b.settle();
        assert!(b.board.ioapic.level(16));
        assert_eq!(guest.isr(), 1);
        assert!(!b.board.ioapic.any());
        assert_eq!(guest.isr(), 0);
        queue.set_available_flags(1);
        request(&b, &guest, &mut queue);
        b.settle();
        assert!(!b.board.ioapic.any(), "suppressed");
        queue.set_available_flags(0);
        request(&b, &guest, &mut queue);
        b.settle();
        guest.function().set_command(0x407);
        assert!(!b.board.ioapic.any());
    }
}

#[test]
fn msix_vectors_are_the_drivers_choice() {
    let b = bench(&[]);
    let (guest, mut queue) = b.ready(true, 0);
    guest.function().enable_msix(0x50);
    request(&b, &guest, &mut queue);
    b.settle();
    assert!(b.board.msi.take().is_empty(), "no vector chosen");
    assert_eq!(guest.set_queue_vector(0, 1), 1);
    request(&b, &guest, &mut queue);
    assert_eq!(b.board.msi.wait(), [MsiMessage { address: 0xfee0_0000, data: 0x51 }]);
    assert_eq!((guest.isr(), b.board.ioapic.any()), (0, false));
}

#[test]
fn a_single_msi_serves_drivers_without_msix() {
    let b = bench(&[("virtio_msix", "false")]);
    let (guest, mut queue) = b.ready(false, 0);
    let function = guest.function();
    let at = function.capabilities(5)[0];
    function.set_config(at + 4, Dword, 0xfee0_2000);
    function.set_config(at + 12, Word, 0x61);
    function.set_config(at + 2, Word, 1);
    request(&b, &guest, &mut queue);
    assert_eq!(b.board.msi.wait(), [MsiMessage { address: 0xfee0_2000, data: 0x61 }]);
    b.settle();
    assert!(!b.board.ioapic.any());
    assert_eq!(guest.isr(), 1);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_works_after_it() {
    let b = bench(&[]);
    let (mut guest, mut queue) = b.ready(true, 0);
    guest.function().enable_msix(0x50);
    guest.set_config_vector(0);
    queue.set_available_index(500);
    guest.notify(0);
    assert_eq!(b.board.msi.wait(), [MsiMessage { address: 0xfee0_0000, data: 0x50 }]);
    assert_eq!(guest.status() & 0x40, 0x40);
    guest.set_status(0xf);
    assert_eq!(guest.status() & 0x40, 0x40, "only a reset helps");
    guest.reset();
    assert_eq!(guest.status(), 0);
    let (guest, mut queue) = b.ready(true, 0);
    request(&b, &guest, &mut queue);

    let (guest, mut queue) = b.ready(false, 0);
    queue.set_available_index(500);
    guest.notify(0);
    b.settle();
    assert_eq!(guest.status(), 7, "a legacy driver does not know the bit");
}

#[test]
fn configuration_space_reaches_the_registers() {
    let b = bench(&[]);
    let function = b.board.guest(3, 0);
    let at = *function.capabilities(9).last().unwrap();
    assert_eq!(function.config(at + 3, Byte), 5);
    let access = |bar: u32, offset: u32, length: u32| {
        function.set_config(at + 4, Byte, bar);
        function.set_config(at + 8, Dword, offset);
        function.set_config(at + 12, Dword, length);
    };
    access(2, 0x2000, 4);
    assert_eq!(function.config32(at + 16), 2048);
    access(2, 20, 1);
    function.set_config(at + 16, Dword, 1);
    assert_eq!(b.disk(true).status(), 1);
    access(0, 18, 1);
    assert_eq!(function.config32(at + 16), 1, "the legacy registers too");
    for (bar, offset, length) in
        [(2, 0x4000, 4), (2, 2, 4), (2, u32::MAX - 3, 4), (1, 0, 4), (7, 0, 4), (2, 0, 3), (2, 0, 8)]
    {
        access(bar, offset, length);
        assert_eq!(function.config32(at + 16), 0, "BAR {bar} offset {offset:#x} length {length}");
        function.set_config(at + 16, Dword, u32::MAX);
    }
    assert_eq!(b.disk(true).status(), 1);
}

#[test]
fn restored_devices_go_on() {
    let b = bench(&[]);
    let (guest, mut queue) = b.ready(true, EVENT_IDX);
    request(&b, &guest, &mut queue);
    b.settle();
    // Announced, but the doorbell is lost with the old machine.
    identify(&mut queue, &b.board.ram);
    let saved = b.function().save().unwrap();

    let path = b._dir.path().join("disk.img");
    let other = TestBoard::new(&[
        ("pci.0.3.0.device", "virtio-blk"),
        ("pci.0.3.0.path", path.to_str().unwrap()),
        ("pci.0.3.0.ser", "abc"),
        ("pci.0.3.0.lock", "off"),
    ]);
    let mut ram = vec![0; crate::testboard::RAM as usize];
    b.board.ram.read(0, &mut ram).unwrap();
    other.ram.write(0, &ram).unwrap();
    let function = other.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    function.restore(function.version(), &saved).unwrap();
    assert_eq!(function.save().unwrap(), saved, "nothing moves before the machine does");
    assert!(other.ioapic.take().is_empty());
    other.pci.resume();
    other.ioapic.level(16);
    function.save().unwrap();
    let used = other.ram.read_u16(queue.used + 2).unwrap();
    assert_eq!(used, 2, "the waiting request was served");
    assert_eq!(other.virtio(3, true).isr(), 1);
}
