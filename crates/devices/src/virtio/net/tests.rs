//! A NIC as its driver sees it, on a cable whose other end the test holds.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, Weak};

use backend::net::{
    Abilities, Delivery, Frame, MacAddress, NetBackend, NetDevice, Offloads, Packet, PacketHeader, Sending,
};
use config::{Config, NoWarnings};
use memory::GuestMemory;
use platform::AccessSize::{Byte, Dword, Word};
use platform::Persist;
use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::irq::PATIENCE;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, EVENT_IDX, GuestQueue, INDIRECT, VirtioGuest};

use super::*;
use crate::pci::PciAddress;
use crate::testboard::{RAM, TestBoard};
use crate::virtio::feature;

const RX_RINGS: u64 = 0x10000;
const TX_RINGS: u64 = 0x18000;
const CONTROL_RINGS: u64 = 0x20000;
const COMMAND: u64 = 0x22000;
const TX_DATA: u64 = 0x30000;
const RX_DATA: u64 = 0x40000;
const MAC: &str = "02:00:00:00:00:01";

/// A cable. With `echo`, what the guest sends comes back to it.
#[derive(Default)]
struct Cable {
    device: OnceLock<Weak<dyn NetDevice>>,
    sent: Mutex<Vec<(u16, PacketHeader, Vec<u8>)>>,
    busy: AtomicBool,
    echo: AtomicBool,
    resumed: AtomicU32,
    offloads: Mutex<Offloads>,
}

impl Cable {
    fn receive(&self, queue: u16, header: PacketHeader, bytes: &[u8]) -> Delivery {
        let device = self.device.get().unwrap().upgrade().unwrap();
        let (front, back) = bytes.split_at(bytes.len() / 2);
        device.receive(queue, &Packet { header, pieces: &[front, back] })
    }

    fn wait_sent(&self) -> (u16, PacketHeader, Vec<u8>) {
        let start = std::time::Instant::now();
        loop {
            if let Some(sent) = self.sent.lock().unwrap().pop() {
                return sent;
            }
            assert!(start.elapsed() < PATIENCE, "nothing was sent");
            std::thread::yield_now();
        }
    }
}

impl NetBackend for Cable {
    fn abilities(&self) -> Abilities {
        Abilities { send: Offloads::all(), receive: Offloads::all() }
    }

    fn link(&self) -> bool {
        true
    }

    fn attach(&self, device: Weak<dyn NetDevice>) {
        assert!(self.device.set(device).is_ok());
    }

    fn send(&self, queue: u16, frame: &Frame<'_>) -> Sending {
        if self.busy.load(Ordering::SeqCst) {
            return Sending::Busy;
        }
        if self.echo.load(Ordering::SeqCst) {
            let _ = self.receive(queue, frame.header, &frame.to_vec());
        } else {
            self.sent.lock().unwrap().push((queue, frame.header, frame.to_vec()));
        }
        Sending::Taken
    }

    fn resume(&self, queue: u16) {
        self.resumed.fetch_or(1 << queue, Ordering::SeqCst);
    }

    fn set_offloads(&self, offloads: Offloads) {
        *self.offloads.lock().unwrap() = offloads;
    }
}

struct Bench {
    board: TestBoard,
    cable: Arc<Cable>,
}

impl Bench {
    fn new(keys: &[(&str, &str)], queues: u16) -> Self {
        let board = TestBoard::bare();
        let mut config = Config::new(NoWarnings);
        config.set("name", "vm").unwrap();
        config.set("pci.0.3.0.device", "virtio-net").unwrap();
        for (key, value) in keys {
            config.set(&format!("pci.0.3.0.{key}"), *value).unwrap();
        }
        let address = PciAddress::new(0, 3, 0).unwrap();
        let context = BuildContext { address, pci: &board.pci, memory: &board.ram, config: &config, cpus: 1 };
        let mut options =
            NicOptions::from_node(&config, &config.node("pci.0.3.0").unwrap(), address, &["queues"]).unwrap();
        options.queues = queues;
        let cable = Arc::new(Cable::default());
        let backend: Arc<dyn NetBackend> = cable.clone();
        let function =
            transport::build(&context, spec(queues), |virtio| Net::new(virtio, Some(backend), &options)).unwrap();
        board.pci.add(function).unwrap();
        board.pci.finish().unwrap();
        Self { board, cable }
    }

