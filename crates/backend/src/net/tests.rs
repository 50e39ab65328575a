//! Cables with two ends: sockets between VMs, and the switch.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use config::pci::PciAddress;
use config::{Config, NoWarnings};
use memory::{GuestMemory, MemoryOptions};
use platform::GuestRange;

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// A NIC that keeps what arrives.
#[derive(Default)]
struct Nic {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    arrived: Vec<(PacketHeader, Vec<u8>)>,
    full: bool,
    ready: u32,
    link: Vec<bool>,
}

impl NetDevice for Nic {
    fn receive(&self, _: u16, packet: &Packet<'_>) -> Delivery {
        let mut state = self.state.lock().unwrap();
        if state.full {
            return Delivery::NoRoom;
        }
        state.arrived.push((packet.header, packet.pieces.concat()));
        self.news.notify_all();
        Delivery::Done
    }

    fn send_ready(&self, _: u16) {
        self.state.lock().unwrap().ready += 1;
        self.news.notify_all();
    }

    fn set_link(&self, up: bool) {
        self.state.lock().unwrap().link.push(up);
        self.news.notify_all();
    }
}

impl Nic {
    fn wait<T>(&self, what: &str, mut done: impl FnMut(&mut State) -> Option<T>) -> T {
        let start = Instant::now();
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(result) = done(&mut state) {
                return result;
            }
            assert!(start.elapsed() < PATIENCE, "{what} never came");
            state = self.news.wait_timeout(state, Duration::from_millis(100)).unwrap().0;
        }
    }

    fn packet(&self) -> (PacketHeader, Vec<u8>) {
        self.wait("a packet", |state| (!state.arrived.is_empty()).then(|| state.arrived.remove(0)))
    }
}

struct End {
    backend: Arc<dyn NetBackend>,
    nic: Arc<Nic>,
    memory: GuestMemory,
}

impl End {
    fn try_open(backend: &str, more: &[(&str, &str)]) -> Result<Self, NetError> {
        let mut config = Config::new(NoWarnings);
        config.set("pci.0.5.0.device", "virtio-net").unwrap();
        config.set("pci.0.5.0.backend", backend).unwrap();
        for (key, value) in more {
            config.set(&format!("pci.0.5.0.{key}"), *value).unwrap();
        }
        let address = PciAddress::new(0, 5, 0).unwrap();
        let options = NicOptions::from_node(&config, &config.node("pci.0.5.0").unwrap(), address, &[])?;
        let backend = open(&options)?.expect("there is a network");
        let nic = Arc::new(Nic::default());
        let device: Arc<dyn NetDevice> = nic.clone();
        backend.attach(Arc::downgrade(&device));
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, ..Default::default() }).unwrap();
        Ok(Self { backend, nic, memory })
    }

    fn open(backend: &str, more: &[(&str, &str)]) -> Self {
        Self::try_open(backend, more).unwrap_or_else(|why| panic!("{backend}: {why}"))
    }

    fn send_with(&self, header: PacketHeader, bytes: &[u8]) -> Sending {
        self.memory.write(0, bytes).unwrap();
        let half = bytes.len() as u64 / 2;
        let ranges = [GuestRange::new(0, half), GuestRange::new(half, bytes.len() as u64 - half)];
        self.backend.send(0, &Frame::new(&self.memory, &ranges, header).unwrap())
    }

    fn send(&self, bytes: &[u8]) {
        assert_eq!(self.send_with(PacketHeader::default(), bytes), Sending::Taken);
    }
}

/// A packet of `len` bytes between two addresses 02:00:00:00:00:xx; `0xff` means all.
fn packet(to: u8, from: u8, len: usize) -> Vec<u8> {
    let to = if to == 0xff { [0xff; 6] } else { [2, 0, 0, 0, 0, to] };
    let mut bytes = [&to[..], &[2, 0, 0, 0, 0, from, 0x88, 0xb5]].concat();
    bytes.extend((14..len).map(|at| (at * 7) as u8));
    bytes
}

fn line(result: Result<End, NetError>) -> String {
    let why = result.err().expect("it must not open");
    let mut line = why.to_string();
    if let Some(cause) = std::error::Error::source(&why) {
        line += &format!(": {cause}");
    }
    line
}

#[test]
fn two_ends_of_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("unix:{}", folder.path().join("cable").display());
    assert!(line(End::try_open(&name, &[])).contains("cannot connect to"), "nobody listens");
    assert!(line(End::try_open("unix:", &[])).contains("name the socket"));
    let first = End::open(&name, &[("listen", "true")]);
    assert!(!first.backend.link() && first.backend.abilities() == Abilities::default());
    first.send(&packet(1, 2, 60));
    let second = End::open(&name, &[]);
    assert!(second.backend.link());
    first.nic.wait("the link", |state| state.link.contains(&true).then_some(()));
    for len in [14, 60, 1514, MAX_PACKET] {
        first.send(&packet(1, 2, len));
        assert!(second.nic.packet().1 == packet(1, 2, len), "{len} bytes");
        second.send(&packet(2, 1, len));
        assert!(first.nic.packet().1 == packet(2, 1, len), "{len} bytes");
    }
    assert!(line(End::try_open(&name, &[("listen", "true")])).contains("cannot listen on"), "somebody does");
    drop(second);
    first.nic.wait("the loss of the link", |state| (state.link.last() == Some(&false)).then_some(()));
    let second = End::open(&name, &[]);
    first.nic.wait("the link", |state| (state.link.last() == Some(&true)).then_some(()));
    drop(first);
    second.nic.wait("the loss of the link", |state| (state.link.last() == Some(&false)).then_some(()));
    let first = End::open(&name, &[("listen", "true")]);
    second.nic.wait("the link", |state| (state.link.last() == Some(&true)).then_some(()));
    first.nic.wait("the link", |state| state.link.contains(&true).then_some(()));
    first.send(&packet(1, 2, 60));
    assert_eq!(second.nic.packet().1.len(), 60);
}

