//! Where the guest's packets go, and where packets for it come from.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use super::config::{DNS_PORT, Forward, HOST, HOST6, NETWORK, Place, place};
use super::link::{HOST_MAC, Link, Unreachable};
use super::reassembly::Reassembly;
use super::resolver;
use super::services::{self, DHCP_SERVER, Leases};
use super::table::{Ends, Table};
use super::tcp::{Connection, Outcome};
use super::udp::{Exchange, ROUNDS};
use crate::net::wire::{
    ETHERTYPE_ARP, HEAD, ICMP, ICMPV6, IpPacket, Mac, Segment, TCP, UDP, UDP_HEADER, flag, parse_udp,
};
use crate::net::{ETHERNET_HEADER, Frame, MAX_PACKET};

/// What an event of the kernel is about: in the top bits of its data.
const KIND_SHIFT: u32 = 60;
const KIND_WAKE: u64 = 0;
const KIND_TCP: u64 = 1;
const KIND_UDP: u64 = 2;
const KIND_ECHO: u64 = 3;
const KIND_LISTENER: u64 = 4;
const ID: u64 = (1 << KIND_SHIFT) - 1;

/// The data of the event that only wakes.
pub(super) const WAKE: EventData = EventData::new_u64(KIND_WAKE << KIND_SHIFT);

const MAX_CONNECTIONS: usize = 4096;
const MAX_EXCHANGES: usize = 512;
const MAX_ECHOES: usize = 32;

/// Whom the guest reaches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    /// Nobody.
    pub(super) restricted: bool,
    /// The name server, if not the host's.
    pub(super) dns: Option<SocketAddr>,
}

/// A port of the host that leads to the guest.
enum Listener {
    Tcp(TcpListener, SocketAddr),
    Udp(Arc<UdpSocket>, SocketAddr),
}

/// Address translation between the guest and the host's sockets.
pub(super) struct Nat {
    pub(super) link: Link,
    access: Access,
    leases: Leases,
    reassembly: Reassembly,
    connections: Table<Connection>,
    exchanges: Table<Exchange>,
    echoes: Table<Exchange>,
    listeners: Vec<Listener>,
    /// Connections that have something to do, and those that wait for room in the NIC.
    scheduled: VecDeque<u64>,
    blocked: Vec<u64>,
    epoll: Arc<OwnedFd>,
    random: RandomState,
    count: u64,
    /// For datagrams.
    buffer: Vec<u8>,
}

impl Nat {
    pub(super) fn new(link: Link, access: Access, epoll: Arc<OwnedFd>) -> Self {
        Self {
            link,
            access,
            leases: Leases::default(),
            reassembly: Reassembly::default(),
            connections: Table::default(),
            exchanges: Table::default(),
            echoes: Table::default(),
            listeners: Vec::new(),
            scheduled: VecDeque::new(),
            blocked: Vec::new(),
            epoll,
            random: RandomState::new(),
            count: 0,
            buffer: vec![0; MAX_PACKET],
        }
    }

    /// Opens a port of the host that leads to the guest; returns its address.
    pub(super) fn listen(&mut self, forward: &Forward) -> io::Result<SocketAddr> {
        let data = event(KIND_LISTENER, self.listeners.len() as u64);
        let (listener, address) = if forward.tcp {
            let socket = TcpListener::bind(forward.host)?;
            socket.set_nonblocking(true)?;
            epoll::add(&*self.epoll, &socket, data, EventFlags::IN)?;
            let address = socket.local_addr()?;
            (Listener::Tcp(socket, forward.guest), address)
        } else {
            let socket = UdpSocket::bind(forward.host)?;
            socket.set_nonblocking(true)?;
            epoll::add(&*self.epoll, &socket, data, EventFlags::IN)?;
            let address = socket.local_addr()?;
            (Listener::Udp(Arc::new(socket), forward.guest), address)
        };
        self.listeners.push(listener);
        Ok(address)
    }

    /// A number nobody can guess.
    fn unguessable(&mut self) -> u64 {
        self.count += 1;
        self.random.hash_one(self.count)
    }