    fn driver(&self, modern: bool, features: u64) -> Driver {
        Driver::start(self.board.virtio(3, modern), self.board.ram.clone(), features)
    }
}

/// A started driver of the first pair of queues and the control queue.
struct Driver {
    guest: VirtioGuest,
    rx: GuestQueue,
    tx: GuestQueue,
    control: GuestQueue,
    ram: GuestMemory,
    features: u64,
}

impl Driver {
    fn start(mut guest: VirtioGuest, ram: GuestMemory, wanted: u64) -> Self {
        let features = guest.negotiate(wanted & !(1 << 40));
        let control = if features & bit::MQ == 0 { 2 } else { guest.queue_count() - 1 };
        let (rx, tx) = (guest.open_queue(0, RX_RINGS), guest.open_queue(1, TX_RINGS));
        let control = guest.open_queue(control, CONTROL_RINGS);
        guest.driver_ok();
        Self { guest, rx, tx, control, ram, features }
    }

    fn header_len(&self) -> u32 {
        if self.features & (feature::VERSION_1 | bit::MRG_RXBUF) != 0 { 12 } else { 10 }
    }

    /// Sends a packet in two buffers, the header in one of them or in two.
    fn send(&mut self, header: PacketHeader, bytes: &[u8]) {
        let len = self.header_len();
        let split = len + 5;
        self.ram.write(TX_DATA, &[0; 12]).unwrap();
        self.ram.write(TX_DATA, &header.encode()).unwrap();
        self.ram.write(TX_DATA + u64::from(len), bytes).unwrap();
        let rest = len + bytes.len() as u32 - split;
        self.tx.push(&[Buffer::readable(TX_DATA, split), Buffer::readable(TX_DATA + u64::from(split), rest)]);
        self.guest.notify(1);
    }

    /// One buffer for received packets.
    fn offer(&mut self, at: u64, len: u32) {
        self.rx.push(&[Buffer::writable(at, len)]);
    }

    fn command(&mut self, class: u8, code: u8, data: &[u8]) -> u8 {
        self.ram.write(COMMAND, &[&[class, code], data].concat()).unwrap();
        self.ram.write_u8(COMMAND + 0xff0, 0xee).unwrap();
        let len = 2 + data.len() as u32;
        self.control.push(&[Buffer::readable(COMMAND, len), Buffer::writable(COMMAND + 0xff0, 1)]);
        self.guest.notify(self.control.index);
        assert_eq!(self.control.wait_used().1, 1);
        self.ram.read_u8(COMMAND + 0xff0).unwrap()
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(address, &mut bytes).unwrap();
        bytes
    }
}

/// A packet of `len` bytes for address 02:00:00:00:00:`to`.
fn packet(to: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, 99, 8, 0];
    bytes.extend((bytes.len()..len).map(|at| at as u8));
    bytes
}

#[test]
fn identity_and_configuration() {
    let b = Bench::new(&[("mac", MAC), ("mtu", "9000")], 2);
    let function = b.board.guest(3, 0);
    assert_eq!((function.config32(0), function.config32(0x2c)), (0x1000_1af4, 0x0001_1af4));
    assert_eq!(function.config32(8) >> 8, 0x02_0000);
    for modern in [false, true] {
        let driver = b.driver(modern, u64::MAX);
        let read = |offset, size| driver.guest.device_config(offset, size, false);
        assert_eq!((read(0, Dword), read(4, Word), read(6, Word)), (2, 0x0100, 1));
        assert_eq!(
            (read(8, Word), read(10, Word), driver.rx.size, driver.control.size),
            (2, 9000, 1024, if modern { 64 } else { 1024 })
        );
        let always = bit::MAC | bit::STATUS | bit::MRG_RXBUF | bit::MTU | bit::CTRL_VQ;
        assert_eq!(driver.features & always, always);
        assert_eq!(driver.features & bit::MQ != 0, modern);
    }
    let b = Bench::new(&[], 1);
    let driver = b.driver(true, u64::MAX);
    assert_eq!(driver.features & (bit::MQ | bit::MTU), 0);
    let mac = MacAddress::generate(3, 0, "vm").0;
    assert_eq!([0, 1, 2, 3, 4, 5].map(|at| driver.guest.device_config(at, Byte, false) as u8), mac);
}

