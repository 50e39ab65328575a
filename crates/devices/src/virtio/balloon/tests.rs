use platform::AccessSize::Dword;
use testkit::conformance::{self, Subject};
use testkit::hostile::Hostile;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const NUMBERS: u64 = 0x20000;

fn board() -> TestBoard {
    TestBoard::new(&[("pci.0.5.0.device", "virtio-balloon"), ("pci.0.5.0.size", "64K")])
}

fn start(mut guest: VirtioGuest) -> (VirtioGuest, Vec<GuestQueue>) {
    guest.negotiate(1 << 5);
    let queues = (0..3).map(|n| guest.open_queue(n, RINGS + 0x4000 * u64::from(n))).collect();
    guest.driver_ok();
    (guest, queues)
}

#[test]
fn pages_given_up_or_reported_are_zeroes_afterwards() {
    let board = board();
    assert_eq!(board.guest(5, 0).config32(0), 0x1002_1af4);
    let (guest, mut queues) = start(board.virtio(5, true));
    assert_eq!(guest.device_config(0, Dword, false), 16);
    board.ram.fill(0x80000, 0x10000, 0xaa).unwrap();
    // Pages 0x80 and 0x82, one that is no RAM, and half a number.
    for (at, number) in [(0, 0x82), (4, 0x80), (8, 0xffff_ffff), (12, 0x81_0000)] {
        board.ram.write_u32(NUMBERS + at, number).unwrap();
    }
    queues[0].push(&[Buffer::readable(NUMBERS, 18)]);
    guest.notify(0);
    queues[0].wait_used();
    let first = |page: u64| board.ram.read_u8(page << 12).unwrap();
    assert_eq!([first(0x80), first(0x81), first(0x82), first(0x83)], [0, 0xaa, 0, 0xaa]);
    // A report names ranges; only whole pages of them go.
    queues[2].push(&[Buffer::writable(0x85800, 0x2000), Buffer::writable(0x8a000, 0x1000)]);
    guest.notify(2);
    queues[2].wait_used();
    let at = |gpa: u64| board.ram.read_u8(gpa).unwrap();
    assert_eq!([at(0x85fff), at(0x86000), at(0x86fff), at(0x87000), at(0x8a000)], [0xaa, 0, 0, 0xaa, 0]);
    queues[1].push(&[Buffer::readable(NUMBERS, 4)]);
    guest.notify(1);
    queues[1].wait_used();
}

#[test]
fn a_balloon_as_large_as_memory_is_refused() {
    let error = TestBoard::try_new(&[("pci.0.5.0.device", "virtio-balloon"), ("pci.0.5.0.size", "1M")]).err().unwrap();
    assert!(error.line().contains("leaves nothing"), "{}", error.line());
}

/// Sends a line to the balloon's socket and reads the answer.
fn talk(stream: &mut std::os::unix::net::UnixStream, line: &str) -> String {
    use std::io::{BufRead, BufReader, Write};
    writeln!(stream, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

#[test]
fn programs_of_the_host_change_its_size_and_get_statistics() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control").display().to_string();
    let keys = [("pci.0.5.0.device", "virtio-balloon"), ("pci.0.5.0.control", path.as_str())];
    let board = TestBoard::new(&keys);
    let mut guest = board.virtio(5, true);
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    assert_eq!(talk(&mut stream, "stats"), "wanted=0 actual=0");
    guest.negotiate(1 << 5 | 1 << 1);
    let mut queues: Vec<_> = (0..4).map(|n| guest.open_queue(n, RINGS + 0x4000 * u64::from(n))).collect();
    guest.driver_ok();
    assert_eq!(talk(&mut stream, "size 64K"), "OK");
    assert_eq!(guest.device_config(0, Dword, false), 16);
    for (line, why) in [("size 1M", "leaves nothing"), ("size x", "x"), ("size", "say"), ("stat", "say")] {
        let answer = talk(&mut stream, line);
        assert!(answer.starts_with("ERROR ") && answer.contains(why), "{line}: {answer}");
    }
    assert!(talk(&mut stream, &"x".repeat(1000)).contains("too long"));
    // The driver's first statistics, and fresh ones when it gets the buffer back. One of the tags is unknown.
    let statistics = |free: u64| {
        for (at, (tag, value)) in [(4u16, free), (5, 1 << 20), (99, 1)].into_iter().enumerate() {
            let gpa = NUMBERS + 10 * at as u64;
            board.ram.write_u16(gpa, tag).unwrap();
            board.ram.write_u64(gpa + 2, value).unwrap();
        }
    };
    statistics(1000);
    queues[2].push(&[Buffer::readable(NUMBERS, 30)]);
    guest.notify(2);
    let asking = std::thread::spawn(move || talk(&mut stream, "stats"));
    queues[2].wait_used();
    statistics(2000);
    queues[2].push(&[Buffer::readable(NUMBERS, 30)]);
    guest.notify(2);
    assert_eq!(asking.join().unwrap(), "wanted=65536 actual=0 free=2000 total=1048576");
    // With statistics the reports come after them.
    board.ram.fill(0x80000, 0x1000, 0xaa).unwrap();
    queues[3].push(&[Buffer::writable(0x80000, 0x1000)]);
    guest.notify(3);
    queues[3].wait_used();
    assert_eq!(board.ram.read_u8(0x80000).unwrap(), 0);
}

/// Brings the device into use and checks that it works.
fn work(modern: bool) -> impl Fn(&Subject) {
    move |subject: &Subject| {
        subject.function().set_command(7);
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        let (guest, mut queues) = start(make(subject.function(), subject.ram.clone()));
        queues[0].push(&[Buffer::readable(NUMBERS, 4)]);
        guest.notify(0);
        queues[0].wait_used();
    }
}

#[test]
fn conforms() {
    conformance::check(|| board().subject(5), work(false));
    conformance::check(|| board().subject(5), work(true));
}

#[test]
fn fuzz() {
    let make = || board().subject(5);
    let request = |random: &mut Random, _: u16| {
        // Pages of what is not rings, of no RAM at all, and sometimes of anything.
        (0..random.below(20))
            .flat_map(|_| {
                let page = if random.one_in(20) { random.nasty() } else { 0xa0 + random.below(0x80) };
                (page as u32).to_le_bytes()
            })
            .collect()
    };
    Hostile { make, work: work(true), request }.check();
}

#[test]
fn hostile_numbers_do_no_harm() {
    let board = board();
    let mut random = Random::new(3);
    let (mut guest, mut queues) = start(board.virtio(5, true));
    for round in 0..20_000u32 {
        // The rings stay, everything else may go.
        for slot in 0..8 {
            let page = if random.one_in(2) { 0x40 + random.below(0xc0) } else { random.nasty() | 0x40 };
            board.ram.write_u32(0x30000 + slot * 4, page as u32).unwrap();
        }
        let queue = (round % 3) as u16;
        let buffer = if queue == 2 {
            Buffer::writable(0x40000 + random.below(0x80000), random.below(0x20000) as u32)
        } else {
            Buffer::readable(0x30000, random.below(40) as u32)
        };
        queues[usize::from(queue)].push(&[buffer]);
        guest.notify(queue);
        queues[usize::from(queue)].wait_used();
    }
    guest.reset();
    start(board.virtio(5, true));
}
