//! User-mode networking as a guest sees it. The guest's side is another TCP/IP stack, so that both can be wrong only
//! where they agree with the other by chance.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Condvar;
use std::time::Duration;

use memory::{GuestMemory, MemoryOptions};
use platform::GuestRange;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::time::Instant as Time;
use smoltcp::wire::{EthernetAddress, HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv6Address};

use super::super::{Delivery, Packet, PacketHeader};
use super::config::parse_forwards;
use super::link::HOST_MAC;
use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's NIC: what arrived, and how much more it takes.
#[derive(Default)]
struct Nic {
    arrived: Mutex<VecDeque<(PacketHeader, Vec<u8>)>>,
    news: Condvar,
    /// Packets held at once, if limited.
    limit: Option<usize>,
}

impl NetDevice for Nic {
    fn receive(&self, _: u16, packet: &Packet<'_>) -> Delivery {
        let mut arrived = self.arrived.lock().unwrap();
        if self.limit.is_some_and(|limit| arrived.len() >= limit) {
            return Delivery::NoRoom;
        }
        arrived.push_back((packet.header, packet.pieces.concat()));
        self.news.notify_all();
        Delivery::Done
    }

    fn send_ready(&self, _: u16) {}

    fn set_link(&self, _: bool) {}
}

/// The guest's end of the cable.
struct Cable {
    nic: Arc<Nic>,
    slirp: Arc<Slirp>,
    memory: GuestMemory,
    mtu: usize,
}

impl Cable {
    fn send(&self, bytes: &[u8]) {
        self.memory.write(0x100, bytes).unwrap();
        let ranges = [GuestRange::new(0x100, bytes.len() as u64)];
        let frame = Frame::new(&self.memory, &ranges, PacketHeader::default()).unwrap();
        assert_eq!(self.slirp.send(0, &frame), Sending::Taken);
        self.slirp.flush(0);
    }

    fn take(&self) -> Option<(PacketHeader, Vec<u8>)> {
        let packet = self.nic.arrived.lock().unwrap().pop_front();
        if packet.is_some() && self.nic.limit.is_some() {
            self.slirp.resume(0);
        }
        packet
    }
}

struct Arrived(Vec<u8>);
struct Leaving<'a>(&'a Cable);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.0.send(&bytes);
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Time) -> Option<(Arrived, Leaving<'_>)> {
        let (header, bytes) = self.take()?;
        assert!(header.is_plain(), "nothing may be left to this guest");
        Some((Arrived(bytes), Leaving(self)))
    }

    fn transmit(&mut self, _: Time) -> Option<Leaving<'_>> {
        Some(Leaving(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities.checksum.tcp = Checksum::Both;
        capabilities
    }
}

struct Guest {
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    forwarded: Vec<SocketAddr>,
    start: Instant,
}

impl Guest {
    fn new(open: bool, forwards: &str) -> Self {
        Self::with(open, forwards, None)
    }

    /// A guest with its addresses.
    fn with(open: bool, forwards: &str, limit: Option<usize>) -> Self {
        let forwards = parse_forwards(forwards).unwrap();
        let access = Access { restricted: !open, dns: None };
        let (slirp, forwarded) = Slirp::start("net-0:0", MacAddress(MAC), None, access, &forwards).unwrap();
        let nic = Arc::new(Nic { limit, ..Nic::default() });
        let device: Arc<dyn NetDevice> = nic.clone();
        slirp.attach(Arc::downgrade(&device));
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, ..Default::default() }).unwrap();
        let mut cable = Cable { nic, slirp, memory, mtu: 1500 };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let mut interface = Interface::new(config, &mut cable, Time::from_millis(0));
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).unwrap();
            addresses.push(IpCidr::new(Ipv6Address::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15).into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(config::HOST).unwrap();
        Self { cable, interface, sockets: SocketSet::new(Vec::new()), forwarded, start: Instant::now() }
    }

    fn poll(&mut self) {
        let now = Time::from_millis(self.start.elapsed().as_millis() as i64);
        self.interface.poll(now, &mut self.cable, &mut self.sockets);
    }

    /// Lets time pass until `done` has a result.
    fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(start.elapsed() < PATIENCE, "{what} never happened");
            let nic = self.cable.nic.clone();
            let arrived = nic.arrived.lock().unwrap();
            if arrived.is_empty() {
                drop(nic.news.wait_timeout(arrived, Duration::from_millis(2)).unwrap());
            }
        }
    }

    fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 200_000]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, to: impl Into<IpAddress>, port: u16) -> SocketHandle {
        let handle = self.tcp_socket();
        let context = self.interface.context();
        let local = 40000 + (self.sockets.iter().count() as u16);
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(context, (to.into(), port), local).unwrap();
        handle
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends `data` and closes that direction, while it reads to the end of the other.
    fn exchange(&mut self, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
        let (mut sent, mut got, mut closed) = (0, Vec::new(), false);
        self.until("the end of the connection", |guest| {
            let socket = guest.tcp(handle);
            if socket.can_send() && sent < data.len() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            if sent == data.len() && !closed && socket.may_send() {
                socket.close();
                closed = true;
            }
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
            }
            (closed && !socket.may_recv() && !socket.can_recv()).then_some(())
        });
        got
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A server that reads to the end, then answers with what it got, twice, and closes.
fn echo_server(address: &str) -> Option<(u16, thread::JoinHandle<()>)> {
    let listener = TcpListener::bind((address, 0)).ok()?;
    let port = listener.local_addr().unwrap().port();
    let server = move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        stream.write_all(&got).unwrap();
        stream.write_all(&got).unwrap();
    };
    Some((port, thread::spawn(server)))
}