#[test]
fn a_nic_without_a_network_has_no_link_and_swallows_packets() {
    let board = TestBoard::new(&[("pci.0.3.0.device", "virtio-net")]);
    let mut driver = Driver::start(board.virtio(3, true), board.ram.clone(), u64::MAX);
    assert_eq!(driver.guest.device_config(6, Word, false), 0);
    let possible = bit::CSUM | bit::GUEST_CSUM | bit::HOST_TSO4 | bit::GUEST_TSO4;
    assert_eq!(driver.features & possible, 0, "there is nobody to leave work to");
    driver.send(PacketHeader::default(), &packet(1, 60));
    driver.tx.wait_used();
}

#[test]
fn packets_are_sent() {
    let b = Bench::new(&[], 1);
    for (modern, features) in [(false, 0), (false, u64::MAX), (true, 0), (true, !(1 << 40))] {
        let mut driver = b.driver(modern, features);
        for len in [14, 60, 1514, 9000, 20000] {
            driver.send(PacketHeader::default(), &packet(9, len));
            assert_eq!(driver.tx.wait_used().1, 0);
            assert_eq!(b.cable.wait_sent(), (0, PacketHeader::default(), packet(9, len)));
        }
    }
}

#[test]
fn work_is_left_to_us_only_as_negotiated() {
    let b = Bench::new(&[], 1);
    let gso = PacketHeader {
        flags: PacketHeader::NEEDS_CHECKSUM,
        gso_type: PacketHeader::GSO_TCP4,
        header_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    };
    let checksum = PacketHeader { gso_type: 0, ..gso };
    let six = PacketHeader { gso_type: PacketHeader::GSO_TCP6 | PacketHeader::GSO_ECN, ..gso };
    let udp = PacketHeader { gso_type: PacketHeader::GSO_UDP, ..gso };
    let both = bit::CSUM | bit::HOST_TSO4;
    for (features, sent) in
        [(u64::MAX, &[gso, checksum, six][..]), (both, &[gso, checksum]), (bit::CSUM, &[checksum]), (0, &[])]
    {
        let mut driver = b.driver(true, features);
        for header in [gso, checksum, six, udp] {
            driver.send(header, &packet(9, 5000));
            driver.tx.wait_used();
        }
        let got = std::mem::take(&mut *b.cable.sent.lock().unwrap());
        assert_eq!(got.iter().map(|(_, header, _)| *header).collect::<Vec<_>>(), sent, "features {features:#x}");
    }
}

#[test]
fn packets_that_are_none_go_nowhere() {
    let b = Bench::new(&[], 1);
    let mut driver = b.driver(true, 0);
    for buffers in
        [&[Buffer::readable(TX_DATA, 25)][..], &[Buffer::readable(TX_DATA, 9)], &[Buffer::writable(TX_DATA, 99)]]
    {
        driver.tx.push(buffers);
    }
    driver.tx.push(&[Buffer::readable(0x30000, 0x10000), Buffer::readable(0x30000, 0x1000)]);
    driver.guest.notify(1);
    for _ in 0..4 {
        driver.tx.wait_used();
    }
    assert!(b.cable.sent.lock().unwrap().is_empty());
}

