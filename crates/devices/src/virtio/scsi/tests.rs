//! SCSI disks as their driver sees them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use platform::AccessSize::{Dword, Word};
use platform::Persist;
use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, EVENT_IDX, GuestQueue, INDIRECT, VirtioGuest};

use super::*;
use crate::pci::PciAddress;
use crate::testboard::{RAM, TestBoard};

const RINGS: u64 = 0x10000;
const REQUEST: u64 = 0x20000;
const RESPONSE: u64 = 0x21000;
const DATA: u64 = 0x40000;
const DISK: u64 = 1 << 20;
const CHECK: u8 = 2;
const CHANGE: u64 = 1 << 2;

struct Bench {
    board: TestBoard,
    paths: Vec<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(disks: usize, more: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..disks).map(|n| dir.path().join(format!("disk{n}.img"))).collect();
        let mut keys = vec![("pci.0.3.0.device".to_owned(), "virtio-scsi".to_owned())];
        for (n, path) in paths.iter().enumerate() {
            fs::write(path, (0..DISK).map(|at| (at / 512) as u8 ^ at as u8 ^ n as u8).collect::<Vec<u8>>()).unwrap();
            let key = if n == 0 { "pci.0.3.0.dev".into() } else { format!("pci.0.3.0.lun.{n}.path") };
            keys.push((key, path.to_str().unwrap().into()));
        }
        let mut keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        keys.extend(more);
        Self { board: TestBoard::new(&keys), paths, _dir: dir }
    }

    /// A driver whose first commands have taken the units' attention.
    fn driver(&self, modern: bool) -> Driver {
        let mut driver = Driver::start(self.board.virtio(3, modern), self.board.ram.clone());
        for lun in 0..self.paths.len() as u16 {
            assert_eq!(driver.command(lun, &[0; 6], &[]).sense, Some((6, 0x29, 0)), "power on");
        }
        driver
    }

    fn file(&self, disk: usize, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.paths[disk]).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

struct Driver {
    guest: VirtioGuest,
    control: GuestQueue,
    events: GuestQueue,
    requests: GuestQueue,
    ram: memory::GuestMemory,
}

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    response: u8,
    status: u8,
    residual: u32,
    sense: Option<(u8, u8, u8)>,
    written: u32,
}

impl Driver {
    fn start(mut guest: VirtioGuest, ram: memory::GuestMemory) -> Self {
        guest.negotiate(!(1 << 40) & !EVENT_IDX & !(1 << 24));
        let [control, events, requests] = [0, 1, 2].map(|n| guest.open_queue(n, RINGS + 0x3000 * u64::from(n)));
        guest.driver_ok();
        Self { guest, control, events, requests, ram }
    }

    fn push(&mut self, lun: [u8; 8], cdb: &[u8], data: &[Buffer]) {
        self.ram.fill(REQUEST, 51, 0).unwrap();
        self.ram.write(REQUEST, &lun).unwrap();
        self.ram.write_u64(REQUEST + 8, 77).unwrap();
        self.ram.write(REQUEST + 19, cdb).unwrap();
        self.ram.fill(RESPONSE, 108, 0xff).unwrap();
        let (input, out): (Vec<Buffer>, Vec<Buffer>) = data.iter().copied().partition(|buffer| buffer.device_writes);
        let mut chain = vec![Buffer::readable(REQUEST, 51)];
        chain.extend(out);
        chain.push(Buffer::writable(RESPONSE, 108));
        chain.extend(input);
        self.requests.push(&chain);
        self.guest.notify(2);
    }

    fn command_at(&mut self, lun: [u8; 8], cdb: &[u8], data: &[Buffer]) -> Ended {
        self.push(lun, cdb, data);
        let (_, written) = self.requests.wait_used();
        let mut bytes = [0; 108];
        self.ram.read(RESPONSE, &mut bytes).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let sense = (word(0) > 0).then(|| {
            assert_eq!((word(0), bytes[12]), (18, 0x70));
            (bytes[14], bytes[24], bytes[25])
        });
        Ended { response: bytes[11], status: bytes[10], residual: word(4), sense, written }
    }