#[test]
fn tcp_to_the_host_both_ways_with_half_close() {
    for limit in [None, Some(2)] {
        let mut guest = Guest::with(true, "", limit);
        let (port, server) = echo_server("127.0.0.1").unwrap();
        let handle = guest.connect(config::HOST, port);
        let data = pattern(3_000_000);
        let got = guest.exchange(handle, &data);
        assert!(got.len() == 6_000_000 && got[..3_000_000] == data && got[3_000_000..] == data);
        server.join().unwrap();
        guest.until("the connection's end here", |guest| {
            let nat = guest.cable.slirp.shared.nat();
            (nat.nat.connection_count() == 0).then_some(())
        });
    }
}

#[test]
fn tcp_over_ipv6() {
    let Some((port, server)) = echo_server("::1") else { return };
    let mut guest = Guest::new(true, "");
    let handle = guest.connect(config::HOST6, port);
    let data = pattern(500_000);
    assert!(guest.exchange(handle, &data) == [&data[..], &data].concat());
    server.join().unwrap();
}

#[test]
fn many_connections_at_once() {
    let mut guest = Guest::new(true, "");
    let servers: Vec<_> = (0..20).map(|_| echo_server("127.0.0.1").unwrap()).collect();
    let handles: Vec<_> = servers.iter().map(|(port, _)| guest.connect(config::HOST, *port)).collect();
    for handle in handles {
        let data = pattern(50_000);
        assert_eq!(guest.exchange(handle, &data).len(), 100_000);
    }
    servers.into_iter().for_each(|(_, server)| server.join().unwrap());
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let mut guest = Guest::new(true, "");
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let handle = guest.connect(config::HOST, port);
    guest.until("the refusal", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn resets_reach_the_other_side() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(true, "");
    let handle = guest.connect(config::HOST, port);
    guest.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(handle).abort();
    guest.poll();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let handle = guest.connect(config::HOST, port);
    guest.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    let (stream, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    guest.until("the reset", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn forwarded_ports_lead_to_the_guest_even_if_restricted() {
    let mut guest = Guest::new(false, "tcp:127.0.0.1:0-:80;udp:127.0.0.1:0-:81");
    let handle = guest.tcp_socket();
    guest.tcp(handle).listen(80).unwrap();
    let address = guest.forwarded[0];
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let mut got = Vec::new();
        stream.write_all(&pattern(300_000)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    let mut got = Vec::new();
    guest.until("what the client sends", |guest| {
        let socket = guest.tcp(handle);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        (socket.state() == tcp::State::CloseWait && !socket.can_recv()).then_some(())
    });
    assert_eq!(guest.tcp(handle).remote_endpoint().unwrap().addr, IpAddress::from(config::HOST));
    assert!(got == pattern(300_000));
    guest.exchange(handle, &pattern(400_000));
    guest.until("the client's end", |_| client.is_finished().then_some(()));
    assert!(client.join().unwrap() == pattern(400_000));

    let handle = udp_socket(&mut guest, 81);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send_to(b"question", guest.forwarded[1]).unwrap();
    let (data, from) = receive_udp(&mut guest, handle);
    assert_eq!((data.as_slice(), from.addr), (&b"question"[..], IpAddress::from(config::HOST)));
    guest.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"answer", from).unwrap();
    guest.poll();
    let mut bytes = [0; 16];
    assert_eq!(client.recv_from(&mut bytes).unwrap(), (6, guest.forwarded[1]));
}

fn udp_socket(guest: &mut Guest, port: u16) -> SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 65536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    guest.sockets.add(socket)
}

fn receive_udp(guest: &mut Guest, handle: SocketHandle) -> (Vec<u8>, smoltcp::wire::IpEndpoint) {
    guest.until("a datagram", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket.recv().ok().map(|(data, from)| (data.to_vec(), from.endpoint))
    })
}

#[test]
fn udp_goes_and_comes_back() {
    let mut guest = Guest::new(true, "");
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = server.local_addr().unwrap().port();
    let handle = udp_socket(&mut guest, 5000);
    for len in [0, 1, 1400] {
        let to = (IpAddress::from(config::HOST), port);
        guest.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(&pattern(len), to).unwrap();
        guest.poll();
        let mut bytes = vec![0; 2000];
        // The first packet waits until the guest knows the host's address.
        guest.until("the host's packet", |_| {
            server.set_nonblocking(true).unwrap();
            server.recv_from(&mut bytes).ok().map(|(count, from)| {
                assert_eq!(bytes[..count], pattern(len));
                server.send_to(&bytes[..count], from).unwrap();
            })
        });
        let (data, from) = receive_udp(&mut guest, handle);
        assert!(data == pattern(len) && from.addr == IpAddress::from(config::HOST) && from.port == port);
    }
}

#[test]
fn a_lease_by_dhcp() {
    let mut guest = Guest::new(true, "");
    guest.interface.update_ip_addrs(|addresses| addresses.clear());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) =
        guest.until("a lease", |guest| match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                Some((config.address, config.router, config.dns_servers.iter().copied().collect::<Vec<_>>()))
            }
            _ => None,
        });
    assert_eq!(address.to_string(), "10.0.2.15/24");
    assert_eq!((router, dns), (Some(config::HOST), vec![config::DNS]));
}