#[test]
fn a_busy_back_end_gets_packets_when_it_is_ready() {
    let b = Bench::new(&[], 1);
    let function = b.board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    let mut driver = b.driver(true, 0);
    b.cable.busy.store(true, Ordering::SeqCst);
    driver.send(PacketHeader::default(), &packet(9, 100));
    function.save().unwrap();
    assert_eq!(driver.tx.used_index(), 0);
    b.cable.busy.store(false, Ordering::SeqCst);
    b.cable.device.get().unwrap().upgrade().unwrap().send_ready(0);
    driver.tx.wait_used();
    assert_eq!(b.cable.wait_sent().2, packet(9, 100));

    // A reset does not wait for it.
    b.cable.busy.store(true, Ordering::SeqCst);
    driver.send(PacketHeader::default(), &packet(9, 100));
    driver.guest.reset();
    b.cable.busy.store(false, Ordering::SeqCst);
    let mut driver = b.driver(true, 0);
    driver.send(PacketHeader::default(), &packet(9, 101));
    driver.tx.wait_used();
    assert_eq!(b.cable.wait_sent().2, packet(9, 101));
}

#[test]
fn packets_are_received_into_as_many_buffers_as_it_takes() {
    let b = Bench::new(&[], 1);
    let header =
        PacketHeader { flags: 1, gso_type: 1, header_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
    for modern in [false, true] {
        let mut driver = b.driver(modern, u64::MAX);
        for n in 0..4 {
            driver.offer(RX_DATA + n * 0x1000, 1000);
        }
        let bytes = packet(1, 2500);
        assert_eq!(b.cable.receive(0, header, &bytes), Delivery::Done);
        let lens: Vec<_> = (0..3).map(|_| driver.rx.wait_used().1).collect();
        assert_eq!(lens, [1000, 1000, 512]);
        assert_eq!(driver.bytes(RX_DATA, 10), header.encode());
        assert_eq!(driver.bytes(RX_DATA + 10, 2), [3, 0], "three buffers");
        let got = [
            driver.bytes(RX_DATA + 12, 988),
            driver.bytes(RX_DATA + 0x1000, 1000),
            driver.bytes(RX_DATA + 0x2000, 512),
        ];
        assert!(got.concat() == bytes);
        assert_eq!(b.cable.receive(0, header, &packet(1, 60)), Delivery::Done);
        assert_eq!(driver.rx.wait_used().1, 72);
    }
}

#[test]
fn without_mergeable_buffers_a_packet_takes_one_or_is_lost() {
    let b = Bench::new(&[], 1);
    for modern in [false, true] {
        let mut driver = b.driver(modern, 0);
        driver.offer(RX_DATA, 1600);
        assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 1700)), Delivery::Done, "lost");
        assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 1514)), Delivery::Done);
        let len = driver.header_len();
        assert_eq!(driver.rx.wait_used().1, len + 1514);
        assert!(driver.bytes(RX_DATA + u64::from(len), 1514) == packet(1, 1514));
    }
}

#[test]
fn a_packet_waits_for_room() {
    let b = Bench::new(&[], 1);
    for features in [bit::MRG_RXBUF, bit::MRG_RXBUF | EVENT_IDX] {
        let mut driver = b.driver(true, features);
        driver.offer(RX_DATA, 1000);
        driver.guest.notify(0);
        assert_eq!(b.cable.resumed.swap(0, Ordering::SeqCst), 1);
        if features & EVENT_IDX == 0 {
            assert_eq!(driver.rx.used_flags(), 1, "no doorbells for buffers that nobody waits for");
        }
        assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 1500)), Delivery::NoRoom);
        if features & EVENT_IDX == 0 {
            assert_eq!(driver.rx.used_flags(), 0);
        } else {
            assert_eq!(driver.rx.available_event(), 1, "the buffer after the one that is there");
        }
        driver.offer(RX_DATA + 0x1000, 1000);
        driver.guest.notify(0);
        assert_eq!(b.cable.resumed.swap(0, Ordering::SeqCst), 1);
        assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 1500)), Delivery::Done);
        assert_eq!((driver.rx.wait_used().1, driver.rx.wait_used().1), (1000, 512));
    }
}

#[test]
fn a_packet_that_can_never_fit_is_lost() {
    let b = Bench::new(&[], 1);
    let mut driver = b.driver(true, u64::MAX);
    for n in 0..1024 {
        driver.offer(RX_DATA + n * 16, 16);
    }
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 30000)), Delivery::Done);
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 20)), Delivery::Done);
    assert_eq!((driver.rx.wait_used().1, driver.rx.wait_used().1), (16, 16));
    let mut driver = b.driver(true, u64::MAX);
    driver.offer(RX_DATA, 11);
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
    assert_eq!(driver.rx.wait_used().1, 0, "a buffer without room for the header is given back");
}

