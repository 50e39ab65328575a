use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::irq::PATIENCE;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const INPUT: u64 = 0x40000;
const OUTPUT: u64 = 0x60000;
const ROOM: u32 = 256;

fn board(dir: &tempfile::TempDir) -> TestBoard {
    let path = dir.path().join("s");
    TestBoard::new(&[
        ("pci.0.5.0.device", "virtio-vsock"),
        ("pci.0.5.0.path", path.to_str().unwrap()),
        ("pci.0.5.0.cid", "7"),
    ])
}

struct Driver {
    ram: memory::GuestMemory,
    guest: VirtioGuest,
    queues: Vec<GuestQueue>,
}

impl Driver {
    fn new(mut guest: VirtioGuest, ram: memory::GuestMemory) -> Self {
        guest.negotiate(u64::MAX);
        let queues = (0..3).map(|n| guest.open_queue(n, RINGS + 0x4000 * u64::from(n))).collect();
        guest.driver_ok();
        let mut driver = Self { ram, guest, queues };
        for slot in 0..16 {
            driver.queues[0].push(&[Buffer::writable(INPUT + slot * u64::from(ROOM), ROOM)]);
        }
        driver.guest.notify(0);
        driver
    }

    /// Sends a packet of the guest's port 1000 to a port of the host.
    fn send(&mut self, port: u32, op: u16, payload: &[u8]) {
        let mut packet = Vec::new();
        packet.extend(7u64.to_le_bytes());
        packet.extend(2u64.to_le_bytes());
        packet.extend(1000u32.to_le_bytes());
        packet.extend(port.to_le_bytes());
        packet.extend((payload.len() as u32).to_le_bytes());
        packet.extend(1u16.to_le_bytes());
        packet.extend(op.to_le_bytes());
        packet.extend(0u32.to_le_bytes());
        packet.extend(0x10000u32.to_le_bytes());
        packet.extend(0u32.to_le_bytes());
        packet.extend(payload);
        self.send_raw(&packet);
    }

    fn send_raw(&mut self, packet: &[u8]) {
        self.ram.write(OUTPUT, packet).unwrap();
        let head = packet.len().min(44) as u32;
        let mut buffers = vec![Buffer::readable(OUTPUT, head)];
        if packet.len() > 44 {
            buffers.push(Buffer::readable(OUTPUT + 44, packet.len() as u32 - 44));
        }
        self.queues[1].push(&buffers);
        self.guest.notify(1);
        self.queues[1].wait_used();
    }

    /// The next packet for the guest: its operation and content.
    fn receive(&mut self) -> (u16, Vec<u8>) {
        let (head, len) = self.queues[0].wait_used();
        let address = self.ram.read_u64(self.queues[0].descriptors + 16 * u64::from(head)).unwrap();
        let mut bytes = vec![0; len as usize];
        self.ram.read(address, &mut bytes).unwrap();
        self.queues[0].push(&[Buffer::writable(address, ROOM)]);
        self.guest.notify(0);
        (u16::from_le_bytes([bytes[30], bytes[31]]), bytes[44..].to_vec())
    }
}