#[test]
fn a_unix_socket_keeps_the_order_when_the_receiver_has_no_room() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("unix:{}", folder.path().join("cable").display());
    let receiver = End::open(&name, &[("listen", "true")]);
    let sender = End::open(&name, &[]);
    receiver.nic.wait("the link", |state| state.link.contains(&true).then_some(()));
    receiver.nic.state.lock().unwrap().full = true;
    let mut sent = 0;
    let number = |n: u32| [&packet(1, 2, 14)[..], &n.to_be_bytes(), &[7; 30_000]].concat();
    // Until nothing more fits between the two.
    while sender.send_with(PacketHeader::default(), &number(sent)) == Sending::Taken {
        sent += 1;
        assert!(sent < 10_000, "it swallows everything");
    }
    let ready = sender.nic.state.lock().unwrap().ready;
    receiver.nic.state.lock().unwrap().full = false;
    receiver.backend.resume(0);
    sender.nic.wait("leave to send", |state| (state.ready > ready).then_some(()));
    while sender.send_with(PacketHeader::default(), &number(sent)) == Sending::Busy {
        std::thread::yield_now();
    }
    for n in 0..=sent {
        assert!(receiver.nic.packet().1 == number(n), "packet {n}");
    }
}

#[test]
fn a_peer_that_sends_nonsense_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cable");
    let end = End::open(&format!("unix:{}", path.display()), &[("listen", "true")]);
    for (bytes, whole) in [(&[0, 0, 0, 15][..], false), (&[0xff; 20], true), (&[0, 1, 0, 0x20, 1], true)] {
        let mut peer = UnixStream::connect(&path).unwrap();
        peer.write_all(bytes).unwrap();
        if whole {
            assert_eq!(peer.read(&mut [0; 8]).unwrap_or(0), 0, "{bytes:?}");
        }
    }
    let mut peer = UnixStream::connect(&path).unwrap();
    peer.write_all(&[0, 0, 0, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 14]).unwrap();
    peer.write_all(&packet(1, 2, 14)).unwrap();
    assert_eq!(end.nic.packet().1, [1, 2]);
    assert!(end.nic.packet().1.is_empty());
    assert_eq!(end.nic.packet().1, packet(1, 2, 14));
}

#[test]
fn a_switch_learns_where_addresses_are() {
    let name = |port: &str| format!("vale-test-{}:{port}", std::process::id());
    let ends = ["a", "b", "c"].map(|port| End::open(&name(port), &[]));
    let [a, b, c] = &ends;
    a.send(&packet(0xff, 1, 60));
    assert_eq!((b.nic.packet().1, c.nic.packet().1), (packet(0xff, 1, 60), packet(0xff, 1, 60)));
    b.send(&packet(1, 2, 1000));
    assert_eq!(a.nic.packet().1, packet(1, 2, 1000));
    a.send(&packet(2, 1, 9000));
    assert!(b.nic.packet().1 == packet(2, 1, 9000));
    a.send(&packet(9, 1, 70));
    assert_eq!((b.nic.packet().1.len(), c.nic.packet().1.len()), (70, 70), "an unknown address is everywhere");
    assert!(c.nic.state.lock().unwrap().arrived.is_empty(), "what has one receiver goes nowhere else");
    assert!(a.nic.state.lock().unwrap().arrived.is_empty(), "nothing comes back");

    assert!(line(End::try_open(&name("b"), &[])).contains("another VM is plugged in there"));
    for bad in ["vale0", "vale0:", "vale/../x:a", "vale0:a/b", "vale0:..", &format!("vale0:{}", "x".repeat(40))] {
        assert!(line(End::try_open(bad, &[])).contains("write valeX:PORT"), "{bad}");
    }
}

#[test]
fn a_switch_does_work_that_the_receiver_does_not_take() {
    let name = |port: &str| format!("vale-work-{}:{port}", std::process::id());
    let (a, b) = (End::open(&name("a"), &[]), End::open(&name("b"), &[]));
    let ends = [std::net::IpAddr::from([10, 0, 0, 1]), std::net::IpAddr::from([10, 0, 0, 2])];
    let mut headers = wire::Headers::ip(([0xff; 6], [2, 0, 0, 0, 0, 1]), ends[0], ends[1], wire::TCP, 10_020, None);
    headers.push(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 9, 0x50, 16, 1, 0, 0, 0, 0, 0]);
    let whole = [headers.bytes(), &[5; 10_000]].concat();
    let header = PacketHeader {
        flags: PacketHeader::NEEDS_CHECKSUM,
        gso_type: PacketHeader::GSO_TCP4,
        header_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
    };
    assert_eq!(a.send_with(header, &whole), Sending::Taken);
    for _ in 0..10 {
        let (header, segment) = b.nic.packet();
        assert!(header.is_plain() && segment.len() == 1054);
    }
    b.backend.set_offloads(Offloads::all());
    assert_eq!(a.send_with(header, &whole), Sending::Taken);
    assert_eq!(b.nic.packet(), (header, whole));
}

#[test]
fn tap_devices_that_cannot_be_had() {
    assert!(line(End::try_open("tap-with-a-long-name", &[])).contains("at most 15 characters"));
    // The loopback device is there, and no tap device. Without rights it is the rights that are missing.
    let text = line(End::try_open("lo", &[("type", "tap")]));
    assert!(text.starts_with("cannot open"), "{text}");
}