    /// The host's address for what the guest calls `remote`.
    fn target(&self, remote: SocketAddr) -> Option<SocketAddr> {
        if self.access.restricted {
            return None;
        }
        match place(remote.ip()) {
            Place::Host if remote.is_ipv4() => Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), remote.port())),
            Place::Host => Some(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), remote.port())),
            Place::Dns if remote.port() == DNS_PORT => Some(self.access.dns.unwrap_or_else(resolver::server)),
            Place::Outside => Some(remote),
            Place::Dns | Place::Nowhere => None,
        }
    }

    /// A packet of the guest.
    pub(super) fn input(&mut self, queue: u16, frame: &Frame<'_>) {
        let mut head = [0; HEAD];
        let count = frame.read(0, &mut head);
        let Some((ethernet, rest)) = head[..count].split_first_chunk::<ETHERNET_HEADER>() else { return };
        let [to @ .., f0, f1, f2, f3, f4, f5, t0, t1] = *ethernet;
        let from: Mac = [f0, f1, f2, f3, f4, f5];
        if to != HOST_MAC && to[0] & 1 == 0 {
            return;
        }
        if u16::from_be_bytes([t0, t1]) == ETHERTYPE_ARP {
            if let Some((address, mac)) = services::arp(&self.link, queue, rest) {
                self.link.learn(address, mac);
            }
            return;
        }
        let Some(packet) = IpPacket::parse(&head[..count], frame.len()) else { return };
        let own = match packet.source {
            IpAddr::V4(v4) => v4.octets()[..3] == NETWORK,
            IpAddr::V6(v6) => v6.segments()[0] & 0xff80 == 0xfe80,
        };
        if own && place(packet.source) == Place::Nowhere {
            self.link.learn(packet.source, from);
        }
        match (packet.protocol, packet.fragment) {
            (TCP, None) => {
                let bytes = head[..count].get(packet.payload..).unwrap_or_default();
                self.tcp(queue, &packet, bytes, frame);
            }
            (TCP, Some(_)) => {}
            (_, fragment) => {
                let mut data = vec![0; packet.len];
                let count = frame.read(packet.payload, &mut data);
                data.truncate(count);
                match fragment {
                    None => self.datagram(queue, &packet, &data),
                    Some(fragment) => {
                        if let Some(whole) = self.reassembly.add(&packet, fragment, &data) {
                            self.datagram(queue, &packet, &whole);
                        }
                    }
                }
            }
        }
    }

    fn tcp(&mut self, queue: u16, packet: &IpPacket, bytes: &[u8], frame: &Frame<'_>) {
        let Some(segment) = Segment::parse(bytes, packet.len) else { return };
        let guest = SocketAddr::new(packet.source, segment.source);
        let remote = SocketAddr::new(packet.destination, segment.destination);
        let len = packet.len - segment.header;
        if let Some(id) = self.connections.find((guest, remote)) {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.queue = queue;
                match connection.input(&segment, frame, packet.payload + segment.header, len) {
                    Outcome::Ended => self.connections.remove(id),
                    _ => self.schedule(id),
                }
            }
            return;
        }
        let is_request = segment.flags & (flag::SYN | flag::ACK | flag::RST) == flag::SYN;
        if place(remote.ip()) == Place::Nowhere && !is_request {
            return;
        }
        if !is_request || self.open(queue, (guest, remote), &segment).is_none() {
            self.link.refuse_tcp(queue, (guest, remote), &segment, len);
        }
    }

    /// Begins a connection that the guest asks for; `None` if that is not possible.
    fn open(&mut self, queue: u16, ends: Ends, segment: &Segment) -> Option<()> {
        let target = self.target(ends.1)?;
        if self.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        let socket = begin_connect(target).ok()?;
        let connection = Connection::from_guest(ends, socket, self.unguessable() as u32, segment);
        self.add(queue, ends, connection)
    }

    fn add(&mut self, queue: u16, ends: Ends, mut connection: Connection) -> Option<()> {
        connection.queue = queue;
        let epoll = self.epoll.clone();
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let id = self.connections.insert(ends, |id| {
            epoll::add(&*epoll, connection.socket(), event(KIND_TCP, id), interest).map(|()| connection)
        });
        self.schedule(id.ok()?);
        Some(())
    }

    fn schedule(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(id)
            && !std::mem::replace(&mut connection.scheduled, true)
        {
            self.scheduled.push_back(id);
        }
    }

    fn datagram(&mut self, queue: u16, packet: &IpPacket, data: &[u8]) {
        match (packet.protocol, packet.source, packet.destination) {
            (UDP, ..) => self.udp(queue, packet, data),
            (ICMP, IpAddr::V4(_), IpAddr::V4(_)) if data.first() == Some(&8) => self.echo(queue, packet, data),
            (ICMPV6, IpAddr::V6(_), IpAddr::V6(_)) if data.first() == Some(&128) => self.echo(queue, packet, data),
            (ICMPV6, IpAddr::V6(guest), _) => {
                services::neighbours(&self.link, queue, guest, data, self.access.restricted)
            }
            _ => {}
        }
    }

    fn udp(&mut self, queue: u16, packet: &IpPacket, data: &[u8]) {
        let Some((from, to, len)) = parse_udp(data, data.len()) else { return };
        let payload = &data[UDP_HEADER..UDP_HEADER + len];
        if to == DHCP_SERVER && packet.destination.is_ipv4() && place(packet.destination) != Place::Outside {
            return services::dhcp(&self.link, &mut self.leases, queue, payload, self.access.restricted);
        }
        let ends = (SocketAddr::new(packet.source, from), SocketAddr::new(packet.destination, to));
        let now = Instant::now();
        let id = match self.exchanges.find(ends) {
            Some(id) => Ok(id),
            None if place(ends.1.ip()) == Place::Nowhere => return,
            None => self.open_exchange(ends, now),
        };
        let sent = id.and_then(|id| {
            let exchange = self.exchanges.get_mut(id).ok_or(Unreachable::Host)?;
            exchange.queue = queue;
            exchange.touch(now);
            exchange.send(payload).map_err(|why| reason(&why))
        });
        if let Err(why) = sent {
            self.link.unreachable(queue, UDP, (packet.source, packet.destination), data, why);
        }
    }

    fn open_exchange(&mut self, ends: Ends, now: Instant) -> Result<u64, Unreachable> {
        let target = self.target(ends.1).ok_or(Unreachable::Prohibited)?;
        make_room(&mut self.exchanges, MAX_EXCHANGES);
        let exchange = Exchange::udp(ends, target, now).map_err(|why| reason(&why))?;
        add_exchange(&mut self.exchanges, &self.epoll, KIND_UDP, ends, exchange)
    }

    fn echo(&mut self, queue: u16, packet: &IpPacket, data: &[u8]) {
        let Some([_, _, _, _, i0, i1, _, _]) = data.first_chunk() else { return };
        let (guest, to) = (packet.source, packet.destination);
        if services::echo(&self.link, queue, guest, to, data) || place(to) == Place::Nowhere {
            return;
        }
        let ends = (SocketAddr::new(guest, u16::from_be_bytes([*i0, *i1])), SocketAddr::new(to, 0));
        let now = Instant::now();
        let id = match (self.echoes.find(ends), self.target(ends.1)) {
            (Some(id), _) => Ok(id),
            (None, None) => Err(Unreachable::Prohibited),
            (None, Some(target)) => {
                make_room(&mut self.echoes, MAX_ECHOES);
                let exchange = Exchange::echo(ends, target, now).map_err(|_| Unreachable::Prohibited);
                exchange.and_then(|exchange| add_exchange(&mut self.echoes, &self.epoll, KIND_ECHO, ends, exchange))
            }
        };
        let sent = id.and_then(|id| {
            let exchange = self.echoes.get_mut(id).ok_or(Unreachable::Host)?;
            exchange.queue = queue;
            exchange.touch(now);
            exchange.send(data).map_err(|_| Unreachable::Host)
        });
        if let Err(why) = sent {
            self.link.unreachable(queue, packet.protocol, (guest, to), data, why);
        }
    }

    /// News of the kernel.
    pub(super) fn event(&mut self, data: EventData, flags: EventFlags) {
        let id = data.u64() & ID;
        match data.u64() >> KIND_SHIFT {
            KIND_TCP => {
                if let Some(connection) = self.connections.get_mut(id) {
                    let over = EventFlags::HUP | EventFlags::ERR;
                    let readable = flags.intersects(EventFlags::IN | EventFlags::RDHUP | over);
                    connection.ready(readable, flags.intersects(EventFlags::OUT | over));
                    self.schedule(id);
                }
            }
            KIND_UDP => self.receive_udp(id),
            KIND_ECHO => self.receive_echo(id),
            KIND_LISTENER => self.knock(id as usize),
            _ => {}
        }
    }

    fn receive_udp(&mut self, id: u64) {
        let Some(exchange) = self.exchanges.get_mut(id) else { return };
        let (guest, remote, queue) = (exchange.guest, exchange.remote, exchange.queue);
        exchange.touch(Instant::now());
        for _ in 0..ROUNDS {
            match exchange.receive(&mut self.buffer) {
                // A guest without room loses datagrams, as on any network.
                Ok(count) => drop(self.link.udp(queue, remote, guest, &self.buffer[..count])),
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return,
                Err(why) => {
                    // What was sent came back. The quotation is what the guest's packet began with.
                    let [a, b] = guest.port().to_be_bytes();
                    let [c, d] = remote.port().to_be_bytes();
                    let quote = [a, b, c, d, 0, UDP_HEADER as u8, 0, 0];
                    self.link.unreachable(queue, UDP, (guest.ip(), remote.ip()), &quote, reason(&why));
                    return;
                }
            }
        }
    }

    fn receive_echo(&mut self, id: u64) {
        let Some(exchange) = self.echoes.get_mut(id) else { return };
        for _ in 0..ROUNDS {
            let Ok(count) = exchange.receive(&mut self.buffer) else { return };
            let message = &mut self.buffer[..count];
            let Some(identification) = message.get_mut(4..6) else { continue };
            identification.copy_from_slice(&exchange.guest.port().to_be_bytes());
            self.link.icmp(exchange.queue, exchange.remote.ip(), exchange.guest.ip(), message);
        }
    }

    /// Somebody came to a forwarded port.
    fn knock(&mut self, index: usize) {
        for _ in 0..ROUNDS {
            match self.listeners.get(index) {
                Some(Listener::Tcp(listener, guest)) => {
                    let guest = *guest;
                    match listener.accept() {
                        Ok((socket, peer)) => self.accepted(guest, socket, peer),
                        // Out of descriptors: those who wait stay, and others may leave.
                        Err(_) => return,
                    }
                }
                Some(Listener::Udp(socket, guest)) => {
                    let (socket, guest) = (socket.clone(), *guest);
                    match socket.recv_from(&mut self.buffer) {
                        Ok((count, peer)) => self.forwarded(guest, &socket, peer, count),
                        Err(why) if why.kind() == io::ErrorKind::WouldBlock => return,
                        // An earlier answer could not be delivered.
                        Err(_) => {}
                    }
                }
                None => return,
            }
        }
    }

    fn accepted(&mut self, guest: SocketAddr, socket: TcpStream, peer: SocketAddr) {
        let mut ends = (guest, seen_by_guest(peer, guest));
        while self.connections.find(ends).is_some() {
            ends.1.set_port((self.unguessable() as u16).max(1));
        }
        if self.connections.len() < MAX_CONNECTIONS && socket.set_nonblocking(true).is_ok() {
            let connection = Connection::from_host(ends, socket, self.unguessable() as u32);
            // Otherwise the host has no room for it, and it is closed.
            let _ = self.add(0, ends, connection);
        }
    }

    fn forwarded(&mut self, guest: SocketAddr, socket: &Arc<UdpSocket>, peer: SocketAddr, count: usize) {
        let ends = (guest, seen_by_guest(peer, guest));
        let now = Instant::now();
        let known = self.exchanges.find(ends).and_then(|id| self.exchanges.get_mut(id));
        let queue = if let Some(exchange) = known {
            exchange.touch(now);
            exchange.queue
        } else {
            make_room(&mut self.exchanges, MAX_EXCHANGES);
            let exchange = Exchange::forwarded(ends, socket.clone(), peer, now);
            let Ok(_) = self.exchanges.insert(ends, |_| Ok::<_, std::convert::Infallible>(exchange));
            0
        };
        let _ = self.link.udp(queue, ends.1, guest, &self.buffer[..count]);
    }

    /// The NIC has room again.
    pub(super) fn unblock(&mut self) {
        self.scheduled.extend(self.blocked.drain(..));
    }

    /// Gives every connection that has something to do a turn; returns whether some need another.
    pub(super) fn work(&mut self, now: Instant) -> bool {
        for _ in 0..self.scheduled.len() {
            let Some(id) = self.scheduled.pop_front() else { break };
            let Some(connection) = self.connections.get_mut(id) else { continue };
            match connection.work(now, &self.link) {
                Outcome::Goes => connection.scheduled = false,
                Outcome::Waits => self.blocked.push(id),
                Outcome::More => self.scheduled.push_back(id),
                Outcome::Ended => self.connections.remove(id),
            }
        }
        !self.scheduled.is_empty()
    }

    /// Sees to what is due at `now`.
    pub(super) fn tick(&mut self, now: Instant) {
        let due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<u64> = self.connections.iter().filter(|(_, c)| due(c.deadline)).map(|(id, _)| id).collect();
        for id in late {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.retry();
            }
            self.schedule(id);
        }
        for table in [&mut self.exchanges, &mut self.echoes] {
            let over: Vec<u64> = table.iter().filter(|(_, e)| e.expires <= now).map(|(id, _)| id).collect();
            over.into_iter().for_each(|id| table.remove(id));
        }
    }

    #[cfg(test)]
    pub(super) fn connection_count(&self) -> usize {
        self.connections.len()
    }

    /// When something is due next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let connections = self.connections.iter().filter_map(|(_, connection)| connection.deadline);
        let exchanges = self.exchanges.iter().chain(self.echoes.iter()).map(|(_, exchange)| exchange.expires);
        connections.chain(exchanges).min()
    }
}

