//! The NIC with a switch that the test plays: it knows the protocol, and lets the packets lie.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;

use platform::AccessSize::Byte;
use testkit::conformance::{self, Subject};
use testkit::irq::PATIENCE;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue, VirtioGuest};

use super::*;
use crate::testboard::TestBoard;

const RINGS: u64 = 0x10000;
const COMMAND: u64 = 0x40000;

const GET_FEATURES: u32 = 1;
const GET_BASE: u32 = 11;
const GET_PROTOCOL: u32 = 15;
const QUEUE_NUM: u32 = 17;
const ENABLE: u32 = 18;
const NEED_REPLY: u32 = 8;

type Requests = Arc<Mutex<Vec<(u32, [u32; 2])>>>;

/// A switch; goes with the connection.
struct Switch {
    folder: tempfile::TempDir,
    requests: Requests,
    connection: Arc<Mutex<Option<UnixStream>>>,
}

impl Switch {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let (requests, connection): (Requests, Arc<Mutex<Option<UnixStream>>>) = Default::default();
        let (told, known) = (requests.clone(), connection.clone());
        std::thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            *known.lock().unwrap() = Some(stream.try_clone().unwrap());
            answer(stream, &told);
        });
        Self { folder, requests, connection }
    }

    fn board(&self, queues: &str) -> Result<TestBoard, DeviceError> {
        let backend = format!("vhost-user:{}", self.folder.path().join("s").display());
        let keys = [("device", "virtio-net"), ("backend", &backend), ("queues", queues), ("mac", "2:0:0:0:0:1")];
        let keys = keys.map(|(key, value)| (format!("pci.0.5.0.{key}"), value));
        TestBoard::try_new(&keys.each_ref().map(|(key, value)| (key.as_str(), *value)))
    }

    /// The requests of a kind so far, with the first two words of each.
    fn asked(&self, kind: u32) -> Vec<[u32; 2]> {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|request| request.0 == kind).map(|request| request.1).collect()
    }
}

fn answer(mut stream: UnixStream, requests: &Requests) {
    let mut header = [0u8; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |bytes: &[u8], at: usize| {
            bytes.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap()))
        };
        let (kind, flags) = (word(&header, 0), word(&header, 4));
        let mut body = vec![0; word(&header, 8) as usize];
        stream.read_exact(&mut body).unwrap();
        requests.lock().unwrap().push((kind, [word(&body, 0), word(&body, 4)]));
        let answer = match kind {
            GET_FEATURES => !bit::GUEST_UFO,
            GET_PROTOCOL => 9,
            QUEUE_NUM => 2,
            GET_BASE => u64::from(word(&body, 0)),
            _ if flags & NEED_REPLY != 0 => 0,
            _ => continue,
        };
        let header = [kind, 5, 8].map(u32::to_ne_bytes).concat();
        // The NIC may be gone by now.
        let _ = stream.write_all(&[&header[..], &answer.to_ne_bytes()].concat());
    }
}

/// A driver with two pairs of queues.
fn start(mut guest: VirtioGuest) -> (VirtioGuest, Vec<GuestQueue>) {
    guest.negotiate(!feature::EVENT_IDX);
    let queues = (0..5).map(|n| guest.open_queue(n, RINGS + 0x8000 * u64::from(n))).collect();
    guest.driver_ok();
    (guest, queues)
}

fn wait_until(condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it does not come true");
        std::thread::yield_now();
    }
}

#[test]
fn the_switch_gets_the_queues_and_the_pairs_in_use() {
    let switch = Switch::new();
    let board = switch.board("2").unwrap();
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
    let (guest, mut queues) = start(guest);
    assert_eq!(guest.device_config(6, Byte, false), 1, "the link");
    assert!(switch.asked(ENABLE).is_empty(), "nobody has rung yet");
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
    switch.connection.lock().unwrap().take().unwrap().shutdown(std::net::Shutdown::Both).unwrap();
    wait_until(|| guest.device_config(6, Byte, false) == 0);
}

#[test]
fn a_switch_with_fewer_queues_is_told() {
    let error = Switch::new().board("3").err().unwrap().line();
    assert!(error.contains("serves no more than 2 pairs"), "{error}");
}

#[test]
fn hostile_drivers_do_no_harm() {
    let switch = Switch::new();
    let subject = switch.board("2").unwrap().subject(5);
    let mut random = Random::new(7);
    let work = |subject: &Subject| {
        subject.function().set_command(7);
        let (guest, mut queues) = start(VirtioGuest::modern(subject.function(), subject.ram.clone()));
        subject.ram.write(COMMAND, &[4, 0, 2, 0]).unwrap();
        queues[4].push(&[Buffer::readable(COMMAND, 4), Buffer::writable(COMMAND + 8, 1)]);
        guest.notify(0);
        guest.notify(4);
        queues[4].wait_used();
    };
    for _ in 0..500 {
        if random.one_in(2) {
            work(&subject);
        }
        conformance::scribble(&subject, &mut random, 200);
        subject.state.reset();
    }
    work(&subject);
}
