//! A disk as its driver sees it, on a file the test looks into.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

use backend::block::{Geometry, HostBuffers, Image, SectorSize};
use config::{Config, NoWarnings};
use platform::AccessSize::{Byte, Dword, Qword, Word};
use platform::Persist;
use testkit::conformance::{self, Subject};
use testkit::hostile;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, EVENT_IDX, GuestQueue, INDIRECT, VirtioGuest};

use super::*;
use crate::pci::PciAddress;
use crate::testboard::{RAM, TestBoard};
use crate::virtio::VirtioContext;

const RINGS: u64 = 0x10000;
const HEADER: u64 = 0x20000;
const STATUS: u64 = 0x20100;
const DATA: u64 = 0x40000;
const DISK: u64 = 1 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

struct Bench {
    board: TestBoard,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(more: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let pattern: Vec<u8> = (0..DISK).map(|at| (at / 512) as u8 ^ at as u8).collect();
        fs::write(&path, pattern).unwrap();
        let keys = [("pci.0.3.0.device", "virtio-blk"), ("pci.0.3.0.path", path.to_str().unwrap())];
        let board = TestBoard::new(&[&keys, more].concat());
        Self { board, path, _dir: dir }
    }

    fn driver(&self, modern: bool) -> Driver {
        Driver::start(self.board.virtio(3, modern), self.board.ram.clone(), !(1 << 40))
    }

