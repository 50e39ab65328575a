use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use platform::AccessSize::{Byte, Dword, Word};
use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::irq::PATIENCE;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const DATA: u64 = 0x80000;

fn board(dir: &tempfile::TempDir) -> TestBoard {
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    TestBoard::new(&[
        ("pci.0.5.0.device", "virtio-console"),
        ("pci.0.5.0.port.0.name", "zero"),
        ("pci.0.5.0.port.0.path", &path("zero")),
        ("pci.0.5.0.port.1.name", "one"),
        ("pci.0.5.0.port.1.path", &path("one")),
    ])
}

/// The driver: its queues, and buffers on those that the device fills.
struct Driver {
    ram: memory::GuestMemory,
    guest: VirtioGuest,
    queues: Vec<GuestQueue>,
}

/// Bytes of a buffer for the device to fill.
const ROOM: u32 = 64;

impl Driver {
    fn new(mut guest: VirtioGuest, ram: memory::GuestMemory) -> Self {
        guest.negotiate(u64::MAX);
        let queues = (0..6).map(|n| guest.open_queue(n, RINGS + 0x4000 * u64::from(n))).collect();
        guest.driver_ok();
        let mut driver = Self { ram, guest, queues };
        for queue in [0, 2, 4] {
            (0..16).for_each(|slot| driver.offer(queue, slot));
        }
        driver
    }

    fn offer(&mut self, queue: usize, slot: u64) {
        self.queues[queue].push(&[Buffer::writable(DATA + (queue as u64 * 64 + slot) * u64::from(ROOM), ROOM)]);
        self.guest.notify(queue as u16);
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let at = DATA + 0x10000 + queue as u64 * 0x1000;
        self.ram.write(at, bytes).unwrap();
        self.queues[queue].push(&[Buffer::readable(at, bytes.len() as u32)]);
        self.guest.notify(queue as u16);
        self.queues[queue].wait_used();
    }

    fn control(&mut self, port: u8, event: u8, value: u8) {
        self.send(3, &[port, 0, 0, 0, event, 0, value, 0]);
    }

    /// What comes into a queue next. Buffers are used in order.
    fn receive(&mut self, queue: usize) -> Vec<u8> {
        let (head, len) = self.queues[queue].wait_used();
        let address = self.ram.read_u64(self.queues[queue].descriptors + 16 * u64::from(head)).unwrap();
        let mut bytes = vec![0; len as usize];
        self.ram.read(address, &mut bytes).unwrap();
        self.queues[queue].push(&[Buffer::writable(address, ROOM)]);
        self.guest.notify(queue as u16);
        bytes
    }

    /// Brings both ports into use.
    fn start(&mut self) {
        self.control(0, 0, 1);
        assert_eq!(self.receive(2), [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(self.receive(2), [1, 0, 0, 0, 1, 0, 0, 0]);
        for (port, name) in [(0, &b"zero\0"[..]), (1, b"one\0")] {
            self.control(port, 3, 1);
            assert_eq!(self.receive(2), [&[port, 0, 0, 0, 7, 0, 1, 0], name].concat());
            self.control(port, 6, 1);
        }
    }
}

fn driver(board: &TestBoard, modern: bool) -> Driver {
    Driver::new(board.virtio(5, modern), board.ram.clone())
}

fn connect(dir: &tempfile::TempDir, name: &str) -> UnixStream {
    let client = UnixStream::connect(dir.path().join(name)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

#[test]
fn named_ports_connect_programs() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    for modern in [true, false] {
        let mut driver = driver(&board, modern);
        driver.start();
        driver.send(1, b"nobody is there");
        let mut one = connect(&dir, "one");
        assert_eq!(driver.receive(2), [1, 0, 0, 0, 6, 0, 1, 0], "a client came");
        one.write_all(b"question").unwrap();
        assert_eq!(driver.receive(4), b"question");
        driver.send(5, b"answer");
        let mut answer = [0; 6];
        one.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        // More than one buffer's worth, in order.
        let long: Vec<u8> = (0..200).collect();
        one.write_all(&long).unwrap();
        let mut received = Vec::new();
        while received.len() < long.len() {
            received.extend(driver.receive(4));
        }
        assert_eq!(received, long);
        drop(one);
        assert_eq!(driver.receive(2), [1, 0, 0, 0, 6, 0, 0, 0], "and left");
        driver.guest.reset();
    }
}

#[test]
fn input_waits_until_a_program_opens_the_port() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    let mut driver = driver(&board, true);
    let mut one = connect(&dir, "one");
    one.write_all(b"early").unwrap();
    driver.control(0, 0, 1);
    (0..2).for_each(|_| drop(driver.receive(2)));
    driver.control(1, 3, 1);
    driver.receive(2);
    driver.control(1, 6, 1);
    assert_eq!(driver.receive(4), b"early");
}

#[test]
fn without_multiport_the_first_port_is_a_console() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    let mut guest = board.virtio(5, true);
    guest.negotiate(0);
    let queues = (0..2).map(|n| guest.open_queue(n, RINGS + 0x4000 * u64::from(n))).collect();
    guest.driver_ok();
    let mut driver = Driver { ram: board.ram.clone(), guest, queues };
    driver.offer(0, 0);
    let mut zero = connect(&dir, "zero");
    zero.write_all(b"hello").unwrap();
    assert_eq!(driver.receive(0), b"hello");
    driver.send(1, b"world");
    let mut answer = [0; 5];
    zero.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"world");
}

