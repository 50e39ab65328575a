//! The guest's side is played by the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);
const GUEST: u64 = 7;

struct Bench {
    bridge: Bridge,
    ready: Receiver<()>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (sender, ready) = channel();
        let tell = move || {
            let _ = sender.send(());
        };
        let bridge = Bridge::open(GUEST, &dir.path().join("s"), "vsock", tell).unwrap();
        Self { bridge, ready, dir }
    }

    fn send(&self, host: u32, guest: u32, op: u16, flags: u32, payload: &[u8]) {
        self.send_with(host, guest, op, flags, payload, (1 << 20, 0));
    }

    fn send_with(&self, host: u32, guest: u32, op: u16, flags: u32, payload: &[u8], (room, passed_on): (u32, u32)) {
        let header = Header {
            source_cid: GUEST,
            target_cid: HOST_CID,
            source_port: guest,
            target_port: host,
            len: payload.len() as u32,
            kind: STREAM,
            op,
            flags,
            room,
            passed_on,
        };
        self.bridge.receive(&Header::parse(&header.bytes()), payload);
    }

    fn next(&self) -> (Header, Vec<u8>) {
        self.next_of(4096)
    }

    fn next_of(&self, room: usize) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.bridge.next(room) {
                return packet;
            }
            assert!(start.elapsed() < PATIENCE, "no packet");
            let _ = self.ready.recv_timeout(Duration::from_millis(100));
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection that a program of the host asked for: its end, and its ports.
    fn opened(&self) -> (UnixStream, u32, u32) {
        let mut stream = self.connect();
        stream.write_all(b"CONNECT 52\n").unwrap();
        let (header, _) = self.next();
        assert_eq!((header.op, header.target_port, header.target_cid), (op::REQUEST, 52, GUEST));
        self.send(header.source_port, 52, op::RESPONSE, 0, b"");
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", header.source_port));
        (stream, header.source_port, 52)
    }
}

#[test]
fn the_host_connects_to_the_guest() {
    let b = Bench::new();
    let (mut stream, host, guest) = b.opened();
    stream.write_all(b"question").unwrap();
    let (header, bytes) = b.next();
    assert_eq!((header.op, header.len, &bytes[..]), (op::RW, 8, &b"question"[..]));
    b.send(host, guest, op::RW, 0, b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    // The guest sends no more, and hears the rest.
    b.send(host, guest, op::SHUTDOWN, shut::SEND, b"");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    stream.write_all(b"rest").unwrap();
    assert_eq!(b.next().1, b"rest");
    drop(stream);
    let (header, _) = b.next();
    assert_eq!(header.op, op::SHUTDOWN);
    b.send(host, guest, op::RST, 0, b"");
    b.send(host, guest, op::RW, 0, b"late");
    let mut last = b.next().0;
    while last.op == op::SHUTDOWN {
        last = b.next().0;
    }
    assert_eq!(last.op, op::RST, "no such connection any more");
}

#[test]
fn the_guest_connects_to_the_host() {
    let b = Bench::new();
    b.send(99, 1000, op::REQUEST, 0, b"");
    assert_eq!(b.next().0.op, op::RST, "nobody listens");
    let listener = UnixListener::bind(b.dir.path().join("s_99")).unwrap();
    b.send(99, 1000, op::REQUEST, 0, b"");
    assert_eq!(b.next().0.op, op::RESPONSE);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    b.send(99, 1000, op::RW, 0, b"hello");
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    b.send(99, 1000, op::SHUTDOWN, shut::BOTH, b"");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(b.next().0.op, op::RST);
}

#[test]
fn neither_side_is_sent_more_than_it_has_room_for() {
    let b = Bench::new();
    let (mut stream, host, guest) = b.opened();
    // The guest has room for 10 bytes, and then for 10 more.
    b.send_with(host, guest, op::CREDIT_UPDATE, 0, b"", (10, 0));
    stream.write_all(&[1; 100]).unwrap();
    assert_eq!(b.next_of(6).1.len(), 6, "as much as fits into the guest's buffer");
    assert_eq!(b.next_of(6).1.len(), 4);
    assert!(b.bridge.next(100).is_none());
    b.send_with(host, guest, op::CREDIT_UPDATE, 0, b"", (10, 10));
    assert_eq!(b.next().1.len(), 10);
    // The host's program does not read: at some point there is no more room, and a guest that goes on is cut off.
    let mut sent = 0u32;
    let told = loop {
        b.send_with(host, guest, op::RW, 0, &[2; 4096], (10, 20));
        sent += 4096;
        match b.bridge.next(4096) {
            Some((header, _)) if header.op == op::RST => break sent,
            _ => assert!(sent < 64 << 20, "no end to the room"),
        }
    };
    assert!(told > ROOM);
}

#[test]
fn a_program_that_takes_its_time_gets_everything() {
    let b = Bench::new();
    let (mut stream, host, guest) = b.opened();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    // A well-behaved guest: it never has more on the way than there is room for.
    let (mut sent, mut passed_on) = (0u32, 0u32);
    while sent < 4 << 20 {
        while sent.wrapping_sub(passed_on) + 4096 > ROOM {
            b.send(host, guest, op::CREDIT_REQUEST, 0, b"");
            passed_on = b.next().0.passed_on;
        }
        b.send(host, guest, op::RW, 0, &[(sent >> 12) as u8; 4096]);
        sent += 4096;
    }
    b.send(host, guest, op::SHUTDOWN, shut::BOTH, b"");
    let all = reader.join().unwrap();
    assert_eq!(all.len(), 4 << 20);
    assert!(all.chunks(4096).enumerate().all(|(n, chunk)| chunk.iter().all(|byte| *byte == n as u8)));
}

#[test]
fn nonsense_is_answered_with_a_reset() {
    let b = Bench::new();
    for line in ["CONNECT x\n", "HELLO\n", "CONNECT 4294967296\n", &"x".repeat(100)] {
        let mut stream = b.connect();
        stream.write_all(line.as_bytes()).unwrap();
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "{line:?}");
    }
    b.send(5, 6, op::RW, 0, b"x");
    assert_eq!(b.next().0.op, op::RST);
    let stranger = Header { source_cid: 99, target_cid: HOST_CID, kind: STREAM, op: op::REQUEST, ..Header::default() };
    b.bridge.receive(&stranger, b"");
    assert_eq!(b.next().0.op, op::RST);
}

#[test]
fn hostile_packets_do_no_harm() {
    let b = Bench::new();
    let _listener = UnixListener::bind(b.dir.path().join("s_1")).unwrap();
    let mut random = 88172645463325252u64;
    let mut below = |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    for round in 0..120_000u32 {
        let payload = vec![0; if below(8) == 0 { below(5000) as usize } else { 0 }];
        let credit = if below(2) == 0 { (below(1 << 32) as u32, below(1 << 32) as u32) } else { (1 << 20, 0) };
        let op = if below(20) == 0 { below(1 << 16) as u16 } else { below(9) as u16 };
        b.send_with(below(3) as u32, below(50) as u32, op, below(8) as u32, &payload, credit);
        if below(4) == 0 {
            let room = below(5000) as usize;
            if let Some((header, payload)) = b.bridge.next(room) {
                assert!(payload.len() <= room && header.len as usize == payload.len());
            }
        }
        if round % 1000 == 999 {
            let state = b.bridge.shared.state();
            assert!(state.outbox.len() <= MAX_PACKETS && state.connections.len() <= MAX_CONNECTIONS);
        }
    }
    b.bridge.reset();
    while b.bridge.next(0).is_some() {}
    b.opened();
}