    fn file(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

/// A started driver with one queue.
struct Driver {
    guest: VirtioGuest,
    queue: GuestQueue,
    ram: memory::GuestMemory,
    features: u64,
}

impl Driver {
    fn start(mut guest: VirtioGuest, ram: memory::GuestMemory, wanted: u64) -> Self {
        let features = guest.negotiate(wanted);
        let queue = guest.open_queue(0, RINGS);
        guest.driver_ok();
        Self { guest, queue, ram, features }
    }

    fn header(&self, kind: u32, sector: u64) -> Buffer {
        self.ram.write_u32(HEADER, kind).unwrap();
        self.ram.write_u32(HEADER + 4, 0).unwrap();
        self.ram.write_u64(HEADER + 8, sector).unwrap();
        self.ram.write_u8(STATUS, 0xff).unwrap();
        Buffer::readable(HEADER, 16)
    }

    /// One request: (status, used length).
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let header = self.header(kind, sector);
        let chain: Vec<Buffer> = [&[header], data, &[Buffer::writable(STATUS, 1)]].concat();
        self.queue.push(&chain);
        self.guest.notify(0);
        let (_, written) = self.queue.wait_used();
        (self.ram.read_u8(STATUS).unwrap(), written)
    }

    /// A discard or write-zeroes request.
    fn clear(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.ram.write_u64(DATA, sector).unwrap();
        self.ram.write_u32(DATA + 8, sectors).unwrap();
        self.ram.write_u32(DATA + 12, flags).unwrap();
        self.request(kind, 0, &[Buffer::readable(DATA, 16)]).0
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(address, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn reads_and_writes_the_file() {
    let b = Bench::new(&[]);
    for modern in [false, true] {
        let mut driver = b.driver(modern);
        let scattered = [Buffer::writable(DATA, 100), Buffer::writable(DATA + 0x1000, 924)];
        assert_eq!(driver.request(IN, 4, &scattered), (OK, 1025));
        let read = [driver.bytes(DATA, 100), driver.bytes(DATA + 0x1000, 924)].concat();
        assert_eq!(read, b.file(2048, 1024));

        driver.ram.fill(DATA, 512, 0xa0 | u8::from(modern)).unwrap();
        driver.ram.fill(DATA + 0x800, 1024, 0xb0).unwrap();
        let data = [Buffer::readable(DATA, 512), Buffer::readable(DATA + 0x800, 1024)];
        assert_eq!(driver.request(OUT, 100, &data), (OK, 1));
        assert_eq!(driver.request(4, 0, &[]), (OK, 1));
        assert_eq!(driver.request(5, 0, &[]), (OK, 1));
        let written = b.file(51200, 1536);
        assert!(written[..512] == [0xa0 | u8::from(modern); 512] && written[512..] == [0xb0; 1024]);
    }
}

#[test]
fn the_layout_of_a_request_is_free() {
    let b = Bench::new(&[]);
    let mut driver = b.driver(true);
    driver.header(IN, 1);
    driver.queue.push(&[
        Buffer::readable(HEADER, 5),
        Buffer::readable(HEADER + 5, 11),
        // The status byte is the last one, wherever that is.
        Buffer::writable(DATA, 513),
    ]);
    driver.guest.notify(0);
    assert_eq!(driver.queue.wait_used().1, 513);
    assert_eq!(driver.bytes(DATA, 512), b.file(512, 512));
    assert_eq!(driver.bytes(DATA + 512, 1), [OK]);
}

#[test]
fn the_identification_string() {
    let b = Bench::new(&[("pci.0.3.0.ser", "A serial number of more than 20 bytes")]);
    let mut driver = b.driver(false);
    assert_eq!(driver.request(8, 0, &[Buffer::writable(DATA, 20)]), (OK, 21));
    assert_eq!(driver.bytes(DATA, 20), b"A serial number of m");
    assert_eq!(driver.request(8, 0, &[Buffer::writable(DATA, 19)]), (IOERR, 1));

    assert_eq!(derived_serial("/vm/disk.img"), "BHYVE-FC3C-A324-E502");
    assert_eq!(&identification(b"x")[..3], b"x\0\0");
}

#[test]
fn the_configuration_tells_the_disks_shape() {
    let b = Bench::new(&[("pci.0.3.0.sectorsize", "1024/4096"), ("pci.0.3.0.queues", "3")]);
    for modern in [false, true] {
        let driver = b.driver(modern);
        let config = |offset, size| driver.guest.device_config(offset, size, false);
        assert_eq!(config(0, Qword), DISK / 512, "capacity is in 512-byte units");
        assert_eq!(config(8, Dword), 0, "size_max");
        assert_eq!(config(12, Dword), 126, "seg_max");
        assert_eq!(config(20, Dword), 1024, "blk_size");
        assert_eq!(config(24, Byte), 2, "physical_block_exp");
        assert_eq!(config(34, Word), 3, "num_queues");
        let discard = driver.features & 1 << 13 != 0;
        assert_eq!(config(36, Dword) > 0, discard, "max_discard_sectors");
        assert_eq!(config(44, Dword), if discard { 8 } else { 0 }, "discard_sector_alignment");
        assert_eq!(config(52, Dword), 1, "max_write_zeroes_seg");
        assert_eq!(driver.features & 0x644, 0x644, "SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY");
        assert_eq!(driver.features & 1 << 5, 0, "not read-only");
        assert_eq!(driver.features & 1 << 14 != 0, modern, "WRITE_ZEROES");
    }
}

#[test]
fn what_cannot_be_done_gives_an_error() {
    let b = Bench::new(&[]);
    let mut driver = b.driver(true);
    let sector = [Buffer::writable(DATA, 512)];
    let last = DISK / 512 - 1;
    assert_eq!(driver.request(IN, last, &sector), (OK, 513));
    for (kind, at, data) in [
        (IN, last + 1, sector[0]),
        (IN, last, Buffer::writable(DATA, 1024)),
        (IN, u64::MAX, sector[0]),
        (IN, 1 << 55, sector[0]),
        (IN, 0, Buffer::writable(DATA, 511)),
        (OUT, last + 1, Buffer::readable(DATA, 512)),
        (OUT, 0, Buffer::readable(DATA, 513)),
    ] {
        assert_eq!(driver.request(kind, at, &[data]), (IOERR, 1), "{kind} at {at} with {data:?}");
    }
    for kind in [2, 3, 7, 12, 99, u32::MAX] {
        assert_eq!(driver.request(kind, 0, &[]), (UNSUPP, 1));
    }
    let file = File::options().write(true).open(&b.path).unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(driver.request(IN, 100, &sector), (IOERR, 1), "the file was cut");
    assert_eq!(driver.request(IN, 0, &sector), (OK, 513));
}

#[test]
fn malformed_requests_are_given_back() {
    let b = Bench::new(&[]);
    let mut driver = b.driver(true);
    driver.header(IN, 0);
    for (chain, written) in [
        (vec![Buffer::readable(HEADER, 16)], 0),
        (vec![Buffer::readable(HEADER, 16), Buffer::writable(DATA, 0)], 0),
        (vec![Buffer::readable(HEADER, 15), Buffer::writable(STATUS, 1)], 1),
        (vec![Buffer::writable(STATUS, 1)], 1),
    ] {
        driver.queue.push(&chain);
        driver.guest.notify(0);
        assert_eq!(driver.queue.wait_used().1, written, "{chain:?}");
        if written == 1 {
            assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
        }
    }
}

#[test]
fn discard_and_write_zeroes() {
    let b = Bench::new(&[]);
    let mut driver = b.driver(true);
    if driver.features & 1 << 13 != 0 {
        assert_eq!(driver.clear(11, 8, 8, 0), OK);
        assert_eq!(b.file(4096, 4096), [0; 4096], "a hole reads zeroes");
        assert_eq!(driver.clear(11, 8, 8, 1), UNSUPP, "the flag is for write-zeroes");
        assert_eq!(driver.clear(11, DISK / 512, 1, 0), IOERR);
    }
    assert_eq!(driver.clear(13, 101, 3, 0), OK);
    assert_eq!(b.file(101 * 512, 1536), [0; 1536]);
    assert_ne!(b.file(104 * 512, 512), [0; 512]);
    assert_eq!(driver.clear(13, 32, 16, 1), OK);
    assert_eq!(driver.clear(13, 32, 16, 2), UNSUPP);
    assert_eq!(driver.clear(13, u64::MAX, 1, 0), IOERR);
    assert_eq!(driver.clear(13, 0, u32::MAX, 0), IOERR);
    let (short, two) = (Buffer::readable(DATA, 15), Buffer::readable(DATA, 32));
    assert_eq!(driver.request(13, 0, &[short]).0, IOERR);
    assert_eq!(driver.request(13, 0, &[two]).0, IOERR, "one segment, as the configuration says");
}

#[test]
fn a_disk_that_grows_tells_its_driver() {
    let b = Bench::new(&[]);
    for (modern, size) in [(true, 2 * DISK), (false, 3 * DISK)] {
        let mut driver = b.driver(modern);
        driver.guest.function().enable_msix(0x40);
        assert_eq!(driver.guest.set_config_vector(0), 0);
        b.board.msi.take();
        File::options().write(true).open(&b.path).unwrap().set_len(size).unwrap();
        b.board.msi.wait();
        assert_eq!(driver.guest.device_config(0, Qword, true), size / 512);
        let end = size / 512 - 1;
        assert_eq!(driver.request(IN, end, &[Buffer::writable(DATA, 512)]), (OK, 513));
    }
}

#[test]
fn options_show_in_the_features() {
    let b = Bench::new(&[("pci.0.3.0.ro", "true")]);
    let mut driver = b.driver(true);
    assert_eq!(driver.features & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    let before = fs::read(&b.path).unwrap();
    assert_eq!(driver.request(OUT, 0, &[Buffer::readable(DATA, 512)]), (IOERR, 1));
    assert_eq!(driver.clear(13, 0, 8, 0), UNSUPP);
    assert_eq!(fs::read(&b.path).unwrap(), before);

    let b = Bench::new(&[("pci.0.3.0.nodelete", "true")]);
    let mut driver = b.driver(false);
    assert_eq!(driver.features & 1 << 13, 0);
    assert_eq!(driver.clear(11, 0, 8, 0), UNSUPP);
}

#[test]
fn every_queue_works() {
    let b = Bench::new(&[("cpus", "8")]);
    let mut guest = b.board.virtio(3, true);
    guest.negotiate(0);
    assert_eq!(guest.queue_count(), 4, "one per vCPU, but no more than four");
    let mut queues: Vec<_> = (0..4).map(|index| guest.open_queue(index, RINGS + 0x4000 * u64::from(index))).collect();
    guest.driver_ok();
    for (n, queue) in (0u64..).zip(&mut queues) {
        let at = DATA + 0x1000 * n;
        b.board.ram.write(at, &[0; 16]).unwrap();
        b.board.ram.write_u64(at + 8, n).unwrap();
        queue.push(&[Buffer::readable(at, 16), Buffer::writable(at + 0x200, 512), Buffer::writable(at + 0x400, 1)]);
        guest.notify(queue.index);
    }
    for (n, queue) in (0u64..).zip(&mut queues) {
        assert_eq!(queue.wait_used().1, 513);
        let mut bytes = vec![0; 512];
        b.board.ram.read(DATA + 0x1000 * n + 0x200, &mut bytes).unwrap();
        assert_eq!(bytes, b.file(512 * n, 512));
    }
}

#[test]
fn options_that_make_no_sense_are_refused_in_one_line() {
    let line = |more: &[(&str, &str)]| {
        let keys = [("pci.0.3.0.device", "virtio-blk"), ("pci.0.3.0.path", "/nowhere/disk.img")];
        TestBoard::try_new(&[&keys, more].concat()).err().unwrap().line()
    };
    assert_eq!(line(&[]), "Could not open backing file: /nowhere/disk.img: No such file or directory (os error 2)");
    assert_eq!(line(&[("pci.0.3.0.rw", "true")]), "Invalid device option \"rw\"");
    assert!(line(&[("pci.0.3.0.queues", "17")]).contains("a whole number from 1 to 16"));
    let b = Bench::new(&[]);
    let twice = line(&[("pci.0.3.0.path", b.path.to_str().unwrap())]);
    assert!(twice.contains("in use by another process") && !twice.contains('\n'), "{twice}");
}

#[test]
fn threads_are_named_after_the_slot() {
    let b = Bench::new(&[
        ("pci.0.30.6.device", "virtio-blk"),
        ("pci.0.30.6.path", "/proc/self/exe"),
        ("pci.0.30.6.ro", "true"),
    ]);
    let guest = VirtioGuest::modern(b.board.guest(30, 6), b.board.ram.clone());
    let mut driver = Driver::start(guest, b.board.ram.clone(), 0);
    assert_eq!(driver.request(IN, 0, &[Buffer::writable(DATA, 512)]).0, OK);
    assert_eq!(driver.bytes(DATA, 4), b"\x7fELF");
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let names: Vec<_> = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect();
    assert!(names.iter().any(|name| name == "blk-30:6-0\n"), "{names:?}");
}

/// An image whose reads wait until they are let through.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    inside: AtomicUsize,
}

struct Gated(Arc<Gate>);

impl Gate {
    fn set(&self, open: bool) {
        *self.open.lock().unwrap() = open;
        self.opened.notify_all();
    }
}

impl Image for Gated {
    fn geometry(&self) -> Geometry {
        let sector_size = SectorSize { logical: 512, physical: 512 };
        Geometry { size: DISK, sector_size, read_only: false, discard: false }
    }
    fn read(&self, _: u64, to: &HostBuffers) -> io::Result<()> {
        self.0.inside.fetch_add(1, Ordering::SeqCst);
        drop(self.0.opened.wait_while(self.0.open.lock().unwrap(), |open| !*open));
        to.read_from(std::os::fd::AsFd::as_fd(&File::open("/dev/zero")?), 0)
    }
    fn write(&self, _: u64, _: &HostBuffers, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

fn gated_board() -> (TestBoard, Arc<Gate>, Arc<VirtioContext>) {
    let board = TestBoard::bare();
    let gate = Arc::new(Gate::default());
    let disk = Disk::with_image(Arc::new(Gated(gate.clone())), board.ram.clone(), "blk-3:0", "gated".into()).unwrap();
    let context = BuildContext {
        address: PciAddress::new(0, 3, 0).unwrap(),
        pci: &board.pci,
        memory: &board.ram,
        config: &Config::new(NoWarnings),
        cpus: 1,
    };
    let mut shared = None;
    let function = transport::build(&context, spec(1), |virtio| {
        shared = Some(virtio.clone());
        Ok(Blk::new(virtio, disk, identification(b"x"), 1))
    });
    board.pci.add(function.unwrap()).unwrap();
    board.pci.finish().unwrap();
    (board, gate, shared.unwrap())
}

#[test]
fn reset_in_flight_waits_for_what_the_host_is_doing_and_forgets_the_rest() {
    let (board, gate, virtio) = gated_board();
    for modern in [false, true] {
        gate.set(false);
        gate.inside.store(0, Ordering::SeqCst);
        let mut driver = Driver::start(board.virtio(3, modern), board.ram.clone(), 0);
        board.ram.fill(DATA, 0x10000, 0xee).unwrap();
        let header = driver.header(IN, 0);
        for n in 0..30 {
            let data = Buffer::writable(DATA + 0x400 * n, 512);
            driver.queue.push(&[header, data, Buffer::writable(DATA + 0x400 * n + 512, 1)]);
        }
        driver.guest.notify(0);
        while gate.inside.load(Ordering::SeqCst) < 8 {
            thread::yield_now();
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let (guest, done) = (&mut driver.guest, &done);
            let resetting = scope.spawn(move || {
                guest.reset();
                done.store(true, Ordering::SeqCst);
            });
            // Every chain that is out holds the queue: wait until only those are left that the host is working on.
            while Arc::strong_count(virtio.queue(0).unwrap()) > 1 + 8 {
                thread::yield_now();
            }
            assert!(!done.load(Ordering::SeqCst), "the host still writes to guest memory");
            gate.set(true);
            resetting.join().unwrap();
        });
        // From here on the memory is the guest's again.
        assert_eq!(driver.queue.used_index(), 0);
        board.ram.fill(DATA, 0x10000, 0xdd).unwrap();
        let mut driver = Driver::start(board.virtio(3, modern), board.ram.clone(), 0);
        assert_eq!(driver.request(IN, 0, &[Buffer::writable(STATUS + 0x100, 512)]), (OK, 513));
        assert!(driver.bytes(DATA, 0x10000).iter().all(|byte| *byte == 0xdd), "a cancelled request came after all");
        assert_eq!(gate.inside.load(Ordering::SeqCst), 9, "what had not begun was dropped");
    }
}

#[test]
fn saving_waits_for_requests_under_way() {
    let (board, gate, _) = gated_board();
    let mut driver = Driver::start(board.virtio(3, true), board.ram.clone(), 0);
    let header = driver.header(IN, 0);
    for n in 0..20 {
        driver.queue.push(&[header, Buffer::writable(DATA + 0x400 * n, 512), Buffer::writable(STATUS + n, 1)]);
    }
    driver.guest.notify(0);
    let function = board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    thread::scope(|scope| {
        let saving = scope.spawn(|| function.save().unwrap());
        gate.set(true);
        saving.join().unwrap();
    });
    assert_eq!(driver.queue.used_index(), 20);
    assert!(board.ioapic.level(16), "the interrupt is part of what was saved");
}

#[test]
fn interrupts_and_doorbells_are_never_lost() {
    // A driver that sleeps until it is interrupted, and rings only when the device wants to be told.
    let b = Bench::new(&[]);
    for features in [0, EVENT_IDX] {
        let mut guest = b.board.virtio(3, true);
        guest.negotiate(features);
        let mut queue = guest.open_queue(0, RINGS);
        guest.driver_ok();
        guest.function().enable_msix(0x40);
        guest.set_queue_vector(0, 1);
        b.board.msi.take();
        b.board.ram.write(HEADER, &[0; 16]).unwrap();
        let (mut out, mut pushed) = (0, 0u16);
        for _ in 0..3000 {
            while out < 8 {
                queue.push(&[Buffer::readable(HEADER, 16), Buffer::writable(DATA, 512), Buffer::writable(STATUS, 1)]);
                let wanted =
                    if features == 0 { queue.used_flags() & 1 == 0 } else { queue.available_event() == pushed };
                pushed = pushed.wrapping_add(1);
                out += 1;
                if wanted {
                    guest.notify(0);
                }
            }
            // Ask to be told of the next, and sleep only if it has not come meanwhile.
            queue.set_used_event(pushed.wrapping_sub(out));
            while queue.used_index() == pushed.wrapping_sub(out) {
                b.board.msi.wait();
            }
            while queue.take_used().is_some() {
                out -= 1;
            }
        }
    }
}

/// A guest whose requests are random, with buffers for the device to write only in one window of memory.
struct Hostile<'a> {
    ram: &'a memory::GuestMemory,
    random: Random,
}

impl Hostile<'_> {
    const WINDOW: std::ops::Range<u64> = 0x40000..0x50000;
    const HEADERS: std::ops::Range<u64> = 0x20000..0x30000;
    const TABLES: std::ops::Range<u64> = 0x80000..RAM;

    /// Headers of all kinds, and indirect tables whose writable descriptors stay in the window.
    fn fill_memory(&mut self) {
        for at in Self::HEADERS.step_by(16) {
            self.ram.write_u64(at, self.random.pick(&[0, 1, 4, 8, 11, 13, 77])).unwrap();
            let sector = self.random.below(DISK / 512 + 4);
            self.ram.write_u64(at + 8, sector).unwrap();
        }
        for at in Self::TABLES.step_by(16) {
            let (buffer, flags) = self.descriptor(at / 16 % 4);
            self.ram.write_u64(at, buffer.address).unwrap();
            self.ram.write_u32(at + 8, buffer.len).unwrap();
            self.ram.write_u16(at + 12, flags | u16::from(buffer.device_writes) << 1).unwrap();
            self.ram.write_u16(at + 14, (at / 16 % 4 + 1) as u16).unwrap();
        }
    }

    /// A descriptor as it may stand at one of four places of a request: header, data out, data in, status. Sometimes it
    /// stands where it must not, or has flags that it must not have.
    fn descriptor(&mut self, place: u64) -> (Buffer, u16) {
        let random = &mut self.random;
        let place = if random.one_in(200) { random.below(4) } else { place };
        let window = Self::WINDOW.start + random.below(0xe000);
        let sectors = 512 * random.below(6) as u32;
        let buffer = match place {
            0 => Buffer::readable(Self::HEADERS.start + 16 * random.below(0xff0), 16),
            1 => Buffer::readable(Self::TABLES.start + random.below(0x7e000), random.pick(&[0, 16, 512, sectors, 77])),
            2 => Buffer::writable(window, random.pick(&[0, 20, sectors, sectors, 1000])),
            _ => Buffer::writable(window, 1),
        };
        let more = u16::from(place < 3) ^ u16::from(random.one_in(200));
        let indirect = u16::from(random.one_in(300)) << 2;
        (buffer, more | indirect)
    }

    /// Fills a queue with requests and announces some.
    fn fill_queue(&mut self, queue: &mut GuestQueue) {
        for index in 0..queue.size {
            let (mut buffer, mut flags) = self.descriptor(u64::from(index % 4));
            if index % 4 == 0 && self.random.one_in(4) {
                buffer = Buffer::readable(Self::TABLES.start + 64 * self.random.below(0x1f00), 64);
                flags = 4;
            }
            let next = if self.random.one_in(300) { self.random.below(200) as u16 } else { index + 1 };
            queue.write_descriptor(queue.descriptors, index, buffer, flags, next);
            let head = if self.random.one_in(400) { self.random.nasty() as u16 } else { index / 4 * 4 };
            self.ram.write_u16(queue.available + 4 + 2 * u64::from(index), head).unwrap();
        }
        let ahead = if self.random.one_in(20) { self.random.nasty() as u16 } else { 4 * self.random.below(32) as u16 };
        queue.set_available_index(ahead);
    }

    fn snapshot(&self, range: std::ops::Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.ram.read(range.start, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn hostile_rings_write_only_where_the_driver_allowed() {
    let b = Bench::new(&[]);
    let function = b.board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    let mut hostile = Hostile { ram: &b.board.ram, random: Random::new(11) };
    let mut served = 0u64;
    for round in 0..30 {
        hostile.fill_memory();
        let modern = round % 2 == 1;
        let rings = RINGS..RINGS + 0x2000;
        let outside = [0..rings.start, rings.end..Hostile::WINDOW.start, Hostile::WINDOW.end..RAM];
        let before = outside.clone().map(|range| hostile.snapshot(range));
        for _ in 0..100 {
            let features = hostile.random.pick(&[0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX]);
            let Driver { mut guest, mut queue, .. } =
                Driver::start(b.board.virtio(3, modern), b.board.ram.clone(), features);
            assert!(queue.end() <= rings.end);
            hostile.fill_queue(&mut queue);
            guest.notify(0);
            // Some are reset while requests are under way, the others when all is done.
            if hostile.random.one_in(2) {
                function.save().unwrap();
            }
            served += u64::from(queue.used_index());
            guest.reset();
        }
        for (range, before) in outside.into_iter().zip(before) {
            assert!(hostile.snapshot(range.clone()) == before, "round {round}: something was written in {range:x?}");
        }
    }
    assert!(served > 20_000, "hardly a request was good enough to be served: {served}");
    assert_eq!(b.driver(true).request(IN, 0, &[Buffer::writable(DATA, 512)]).0, OK);
    assert_eq!(fs::metadata(&b.path).unwrap().len(), DISK, "the file keeps its size");
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut driver = Driver::start(make(subject.function(), subject.ram.clone()), subject.ram.clone(), u64::MAX);
        assert_eq!(driver.request(8, 0, &[Buffer::writable(DATA, 20)]).0, OK);
        subject.ram.fill(DATA, 512, 0x77).unwrap();
        assert_eq!(driver.request(OUT, 7, &[Buffer::readable(DATA, 512)]).0, OK);
        assert_eq!(driver.request(IN, 7, &[Buffer::writable(DATA + 0x1000, 512)]).0, OK);
        assert_eq!(driver.bytes(DATA + 0x1000, 512), [0x77; 512]);
    }
}

#[test]
fn conforms() {
    for modern in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(DISK).unwrap();
        let keys =
            [("pci.0.3.0.device", "virtio-blk"), ("pci.0.3.0.path", path.to_str().unwrap()), ("pci.0.3.0.lock", "off")];
        conformance::check(|| TestBoard::new(&keys).subject(3), work(modern));
    }
}

#[test]
fn fuzz() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(DISK).unwrap();
    let keys =
        [("pci.0.3.0.device", "virtio-blk"), ("pci.0.3.0.path", path.to_str().unwrap()), ("pci.0.3.0.lock", "off")];
    let make = || TestBoard::new(&keys).subject(3);
    let request = |random: &mut Random, _: u16| {
        let kind = random.pick(&[0u32, 0, 1, 1, 4, 5, 8, 11, 13, 77]);
        let sector = if random.one_in(10) { random.nasty() } else { random.below(DISK / 512 + 4) };
        let len = random.pick(&[0, 16, 16, 512, 512, 1024, 4096, 77]);
        let mut bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        if random.one_in(2) {
            bytes.extend(random.below(DISK / 512 + 4).to_le_bytes());
            bytes.extend((random.below(40) as u32).to_le_bytes());
            bytes.extend((random.below(3) as u32).to_le_bytes());
        } else {
            bytes.resize(16 + len, random.bits() as u8);
        }
        bytes
    };
    hostile::Hostile { make, work: work(true), request }.check();
}