#[test]
fn the_gateway_answers_echo_requests() {
    let mut guest = Guest::new(false, "");
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 8192]);
    let handle = guest.sockets.add(icmp::Socket::new(buffer(), buffer()));
    guest.sockets.get_mut::<icmp::Socket<'_>>(handle).bind(icmp::Endpoint::Ident(7)).unwrap();
    for to in [config::HOST, config::DNS] {
        let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
        let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 1, data: b"hello" };
        let bytes = socket.send(request.buffer_len(), to.into()).unwrap();
        request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &Default::default());
        let (data, from) = guest.until("an answer", |guest| {
            let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
            socket.recv().ok().map(|(data, from)| (data.to_vec(), from))
        });
        let packet = Icmpv4Packet::new_checked(&data).unwrap();
        let answer = Icmpv4Repr::parse(&packet, &Default::default()).unwrap();
        assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 7, seq_no: 1, data: b"hello" });
        assert_eq!(from, IpAddress::from(to));
    }
}

#[test]
fn a_restricted_guest_reaches_nobody() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut guest = Guest::new(false, "");
    for to in [config::HOST, config::DNS, Ipv4Addr::new(192, 0, 2, 1)] {
        let handle = guest.connect(to, listener.local_addr().unwrap().port());
        guest.until("the refusal", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    }
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn large_packets_go_to_a_guest_that_takes_them() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(true, "");
    let handle = guest.connect(config::HOST, port);
    guest.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    guest.cable.slirp.set_offloads(Offloads::CHECKSUM | Offloads::TCP4);
    stream.write_all(&pattern(100_000)).unwrap();
    let (header, bytes) = loop {
        let nic = guest.cable.nic.clone();
        let mut arrived = nic.arrived.lock().unwrap();
        if let Some(packet) = arrived.pop_front() {
            if packet.0.gso_type != 0 {
                break packet;
            }
        } else {
            drop(nic.news.wait_timeout(arrived, PATIENCE).unwrap());
        }
    };
    assert_eq!((header.flags, header.gso_type), (PacketHeader::NEEDS_CHECKSUM, PacketHeader::GSO_TCP4));
    assert_eq!((header.csum_start, header.csum_offset, header.header_len), (34, 16, 54));
    assert!(header.gso_size <= 1460 && bytes.len() > 3000 && bytes.len() <= 65535 + 14);
    // The sum of the pseudo header, for the guest to complete.
    let source = crate::net::wire::IpPacket::parse(&bytes, bytes.len()).unwrap();
    let sum = crate::net::wire::pseudo_header(source.source, source.destination, 6, source.len).folded();
    assert_eq!(bytes[50..52], sum.to_be_bytes());
}