#[test]
fn a_program_of_the_guest_talks_to_one_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    assert_eq!(board.guest(5, 0).config32(0), 0x1053_1af4);
    assert_eq!(board.virtio(5, true).device_config(0, platform::AccessSize::Dword, false), 7);
    let mut driver = Driver::new(board.virtio(5, true), board.ram.clone());
    let listener = UnixListener::bind(dir.path().join("s_9")).unwrap();
    driver.send(9, 1, b"");
    assert_eq!(driver.receive().0, 2, "a response");
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    driver.send(9, 5, b"hello");
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    stream.write_all(&[3; 1000]).unwrap();
    let mut received = Vec::new();
    while received.len() < 1000 {
        let (op, bytes) = driver.receive();
        assert_eq!(op, 5);
        assert!(bytes.len() <= ROOM as usize - 44);
        received.extend(bytes);
    }
    assert_eq!(received, [3; 1000]);
    // A reboot of the guest ends the connection.
    driver.guest.reset();
    assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let subjects = dirs.each_ref().map(|dir| board(dir).subject(5));
    subjects[0].function().set_command(7);
    let mut driver =
        Driver::new(VirtioGuest::modern(subjects[0].function(), subjects[0].ram.clone()), subjects[0].ram.clone());
    let saved = subjects[0].state.save().unwrap();
    subjects[1].state.restore(subjects[0].state.version(), &saved).unwrap();
    // The driver goes on with the other board's memory, which is as it was.
    let mut all = vec![0; 1 << 20];
    subjects[0].ram.read(0, &mut all).unwrap();
    subjects[1].ram.write(0, &all).unwrap();
    driver.queues[2].push(&[Buffer::writable(OUTPUT, 4)]);
    let mut moved = vec![0; 0x4000];
    subjects[0].ram.read(RINGS + 0x8000, &mut moved).unwrap();
    subjects[1].ram.write(RINGS + 0x8000, &moved).unwrap();
    subjects[1].ram.write(OUTPUT, &[0xff; 4]).unwrap();
    VirtioGuest::modern(subjects[1].function(), subjects[1].ram.clone()).notify(2);
    let start = std::time::Instant::now();
    while subjects[1].ram.read_u32(OUTPUT).unwrap() != 0 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn bad_options_are_told() {
    let line = |keys: &[(&str, &str)]| {
        let keys: Vec<_> = [("pci.0.5.0.device", "virtio-vsock")].into_iter().chain(keys.iter().copied()).collect();
        TestBoard::try_new(&keys).err().unwrap().line()
    };
    assert!(line(&[]).contains("name a UNIX socket"));
    assert!(line(&[("pci.0.5.0.path", "/no/such/folder/s")]).starts_with("cannot listen on /no/such/folder/s"));
    assert!(line(&[("pci.0.5.0.path", "s"), ("pci.0.5.0.cid", "2")]).contains("cid"));
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut driver = Driver::new(make(subject.function(), subject.ram.clone()), subject.ram.clone());
        driver.send(77, 1, b"");
        assert_eq!(driver.receive().0, 3, "nobody listens");
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
    let request = |random: &mut Random, _: u16| {
        let mut packet = Vec::new();
        packet.extend(random.pick(&[7u64, 7, 7, 3]).to_le_bytes());
        packet.extend(random.pick(&[2u64, 2, 2, 9]).to_le_bytes());
        packet.extend((1000 + random.below(3) as u32).to_le_bytes());
        packet.extend((random.below(3) as u32).to_le_bytes());
        let len = random.below(100) as u32;
        let told = if random.one_in(20) { random.nasty() as u32 } else { len };
        packet.extend(told.to_le_bytes());
        packet.extend((random.below(3) as u16).to_le_bytes());
        packet.extend((random.below(9) as u16).to_le_bytes());
        packet.extend((random.nasty() as u32).to_le_bytes());
        packet.extend((random.nasty() as u32).to_le_bytes());
        packet.extend((random.nasty() as u32).to_le_bytes());
        packet.extend((0..len).map(|_| random.bits() as u8));
        packet
    };
    Hostile { make: subject, work: work(true), request }.check();
}

#[test]
fn hostile_packets_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    let mut random = Random::new(9);
    for round in 0..4 {
        let mut driver = Driver::new(board.virtio(5, round % 2 == 0), board.ram.clone());
        for _ in 0..5000 {
            let packet: Vec<u8> = (0..random.below(100)).map(|_| random.bits() as u8).collect();
            if random.one_in(2) && !packet.is_empty() {
                driver.send_raw(&packet);
            } else {
                driver.send(random.below(3) as u32, random.below(9) as u16, &packet);
            }
            while let Some((head, len)) = driver.queues[0].take_used() {
                assert!(len <= ROOM);
                let address = board.ram.read_u64(driver.queues[0].descriptors + 16 * u64::from(head)).unwrap();
                driver.queues[0].push(&[Buffer::writable(address, ROOM)]);
            }
        }
        driver.guest.reset();
    }
    // A connection that comes before the driver's reset would end with that.
    let mut driver = Driver::new(board.virtio(5, true), board.ram.clone());
    let mut stream = UnixStream::connect(dir.path().join("s")).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(driver.receive().0, 1, "a request");
}