fn event(kind: u64, id: u64) -> EventData {
    EventData::new_u64(kind << KIND_SHIFT | id)
}

fn begin_connect(target: SocketAddr) -> io::Result<TcpStream> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
        Err(why) => Err(why.into()),
    }
}

/// Removes the exchange that is nearest to its end if there are `most`.
fn make_room(table: &mut Table<Exchange>, most: usize) {
    if table.len() >= most
        && let Some((id, _)) = table.iter().min_by_key(|(_, exchange)| exchange.expires)
    {
        table.remove(id);
    }
}

fn add_exchange(
    table: &mut Table<Exchange>,
    epoll: &OwnedFd,
    kind: u64,
    ends: Ends,
    exchange: Exchange,
) -> Result<u64, Unreachable> {
    let added = table.insert(ends, |id| {
        if let Some(socket) = exchange.socket() {
            epoll::add(epoll.as_fd(), socket, event(kind, id), EventFlags::IN)?;
        }
        Ok::<_, Errno>(exchange)
    });
    added.map_err(|_| Unreachable::Host)
}

fn reason(why: &io::Error) -> Unreachable {
    match why.kind() {
        io::ErrorKind::ConnectionRefused => Unreachable::Port,
        io::ErrorKind::PermissionDenied => Unreachable::Prohibited,
        _ => Unreachable::Host,
    }
}

/// How the guest sees somebody who came through a forwarded port: as he is, or as the host if that would make no sense.
fn seen_by_guest(peer: SocketAddr, guest: SocketAddr) -> SocketAddr {
    let ip = match peer.ip().to_canonical() {
        ip if ip.is_ipv4() == guest.is_ipv4() && place(ip) == Place::Outside => ip,
        _ if guest.is_ipv4() => HOST.into(),
        _ => HOST6.into(),
    };
    SocketAddr::new(ip, peer.port())
}