#[test]
fn nothing_is_received_before_the_driver_is_ready() {
    let b = Bench::new(&[], 1);
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
    let mut driver = b.driver(true, 0);
    driver.guest.reset();
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
}

#[test]
fn the_control_queue_sets_filters() {
    let b = Bench::new(&[("mac", MAC)], 1);
    for modern in [false, true] {
        let mut driver = b.driver(modern, u64::MAX);
        for n in 0..64 {
            driver.offer(RX_DATA + n * 256, 256);
        }
        let gets = |driver: &mut Driver, bytes: &[u8]| {
            let before = driver.rx.used_index();
            assert_eq!(b.cable.receive(0, PacketHeader::default(), bytes), Delivery::Done);
            driver.rx.used_index() != before
        };
        assert!(gets(&mut driver, &packet(7, 60)), "promiscuous");
        assert_eq!(driver.command(0, 0, &[0]), 0);
        assert!(!gets(&mut driver, &packet(7, 60)) && gets(&mut driver, &packet(1, 60)));
        let table = [&[1, 0, 0, 0, 2, 0, 0, 0, 0, 7][..], &[1, 0, 0, 0, 0x33, 0x33, 0, 0, 0, 1]].concat();
        assert_eq!(driver.command(1, 0, &table), 0);
        assert!(gets(&mut driver, &packet(7, 60)) && !gets(&mut driver, &packet(8, 60)));
        assert_eq!(driver.command(1, 1, &[2, 0, 0, 0, 0, 8]), 0);
        assert!(gets(&mut driver, &packet(8, 60)) && !gets(&mut driver, &packet(1, 60)));
        assert_eq!(driver.guest.device_config(5, Byte, false), 8);
        let mut tagged = packet(8, 60);
        tagged.splice(12..12, [0x81, 0, 0, 42]);
        assert!(!gets(&mut driver, &tagged));
        assert_eq!(driver.command(2, 0, &[42, 0]), 0);
        assert!(gets(&mut driver, &tagged));
        assert_eq!(driver.command(2, 1, &[42, 0]), 0);
        assert!(!gets(&mut driver, &tagged));
        for (class, code, data) in [
            (0, 6, &[1][..]),
            (0, 0, &[]),
            (1, 0, &[255, 255, 255, 255]),
            (1, 0, &[1, 0, 0, 0, 1, 2]),
            (1, 1, &[1, 2, 3]),
            (2, 0, &[0, 0x10]),
            (2, 2, &[1, 0]),
            (3, 0, &[]),
            (4, 0, &[1, 0]),
            (5, 0, &[0xff; 8]),
            (9, 9, &[]),
        ] {
            assert_eq!(driver.command(class, code, data), 1, "{class} {code} {data:?}");
        }
        driver.guest.reset();
        assert_eq!(driver.guest.device_config(5, Byte, false), 1, "the address is back");
    }
}

#[test]
fn offloads_follow_the_driver() {
    let b = Bench::new(&[], 1);
    let offloads = || *b.cable.offloads.lock().unwrap();
    let mut driver = b.driver(true, u64::MAX);
    assert_eq!(offloads(), Offloads::all());
    assert_eq!(driver.command(5, 0, &bit::GUEST_CSUM.to_le_bytes()), 0);
    assert_eq!(offloads(), Offloads::CHECKSUM);
    driver.guest.reset();
    assert_eq!(offloads(), Offloads::empty());
    b.driver(true, bit::GUEST_CSUM | bit::GUEST_TSO4);
    assert_eq!(offloads(), Offloads::CHECKSUM | Offloads::TCP4);
}

