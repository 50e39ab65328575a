use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const REQUEST: u64 = 0x40000;
const ANSWER: u64 = 0x50000;

fn board(dir: &tempfile::TempDir) -> TestBoard {
    let path = dir.path().to_str().unwrap();
    TestBoard::new(&[("pci.0.5.0.device", "virtio-9p"), ("pci.0.5.0.sharename", "tag"), ("pci.0.5.0.path", path)])
}

/// A message that asks for the version.
const VERSION: &[u8] = b"\x15\0\0\0\x64\xff\xff\0\x20\0\0\x08\09P2000.L";
/// One that attaches fid 1.
const ATTACH: &[u8] = b"\x17\0\0\0\x68\x01\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0";

fn ask(ram: &memory::GuestMemory, guest: &VirtioGuest, queue: &mut GuestQueue, message: &[u8]) -> Vec<u8> {
    ram.write(REQUEST, message).unwrap();
    // In pieces, as scatter lists are.
    let half = message.len() as u32 / 2;
    queue.push(&[
        Buffer::readable(REQUEST, half),
        Buffer::readable(REQUEST + u64::from(half), message.len() as u32 - half),
        Buffer::writable(ANSWER, 9),
        Buffer::writable(ANSWER + 9, 4096),
    ]);
    guest.notify(0);
    let (_, len) = queue.wait_used();
    let mut answer = vec![0; len as usize];
    ram.read(ANSWER, &mut answer).unwrap();
    answer
}

fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut guest = make(subject.function(), subject.ram.clone());
        guest.negotiate(u64::MAX);
        let mut queue = guest.open_queue(0, RINGS);
        assert_eq!(queue.size, 256);
        guest.driver_ok();
        let answer = ask(&subject.ram, &guest, &mut queue, VERSION);
        assert_eq!(answer[4..], *b"\x65\xff\xff\0\x20\0\0\x08\09P2000.L");
        let answer = ask(&subject.ram, &guest, &mut queue, ATTACH);
        assert_eq!((answer[4], answer.len()), (0x69, 20));
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
        // The kinds of 9P2000.L, with plausible and implausible bodies.
        let kind = random.pick(&[8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 32, 40, 50, 52, 54, 70, 72, 74, 76, 100, 102]);
        let any = random.bits() as u8;
        let kind = random.pick(&[kind, kind, kind, 104, 108, 110, 110, 116, 118, 120, 122, any]);
        let mut body = match kind {
            100 => VERSION[7..].to_vec(),
            104 => ATTACH[7..].to_vec(),
            110 => vec![1, 0, 0, 0, random.below(4) as u8, 0, 0, 0, 1, 0, 1, 0, random.pick(b"a./b")],
            _ => vec![random.below(4) as u8, 0, 0, 0],
        };
        for _ in 0..random.below(24) {
            let byte = random.pick(&[0, 0, 0, 1, 2, b'a', b'.', b'/', 0xff]);
            body.push(byte);
        }
        let len = if random.one_in(20) { random.nasty() as u32 } else { body.len() as u32 + 7 };
        [&len.to_le_bytes()[..], &[kind, random.bits() as u8, 0], &body].concat()
    };
    Hostile { make: subject, work: work(true), request }.check();
}

#[test]
fn tells_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    assert_eq!(board.guest(5, 0).config32(0), 0x1009_1af4);
    for modern in [false, true] {
        let guest = board.virtio(5, modern);
        assert_eq!(guest.offered() & 1, 1);
        let bytes: Vec<_> = (0..5).map(|at| guest.device_config(at, platform::AccessSize::Byte, false) as u8).collect();
        assert_eq!(bytes, b"\x03\0tag");
    }
}

#[test]
fn bad_options_are_told() {
    let line = |keys: &[(&str, &str)]| {
        let keys: Vec<_> = [("pci.0.5.0.device", "virtio-9p")].into_iter().chain(keys.iter().copied()).collect();
        TestBoard::try_new(&keys).err().unwrap().line()
    };
    assert_eq!(line(&[]), "virtio-9p: share name required");
    assert_eq!(line(&[("pci.0.5.0.sharename", "x")]), "virtio-9p: path of the share required");
    let long = "x".repeat(257);
    assert!(line(&[("pci.0.5.0.sharename", &long), ("pci.0.5.0.path", "/")]).contains("1 to 256 bytes"));
    let missing = line(&[("pci.0.5.0.sharename", "x"), ("pci.0.5.0.path", "/no/such/folder")]);
    assert!(missing.starts_with("cannot open the folder to share /no/such/folder: No such file"), "{missing}");
}

#[test]
fn a_chain_without_room_or_message_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let board = board(&dir);
    let mut guest = board.virtio(5, true);
    guest.negotiate(0);
    let mut queue = guest.open_queue(0, RINGS);
    guest.driver_ok();
    board.ram.write(REQUEST, VERSION).unwrap();
    queue.push(&[Buffer::readable(REQUEST, VERSION.len() as u32), Buffer::writable(ANSWER, 8)]);
    guest.notify(0);
    assert_eq!(queue.wait_used().1, 0);
    queue.push(&[Buffer::writable(ANSWER, 64)]);
    guest.notify(0);
    assert_eq!(queue.wait_used().1, 11, "an error");
}