    fn command(&mut self, lun: u16, cdb: &[u8], data: &[Buffer]) -> Ended {
        self.command_at(layout::address_of(lun), cdb, data)
    }

    /// A command that succeeds; what it read.
    fn data(&mut self, lun: u16, cdb: &[u8], len: u32) -> Vec<u8> {
        self.ram.fill(DATA, u64::from(len), 0xee).unwrap();
        let ended = self.command(lun, cdb, &[Buffer::writable(DATA, len)]);
        assert_eq!((ended.response, ended.status), (0, 0), "{cdb:x?}: {ended:?}");
        let mut bytes = vec![0; (len - ended.residual) as usize];
        self.ram.read(DATA, &mut bytes).unwrap();
        assert_eq!(ended.written as usize, if bytes.is_empty() { 12 } else { 108 + bytes.len() });
        bytes
    }

    /// A command with data for the device.
    fn write(&mut self, lun: u16, cdb: &[u8], bytes: &[u8]) -> Ended {
        self.ram.write(DATA, bytes).unwrap();
        self.command(lun, cdb, &[Buffer::readable(DATA, bytes.len() as u32)])
    }

    fn manage(&mut self, kind: u32, subtype: u32, lun: [u8; 8], tag: u64) -> (u32, u8) {
        self.ram.write_u32(REQUEST + 0x800, kind).unwrap();
        self.ram.write_u32(REQUEST + 0x804, subtype).unwrap();
        self.ram.write(REQUEST + 0x808, &lun).unwrap();
        self.ram.write_u64(REQUEST + 0x810, tag).unwrap();
        self.control.push(&[Buffer::readable(REQUEST + 0x800, 24), Buffer::writable(RESPONSE + 0x800, 5)]);
        self.guest.notify(0);
        let written = self.control.wait_used().1;
        (written, self.ram.read_u8(RESPONSE + 0x800).unwrap())
    }
}

/// READ or WRITE of 10, 12 or 16 bytes.
fn rw(opcode: u8, block: u32, count: u16) -> Vec<u8> {
    let (block, [high, low]) = (block.to_be_bytes(), count.to_be_bytes());
    let [a, b, c, d] = block;
    match opcode >> 5 {
        0 => vec![opcode, b & 0x1f, c, d, low, 0],
        4 => [&[opcode, 0, 0, 0, 0, 0][..], &block, &[0, 0, high, low, 0, 0]].concat(),
        5 => vec![opcode, 0, a, b, c, d, 0, 0, high, low, 0, 0],
        _ => vec![opcode, 0, a, b, c, d, 0, high, low, 0],
    }
}

#[test]
fn reads_and_writes_of_all_lengths() {
    let b = Bench::new(2, &[]);
    for modern in [false, true] {
        let mut driver = b.driver(modern);
        for (n, opcode) in [0x08, 0x28, 0xa8, 0x88].into_iter().enumerate() {
            for lun in 0..2 {
                let read = driver.data(lun, &rw(opcode, 100 + n as u32, 3), 2048);
                assert_eq!(read, b.file(lun.into(), 51200 + 512 * n as u64, 1536));
            }
        }
        for (n, opcode) in [0x0a, 0x2a, 0xaa, 0x8a, 0x2e, 0xae, 0x8e].into_iter().enumerate() {
            let data = vec![0xa0 + n as u8 + u8::from(modern); 1024];
            let ended = driver.write(1, &rw(opcode, 200 + 2 * n as u32, 2), &data);
            assert_eq!(ended, Ended { response: 0, status: 0, residual: 0, sense: None, written: 12 });
            assert_eq!(b.file(1, 512 * (200 + 2 * n as u64), 1024), data);
        }
        let mut fua = rw(0x2a, 5, 1);
        fua[1] = 8;
        assert_eq!(driver.write(0, &fua, &[7; 512]).status, 0);
        assert_eq!(driver.command(0, &rw(0x35, 0, 0), &[]).status, 0);
        assert_eq!(driver.command(0, &rw(0x91, 0, 0), &[]).status, 0);
        assert_eq!(driver.command(0, &rw(0x28, 0, 0), &[]).status, 0, "no blocks");
        assert_eq!(driver.command(0, &rw(0x2f, 0, 2048), &[]).status, 0, "VERIFY");
    }
}