#[test]
fn garbage_does_no_harm() {
    // Frames that begin well and go wrong somewhere, and frames that are wrong from the start.
    let mut guest = Guest::new(true, "tcp:127.0.0.1:0-:80");
    let address = guest.forwarded[0];
    let client = TcpStream::connect(address).unwrap();
    let mut seed = 88_172_645_463_325_252_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut good: Vec<Vec<u8>> = Vec::new();
    let ethernet = |kind: [u8; 2]| [&HOST_MAC[..], &MAC, &kind].concat();
    let v4 = |protocol: u8, to: [u8; 4], rest: &[u8]| {
        let len = (20 + rest.len()) as u16;
        let head = [0x45, 0, (len >> 8) as u8, len as u8, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15];
        [&ethernet([8, 0])[..], &head, &to, rest].concat()
    };
    let v6 = |next: u8, to: &Ipv6Address, rest: &[u8]| {
        let from = Ipv6Address::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15).octets();
        let head = [0x60, 0, 0, 0, (rest.len() >> 8) as u8, rest.len() as u8, next, 64];
        [&ethernet([0x86, 0xdd])[..], &head, &from, &to.octets(), rest].concat()
    };
    let syn = [0x9c, 0x40, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 1, 0, 0, 0, 0, 0, 2, 4, 5, 0xb4];
    let answer = [0, 80, 0x9c, 0x40, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x12, 1, 0, 0, 0, 0, 0];
    good.push(v4(6, [10, 0, 2, 2], &syn));
    good.push(v4(6, [10, 0, 2, 2], &answer));
    good.push(v6(6, &config::HOST6, &syn));
    good.push(v4(17, [10, 0, 2, 3], &[0x9c, 0x40, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]));
    good.push(v4(1, [10, 0, 2, 2], &[8, 0, 0, 0, 0, 1, 0, 1, 5, 5]));
    good.push(v6(58, &config::HOST6, &[135; 40]));
    good.push(v6(44, &config::HOST6, &[17, 0, 0, 1, 0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8]));
    good.push(
        [&ethernet([8, 6])[..], &[0, 1, 8, 0, 6, 4, 0, 1], &MAC, &[10, 0, 2, 15], &[0; 6], &[10, 0, 2, 2]].concat(),
    );
    let mut dhcp = vec![0; 300];
    dhcp[..4].copy_from_slice(&[1, 1, 6, 0]);
    dhcp[236..246].copy_from_slice(&[99, 130, 83, 99, 53, 1, 3, 50, 4, 10]);
    good.push(v4(17, [255; 4], &[&[0, 68, 0, 67, 1, 0x34, 0, 0][..], &dhcp].concat()));
    for step in 0..120_000 {
        let mut frame = good[random() as usize % good.len()].clone();
        for _ in 0..random() % 4 {
            let at = random() as usize % frame.len();
            frame[at] = random() as u8;
        }
        if random() % 8 == 0 {
            frame.truncate(14 + random() as usize % frame.len());
        }
        if random() % 16 == 0 {
            frame.iter_mut().skip(14).for_each(|byte| *byte = random() as u8);
        }
        // Not out into the world: only what the network itself has may be asked for.
        let elsewhere = crate::net::wire::IpPacket::parse(&frame, frame.len())
            .is_some_and(|packet| config::place(packet.destination) == config::Place::Outside);
        if !elsewhere && frame.len() >= 14 {
            guest.cable.send(&frame);
        }
        if step % 64 == 0 {
            guest.cable.nic.arrived.lock().unwrap().clear();
        }
    }
    drop(client);
    let (port, server) = echo_server("127.0.0.1").unwrap();
    let handle = guest.connect(config::HOST, port);
    assert_eq!(guest.exchange(handle, &pattern(1000)).len(), 2000);
    server.join().unwrap();
}

#[test]
fn the_thread_ends_with_the_network() {
    let guest = Guest::new(true, "tcp:127.0.0.1:0-:80");
    let address = guest.forwarded[0];
    let weak = Arc::downgrade(&guest.cable.slirp.shared);
    drop(guest);
    assert!(weak.upgrade().is_none());
    assert!(TcpStream::connect(address).is_err(), "and nobody listens any more");
}