#[test]
fn configuration() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    assert_eq!(board.guest(5, 0).config32(0), 0x1003_1af4);
    assert_eq!(board.guest(5, 0).config32(8) >> 16, 0x0780);
    let guest = board.virtio(5, true);
    assert_eq!(guest.offered() & 7, 7);
    assert_eq!((guest.device_config(0, Word, false), guest.device_config(2, Word, false)), (80, 25));
    assert_eq!(guest.device_config(4, Dword, false), 16);
    assert_eq!(guest.device_config(8, Byte, false), 0);
}

#[test]
fn bad_ports_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let line = |keys: &[(&str, &str)]| {
        let keys: Vec<_> = [("pci.0.5.0.device", "virtio-console")].into_iter().chain(keys.iter().copied()).collect();
        TestBoard::try_new(&keys).err().unwrap().line()
    };
    assert!(line(&[("pci.0.5.0.port.0.name", "x")]).contains("port x requires a path"));
    let missing = dir.path().join("none/socket");
    let error = line(&[("pci.0.5.0.port.3.name", "x"), ("pci.0.5.0.port.3.path", missing.to_str().unwrap())]);
    assert!(error.starts_with("virtio-console port x: cannot listen on"), "{error}");
    assert!(line(&[("pci.0.5.0.port.0.path", "tcp=x")]).contains("not a TCP port"));
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        Driver::new(make(subject.function(), subject.ram.clone()), subject.ram.clone()).start();
    }
}

/// The device with a folder of its own.
fn subject() -> Subject {
    let dir = tempfile::tempdir().unwrap();
    board(&dir).subject(5).keeping(dir)
}

#[test]
fn conforms() {
    conformance::check(subject, work(false));
    conformance::check(subject, work(true));
}

#[test]
fn fuzz() {
    let request = |random: &mut Random, _: u16| match random.below(4) {
        0 => (0..random.below(20)).map(|_| random.bits() as u8).collect(),
        _ => vec![random.below(3) as u8, 0, 0, 0, random.below(9) as u8, 0, random.below(2) as u8, 0],
    };
    Hostile { make: subject, work: work(true), request }.check();
}

#[test]
fn hostile_messages_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    let mut random = Random::new(5);
    for round in 0..10 {
        let mut driver = driver(&board, round % 2 == 0);
        let mut client = connect(&dir, "one");
        client.set_nonblocking(true).unwrap();
        for _ in 0..10_000 {
            let message: Vec<u8> = match random.below(4) {
                0 => (0..random.below(20)).map(|_| random.bits() as u8).collect(),
                _ => vec![random.below(3) as u8, 0, 0, 0, random.below(9) as u8, 0, random.below(2) as u8, 0],
            };
            let queue = random.pick(&[3, 3, 3, 1, 5]);
            driver.send(queue, if message.is_empty() { &[0] } else { &message });
            if random.one_in(50) {
                let _ = client.write(&[1; 100]);
                let _ = client.read(&mut [0; 1000]);
            }
            for queue in [0, 2, 4] {
                while let Some((head, len)) = driver.queues[queue].take_used() {
                    assert!(len <= ROOM);
                    let address = board.ram.read_u64(driver.queues[queue].descriptors + 16 * u64::from(head)).unwrap();
                    driver.queues[queue].push(&[Buffer::writable(address, ROOM)]);
                }
            }
        }
        drop(client);
        driver.guest.reset();
    }
    driver(&board, true).start();
}