#[test]
fn several_pairs_of_queues() {
    let b = Bench::new(&[], 3);
    let mut driver = b.driver(true, u64::MAX);
    assert_eq!((driver.guest.queue_count(), driver.control.index), (7, 6));
    let mut rx = driver.guest.open_queue(4, 0x70000);
    let mut tx = driver.guest.open_queue(5, 0x78000);
    rx.push(&[Buffer::writable(RX_DATA + 0x1000, 200)]);
    driver.offer(RX_DATA, 200);
    assert_eq!(b.cable.receive(2, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
    assert_eq!((driver.rx.wait_used().1, rx.used_index()), (72, 0), "one pair is in use at first");
    for bad in [0u16, 4, 0xffff] {
        assert_eq!(driver.command(4, 0, &bad.to_le_bytes()), 1);
    }
    assert_eq!(driver.command(4, 0, &[3, 0]), 0);
    assert_eq!(b.cable.receive(2, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
    assert_eq!(rx.wait_used().1, 72);
    tx.push(&[Buffer::readable(TX_DATA, 100)]);
    driver.guest.notify(5);
    tx.wait_used();
    assert_eq!(b.cable.wait_sent().0, 2);

    // A driver that does not know of them finds the control queue behind the first pair.
    let mut driver = b.driver(false, u64::MAX);
    assert_eq!(driver.command(0, 0, &[1]), 0);
}

#[test]
fn the_link_comes_and_goes() {
    let b = Bench::new(&[], 1);
    let mut driver = b.driver(true, u64::MAX);
    driver.guest.function().enable_msix(0x50);
    driver.guest.set_config_vector(0);
    b.board.msi.take();
    let device = b.cable.device.get().unwrap().upgrade().unwrap();
    device.set_link(false);
    assert_eq!(b.board.msi.wait().len(), 1);
    assert_eq!(driver.guest.device_config(6, Word, false), 0);
    driver.send(PacketHeader::default(), &packet(9, 60));
    driver.tx.wait_used();
    assert!(b.cable.sent.lock().unwrap().is_empty(), "the cable is out");
    driver.offer(RX_DATA, 200);
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
    assert_eq!(driver.rx.used_index(), 0);
    device.set_link(false);
    device.set_link(true);
    assert_eq!(b.board.msi.wait().len(), 1, "only changes are told");
    assert_eq!(driver.guest.device_config(6, Word, false), 1);
    assert_eq!(b.cable.receive(0, PacketHeader::default(), &packet(1, 60)), Delivery::Done);
    driver.rx.wait_used();
}

#[test]
fn legacy_drivers_write_the_address_into_the_configuration() {
    let b = Bench::new(&[("mac", MAC)], 1);
    for (modern, last) in [(false, 0x42), (true, 1)] {
        let driver = b.driver(modern, 0);
        let function = driver.guest.function();
        if modern {
            function.write(function.bar(2), 0x2005, Byte, 0x42);
        } else {
            function.write(function.bar(0), 25, Byte, 0x42);
        }
        assert_eq!(driver.guest.device_config(5, Byte, false), last);
    }
}

/// Buffers of all kinds on all queues; those that the device may write lie in one window.
fn hostile_queue(random: &mut Random, ram: &GuestMemory, queue: &mut GuestQueue) {
    const WINDOW: u64 = 0xa0000;
    for index in 0..queue.size.min(128) {
        let len = random.pick(&[0, 1, 9, 10, 11, 12, 26, 60, 100, 1526, 0x5000]);
        let readable = if queue.index.is_multiple_of(2) { random.one_in(40) } else { !random.one_in(40) };
        let buffer = if readable {
            Buffer::readable(random.below(RAM - 0x6000), len)
        } else {
            Buffer::writable(WINDOW + random.below(0x50000), len)
        };
        let buffer = if random.one_in(600) { Buffer { address: random.nasty() | RAM, ..buffer } } else { buffer };
        let flags = u16::from(random.one_in(3)) | if random.one_in(400) { 4 } else { 0 };
        let next = if random.one_in(100) { random.nasty() as u16 } else { (index + 1) % 128 };
        queue.write_descriptor(queue.descriptors, index, buffer, flags, next);
        let head = if random.one_in(400) { random.nasty() as u16 } else { index };
        ram.write_u16(queue.available + 4 + 2 * u64::from(index), head).unwrap();
    }
    let ahead = if random.one_in(20) { random.nasty() } else { random.below(128) };
    queue.set_available_index(ahead as u16);
}

#[test]
fn hostile_rings_write_only_where_the_driver_allowed() {
    let b = Bench::new(&[], 2);
    b.cable.echo.store(true, Ordering::SeqCst);
    let mut random = Random::new(5);
    let function = b.board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    let snapshot = || {
        let mut bytes = vec![0; 0x70000];
        b.board.ram.read(0x30000, &mut bytes).unwrap();
        bytes
    };
    let (mut sent, mut received) = (0u64, 0u64);
    let mut sequences = 0;
    while sequences < 400_000 {
        // Where it is taken for a table of descriptors, the addresses are outside RAM.
        for at in (0x30000..0xa0000).step_by(16) {
            b.board.ram.write_u64(at, random.nasty() | RAM).unwrap();
            b.board.ram.write_u64(at + 8, if random.one_in(2) { 0 } else { random.nasty() }).unwrap();
        }
        let before = snapshot();
        for _ in 0..50 {
            let any = random.bits();
            let features = random.pick(&[0, INDIRECT, EVENT_IDX, bit::MRG_RXBUF, u64::MAX, any]);
            let mut driver = b.driver(random.one_in(2), features);
            hostile_queue(&mut random, &b.board.ram, &mut driver.rx);
            hostile_queue(&mut random, &b.board.ram, &mut driver.tx);
            hostile_queue(&mut random, &b.board.ram, &mut driver.control);
            for queue in [0, driver.control.index, 1] {
                driver.guest.notify(queue);
            }
            for _ in 0..4 {
                let bytes = packet(random.below(3) as u8, 14 + random.below(3000) as usize);
                let _ = b.cable.receive(random.below(4) as u16, PacketHeader::default(), &bytes);
            }
            if random.one_in(2) {
                function.save().unwrap();
            }
            // Each descriptor is a step of its own that the device must get right.
            sequences += 3 * 128;
            sent += u64::from(driver.tx.used_index());
            received += u64::from(driver.rx.used_index());
            driver.guest.reset();
        }
        assert!(snapshot() == before, "something was written where nothing may be");
    }
    assert!(sent > 5000 && received > 5000, "hardly anything was good enough: {sent} sent, {received} received");
    b.cable.echo.store(false, Ordering::SeqCst);
    let mut driver = b.driver(true, u64::MAX);
    driver.send(PacketHeader::default(), &packet(9, 60));
    driver.tx.wait_used();
    assert_eq!(b.cable.wait_sent().2, packet(9, 60));
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut driver = Driver::start(make(subject.function(), subject.ram.clone()), subject.ram.clone(), u64::MAX);
        driver.offer(RX_DATA, 2000);
        assert_eq!(driver.command(0, 0, &[0]), 0);
        assert_eq!(driver.command(2, 0, &[7, 0]), 0);
        driver.send(PacketHeader::default(), &packet(1, 500));
        driver.tx.wait_used();
        assert_eq!(driver.rx.wait_used().1, 512);
    }
}

/// The NIC on a cable that sends everything back.
fn subject() -> Subject {
    let b = Bench::new(&[("mac", MAC)], 2);
    b.cable.echo.store(true, Ordering::SeqCst);
    b.board.subject(3).keeping(b.cable)
}

#[test]
fn conforms() {
    conformance::check(subject, work(false));
    conformance::check(subject, work(true));
}

#[test]
fn fuzz() {
    let request = |random: &mut Random, queue: u16| match queue {
        2 => vec![random.below(6) as u8, random.below(4) as u8, random.bits() as u8, random.bits() as u8, 0, 0, 0, 0],
        _ => {
            let mut bytes: Vec<u8> = (0..12).map(|_| if random.one_in(2) { 0 } else { random.bits() as u8 }).collect();
            bytes.extend(packet(random.below(3) as u8, 14 + random.below(3000) as usize));
            bytes
        }
    };
    Hostile { make: subject, work: work(true), request }.check();
}