#[test]
fn what_the_disk_is() {
    let b = Bench::new(1, &[("pci.0.3.0.sectorsize", "512/4096")]);
    let mut driver = b.driver(true);
    assert_eq!(driver.data(0, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), [0, 0, 7, 0xff, 0, 0, 2, 0]);
    let long = driver.data(0, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
    assert_eq!((long[..12].to_vec(), long[13]), (vec![0, 0, 0, 0, 0, 0, 7, 0xff, 0, 0, 2, 0], 3));
    let inquiry = driver.data(0, &[0x12, 0, 0, 0, 96, 0], 96);
    assert_eq!((inquiry.len(), inquiry[0], &inquiry[8..13]), (36, 0, &b"BHYVE"[..]));
    assert_eq!(driver.data(0, &[0x12, 0, 0, 0, 5, 0], 96).len(), 5, "no more than asked for");
    let serial = driver.data(0, &[0x12, 1, 0x80, 0, 96, 0], 96);
    assert_eq!(serial[4..], *super::super::blk::derived_serial(b.paths[0].to_str().unwrap()).as_bytes());
    assert_eq!(driver.data(0, &[0x1a, 0, 0x3f, 0, 255, 0], 255).len(), 4 + 8 + 12 + 20 + 12);
    assert_eq!(driver.data(0, &[0x5a, 8, 8, 0, 0, 0, 0, 0, 255, 0], 255)[10], 4, "write cache");
    assert_eq!(
        driver.data(0, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64)[..12],
        [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(driver.data(0, &[3, 0, 0, 0, 18, 0], 18)[2], 0, "no sense");
    let config = |offset, size| driver.guest.device_config(offset, size, false);
    assert_eq!([0, 16, 20, 24, 32].map(|at| config(at, Dword)), [1, 16, 96, 32, 16383]);
    assert_eq!([28, 30].map(|at| config(at, Word)), [0, 0]);
}

#[test]
fn discard_and_write_same() {
    let b = Bench::new(1, &[]);
    let mut driver = b.driver(true);
    let mut same = rw(0x93, 10, 4);
    assert_eq!(driver.write(0, &same, &[0x5a; 512]).status, 0);
    assert!(b.file(0, 5120, 2048).iter().all(|byte| *byte == 0x5a));
    same[1] = 8;
    assert_eq!(driver.write(0, &same, &[0; 512]).status, 0);
    assert_eq!(b.file(0, 5120, 2048), [0; 2048]);
    assert_ne!(b.file(0, 7168, 512), [0; 512]);
    same[1] = 1;
    assert_eq!(driver.command(0, &same, &[]).status, 0, "no data: zeroes");
    assert_eq!(driver.command(0, &rw(0x41, 10, 4), &[]).sense, Some((11, 0x4b, 0)), "no pattern");
    let unmap = |descriptors: &[(u64, u32)]| {
        let len = 16 * descriptors.len() as u16;
        let mut list = [(len + 6).to_be_bytes(), len.to_be_bytes(), [0; 2], [0; 2]].concat();
        for (block, count) in descriptors {
            list.extend([&block.to_be_bytes()[..], &count.to_be_bytes(), &[0; 4]].concat());
        }
        list
    };
    if driver.data(0, &[0x12, 1, 0xb2, 0, 96, 0], 96)[5] & 0x80 != 0 {
        let list = unmap(&[(64, 8), (128, 8), (0, 0)]);
        let cdb = |len: usize| [0x42, 0, 0, 0, 0, 0, 0, 0, len as u8, 0];
        assert_eq!(driver.write(0, &cdb(list.len()), &list).status, 0);
        assert!(b.file(0, 64 * 512, 4096) == [0; 4096] && b.file(0, 128 * 512, 4096) == [0; 4096]);
        assert_ne!(b.file(0, 72 * 512, 512), [0; 512]);
        assert_eq!(driver.write(0, &cdb(24), &unmap(&[(2047, 2)])).sense, Some((5, 0x21, 0)));
        assert_eq!(driver.write(0, &cdb(24), &[0; 16]).sense, Some((5, 0x1a, 0)), "less than announced");
        assert_eq!(driver.command(0, &cdb(0), &[]).status, 0);
    }
}

#[test]
fn what_cannot_be_done_has_sense_data() {
    let b = Bench::new(1, &[]);
    let mut driver = b.driver(true);
    let sector = [Buffer::writable(DATA, 512)];
    let mut huge = rw(0x88, 0, 1);
    huge[2..10].fill(0xff);
    let mut protected = rw(0x28, 0, 1);
    protected[1] = 0x20;
    for (cdb, sense) in [
        (rw(0x28, 2048, 1), (5, 0x21, 0)),
        (rw(0x28, 2047, 2), (5, 0x21, 0)),
        (huge, (5, 0x21, 0)),
        (protected, (5, 0x24, 0)),
        (vec![0xff], (5, 0x20, 0)),
        (vec![0x9e, 0x11], (5, 0x20, 0)),
        (vec![0x12, 0, 0x80, 0, 96, 0], (5, 0x24, 0)),
        (vec![0x1a, 0, 0x2a, 0, 96, 0], (5, 0x24, 0)),
    ] {
        let ended = driver.command(0, &cdb, &sector);
        assert_eq!((ended.response, ended.status, ended.sense), (0, CHECK, Some(sense)), "{cdb:x?}");
        assert_eq!((ended.residual, ended.written), (512, 12 + 18));
    }
    assert_eq!(driver.command(0, &rw(0x28, 0, 2), &sector).response, 1, "overrun");
    assert_eq!(driver.command(0, &rw(0x2a, 0, 1), &[]).response, 1);
    // Units and targets that are not there.
    assert_eq!(driver.command(1, &[0; 6], &[]).sense, Some((5, 0x25, 0)));
    assert_eq!(driver.data(9, &[0x12, 0, 0, 0, 36, 0], 36)[0], 0x7f);
    assert_eq!(driver.command_at([1, 1, 0x40, 0, 0, 0, 0, 0], &[0; 6], &[]).response, 3);
    let listed = [0xc1, 1, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        driver.command_at(listed, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16], &[Buffer::writable(DATA, 16)]).written,
        124
    );
    // The host's errors.
    File::options().write(true).open(&b.paths[0]).unwrap().set_len(4096).unwrap();
    let ended = driver.command(0, &rw(0x28, 100, 1), &sector);
    assert!(matches!(ended.sense, Some((3, 0x11, 0) | (5, 0x21, 0) | (6, 0x2a, 9))), "{ended:?}");

    let b = Bench::new(1, &[("pci.0.3.0.ro", "true")]);
    let mut driver = b.driver(true);
    for cdb in [rw(0x2a, 0, 1), rw(0x93, 0, 1), vec![0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]] {
        assert_eq!(driver.write(0, &cdb, &[0; 512]).sense, Some((7, 0x27, 0)));
    }
    assert_eq!(driver.data(0, &[0x1a, 0, 8, 0, 96, 0], 96)[2], 0x90);
}

#[test]
fn malformed_requests_are_given_back() {
    let b = Bench::new(1, &[]);
    let mut driver = b.driver(true);
    driver.requests.push(&[Buffer::readable(REQUEST, 50), Buffer::writable(RESPONSE, 108)]);
    driver.guest.notify(2);
    assert_eq!(driver.requests.wait_used().1, 12);
    assert_eq!(driver.ram.read_u8(RESPONSE + 11).unwrap(), 9);
    for chain in
        [vec![Buffer::readable(REQUEST, 51)], vec![Buffer::readable(REQUEST, 51), Buffer::writable(RESPONSE, 11)]]
    {
        driver.requests.push(&chain);
        driver.guest.notify(2);
        assert_eq!(driver.requests.wait_used().1, 0, "{chain:?}");
    }
}

#[test]
fn task_management() {
    let b = Bench::new(2, &[]);
    let mut driver = b.driver(true);
    let here = layout::address_of(1);
    for (subtype, answer) in [(0, 0), (1, 0), (2, 0), (3, 0), (6, 0), (7, 0), (8, 11)] {
        assert_eq!(driver.manage(0, subtype, here, 77), (1, answer), "function {subtype}");
    }
    assert_eq!(driver.manage(0, 5, layout::address_of(2), 0), (1, 12));
    assert_eq!(driver.manage(0, 5, [9; 8], 0), (1, 3));
    assert_eq!(driver.manage(1, 0, here, 0), (5, 0));
    assert_eq!(driver.manage(9, 0, here, 0), (1, 11));
    assert_eq!(driver.command(1, &[0; 6], &[]).status, 0);
    assert_eq!(driver.manage(0, 5, here, 0), (1, 0));
    assert_eq!(driver.command(0, &[0; 6], &[]).status, 0);
    assert_eq!(driver.command(1, &[0; 6], &[]).sense, Some((6, 0x29, 0)), "the unit was reset");
    assert_eq!(driver.manage(0, 4, here, 0), (1, 0));
    assert_eq!(driver.command(0, &[0; 6], &[]).sense, Some((6, 0x29, 0)), "all were");
    assert_eq!(driver.data(1, &[3, 0, 0, 0, 18, 0], 18)[2], 6, "and this is how to ask for it");
    assert_eq!(driver.command(1, &[0; 6], &[]).status, 0);
}

#[test]
fn a_disk_that_grows_is_told_of() {
    let b = Bench::new(2, &[]);
    let mut driver = b.driver(true);
    assert!(driver.guest.offered() & CHANGE != 0);
    driver.events.push(&[Buffer::writable(DATA, 16)]);
    driver.guest.notify(1);
    File::options().write(true).open(&b.paths[1]).unwrap().set_len(2 * DISK).unwrap();
    assert_eq!(driver.events.wait_used().1, 16);
    let mut event = [0; 16];
    driver.ram.read(DATA, &mut event).unwrap();
    assert_eq!(event, [3, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0x2a, 9, 0, 0]);
    assert_eq!(driver.command(1, &[0; 6], &[]).sense, Some((6, 0x2a, 9)));
    assert_eq!(driver.data(1, &[0x25], 8)[..4], [0, 0, 0x0f, 0xff]);
    // Without a buffer the next event waits.
    File::options().write(true).open(&b.paths[0]).unwrap().set_len(2 * DISK).unwrap();
    while driver.command(0, &[0; 6], &[]).sense.is_none() {
        std::thread::yield_now();
    }
    driver.events.push(&[Buffer::writable(DATA, 16)]);
    driver.guest.notify(1);
    driver.events.wait_used();
    assert_eq!(driver.ram.read_u8(DATA + 7).unwrap(), 0);
}

#[test]
fn options_that_make_no_sense_are_refused_in_one_line() {
    let line = |more: &[(&str, &str)]| {
        let keys = [("pci.0.3.0.device", "virtio-scsi")];
        let line = TestBoard::try_new(&[&keys, more].concat()).err().unwrap().line();
        assert!(!line.contains('\n'));
        line
    };
    assert!(line(&[]).contains("/dev/cam/ctl is FreeBSD's"));
    assert!(line(&[("pci.0.3.0.dev", "/dev/cam/ctl1.2")]).contains("name image files"));
    assert!(line(&[("pci.0.3.0.dev", "/dev/sg999")]).contains("Could not open SCSI device /dev/sg999"));
    assert!(line(&[("pci.0.3.0.dev", "/nowhere")]).contains("Could not open backing file: /nowhere"));
    let b = Bench::new(1, &[]);
    let path = b.paths[0].to_str().unwrap();
    assert!(line(&[("pci.0.3.0.dev", path)]).contains("in use by"));
    drop(b.board);
    assert!(line(&[("pci.0.3.0.dev", path), ("pci.0.3.0.rw", "1")]).contains("Invalid device option \"rw\""));
    assert!(line(&[("pci.0.3.0.dev", path), ("pci.0.3.0.queues", "0")]).contains("1 to 16"));
    assert!(line(&[("pci.0.3.0.dev", path), ("pci.0.3.0.lun.2.path", path)]).contains("lun.1.path is missing"));
}

/// A driver that puts anything on the rings, with buffers for the device to write only in one window of memory.
#[test]
fn hostile_rings_write_only_where_the_driver_allowed() {
    const WINDOW: std::ops::Range<u64> = 0x40000..0x50000;
    const TABLES: std::ops::Range<u64> = 0x80000..RAM;
    let b = Bench::new(2, &[]);
    let function = b.board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    let ram = &b.board.ram;
    let mut random = Random::new(5);
    let opcodes = [
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x25, 0x28, 0x2a, 0x2e, 0x35, 0x41, 0x42, 0x55, 0x5a, 0x88, 0x8a,
        0x91, 0x93, 0x9e, 0xa0, 0xa8, 0xaa, 0xaf,
    ];
    let mut served = 0;
    for round in 0..24 {
        let modern = round % 2 == 1;
        // Requests for both kinds of queues.
        for at in (0x20000..0x30000u64).step_by(64) {
            // A command's unit, or the type and function of task management.
            let any = random.bits() << 16;
            let unit = 1 | random.pick(&[0x40_0000, 0x140_0000, 0x40_0000, 0x240_0000, any]);
            let function = random.below(3) | random.below(9) << 32;
            ram.write_u64(at, if random.one_in(8) { function } else { unit }).unwrap();
            ram.write_u64(at + 8, 1 | u64::from(random.pick(&[0x40u16, 0x140])) << 16).unwrap();
            for word in (16..64).step_by(8) {
                let value = if random.one_in(2) { random.below(4) << random.below(60) } else { random.nasty() };
                ram.write_u64(at + word, value).unwrap();
            }
            ram.write_u8(at + 19, random.pick(&opcodes)).unwrap();
            if random.one_in(2) {
                // A block that is there.
                ram.write(at + 21, &[0, 0, random.below(8) as u8, 0, 0, 0, random.below(4) as u8, 0, 0, 0]).unwrap();
            }
        }
        let outside = [0..RINGS, RINGS + 0x9000..WINDOW.start, WINDOW.end..RAM];
        let snapshot = |range: &std::ops::Range<u64>| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            ram.read(range.start, &mut bytes).unwrap();
            bytes
        };
        for at in TABLES.step_by(16) {
            let window = WINDOW.start + random.below(0xe000);
            let (buffer, flags) = match at / 16 % 4 {
                0 => (Buffer::readable(0x20000 + 64 * random.below(0x3f0), 51), 1),
                1 => (Buffer::readable(window, 512 * random.below(4) as u32), 1),
                2 => (Buffer::writable(window, 108), 1),
                _ => (Buffer::writable(window, random.pick(&[0, 8, 36, 512, 2048])), 0),
            };
            ram.write_u64(at, buffer.address).unwrap();
            ram.write_u32(at + 8, buffer.len).unwrap();
            ram.write_u16(at + 12, flags | u16::from(buffer.device_writes) << 1).unwrap();
            ram.write_u16(at + 14, (at / 16 % 4 + 1) as u16).unwrap();
        }
        let before = outside.each_ref().map(&snapshot);
        for _ in 0..100 {
            let mut guest = b.board.virtio(3, modern);
            guest.negotiate(random.pick(&[0, CHANGE, INDIRECT | CHANGE, INDIRECT | EVENT_IDX]));
            let mut queues = [0, 1, 2].map(|n| guest.open_queue(n, RINGS + 0x3000 * u64::from(n)));
            guest.driver_ok();
            if random.one_in(10) {
                let (at, value) = (random.below(36), random.nasty());
                let bars = (0..3).map(|bar| guest.function().bar(bar)).filter(|bar| bar.start != 0).collect::<Vec<_>>();
                guest.function().write(random.pick(&bars), 0x2000 + at, Dword, value);
            }
            for queue in &mut queues {
                for index in 0..queue.size {
                    let window = WINDOW.start + random.below(0xe000);
                    let place = if random.one_in(200) { random.below(4) as u16 } else { index % 4 };
                    let (mut buffer, mut flags) = match place {
                        0 => (Buffer::readable(0x20000 + 64 * random.below(0x3f0), 51), 1),
                        1 => (Buffer::readable(window, 512 * random.below(4) as u32), 1),
                        2 => (Buffer::writable(window, random.pick(&[108, 108, 108, 12, 5])), 1),
                        _ => (Buffer::writable(window, random.pick(&[0, 8, 36, 512, 2048])), 0),
                    };
                    if place == 0 && random.one_in(4) {
                        (buffer, flags) = (Buffer::readable(TABLES.start + 64 * random.below(0x1f00), 64), 4);
                    }
                    let next = if random.one_in(300) { random.below(100) as u16 } else { index + 1 };
                    queue.write_descriptor(queue.descriptors, index, buffer, flags, next);
                    let head = if random.one_in(400) { random.nasty() as u16 } else { index / 4 * 4 };
                    ram.write_u16(queue.available + 4 + 2 * u64::from(index), head).unwrap();
                }
                let ahead = if random.one_in(20) { random.nasty() as u16 } else { random.below(64) as u16 };
                queue.set_available_index(ahead);
                guest.notify(queue.index);
            }
            // Some are reset while requests are under way, the others when all is done.
            if random.one_in(2) {
                function.save().unwrap();
            }
            served += queues.iter().map(|queue| u64::from(queue.used_index())).sum::<u64>();
            guest.reset();
        }
        for (range, before) in outside.iter().zip(before) {
            assert!(snapshot(range) == before, "round {round}: something was written in {range:x?}");
        }
    }
    assert!(served > 20_000, "hardly a request was good enough to be served: {served}");
    let mut driver = b.driver(true);
    assert_eq!(driver.data(0, &rw(0x28, 0, 1), 512), b.file(0, 0, 512));
    assert_eq!(fs::metadata(&b.paths[0]).unwrap().len(), DISK, "the file keeps its size");
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut driver = Driver::start(make(subject.function(), subject.ram.clone()), subject.ram.clone());
        driver.command(0, &[0; 6], &[]);
        assert_eq!(driver.write(0, &rw(0x2a, 7, 1), &[0x77; 512]).status, 0);
        assert_eq!(driver.data(0, &rw(0x28, 7, 1), 512), [0x77; 512]);
    }
}

#[test]
fn conforms() {
    for modern in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(DISK).unwrap();
        let keys =
            [("pci.0.3.0.device", "virtio-scsi"), ("pci.0.3.0.dev", path.to_str().unwrap()), ("pci.0.3.0.lock", "off")];
        conformance::check(|| TestBoard::new(&keys).subject(3), work(modern));
    }
}

#[test]
fn fuzz() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    for path in [&one, &two] {
        File::create(path).unwrap().set_len(DISK).unwrap();
    }
    let keys = [
        ("pci.0.3.0.device", "virtio-scsi"),
        ("pci.0.3.0.dev", one.to_str().unwrap()),
        ("pci.0.3.0.lun.1.path", two.to_str().unwrap()),
        ("pci.0.3.0.lock", "off"),
    ];
    let make = || TestBoard::new(&keys).subject(3);
    let opcodes = [
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x25, 0x28, 0x2a, 0x2e, 0x35, 0x41, 0x42, 0x55, 0x5a, 0x88, 0x8a,
        0x91, 0x93, 0x9e, 0xa0, 0xa8, 0xaa, 0xaf,
    ];
    let request = move |random: &mut Random, queue: u16| {
        if queue < 2 {
            let mut bytes = (random.below(4) as u32).to_le_bytes().to_vec();
            bytes.extend((random.below(9) as u32).to_le_bytes());
            bytes.extend([1, 0, 0x40, random.below(2) as u8, 0, 0, 0, 0]);
            bytes.extend(random.below(9).to_le_bytes());
            return bytes;
        }
        let mut bytes = vec![1, 0, 0x40, random.below(8) as u8 / 7, 0, 0, 0, 0];
        bytes.extend(random.below(9).to_le_bytes());
        bytes.extend([0; 3]);
        bytes.push(random.pick(&opcodes));
        bytes.resize(51, 0);
        for byte in &mut bytes[20..] {
            if random.one_in(4) {
                *byte = random.bits() as u8;
            }
        }
        bytes.resize(51 + random.pick(&[0, 0, 24, 512, 2048]), 7);
        bytes
    };
    Hostile { make, work: work(true), request }.check();
}
