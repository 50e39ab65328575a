//! The cable to the guest: packets made and handed over.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::net::wire::{
    Checksum, ETHERTYPE_ARP, Headers, ICMP, ICMPV6, IPV4_HEADER, Mac, TCP, TCP_HEADER, UDP, UDP_HEADER, ip_header,
    pseudo_header,
};
use crate::net::{Delivery, ETHERNET_HEADER, NetDevice, Offloads, Packet, PacketHeader};

/// Address of everything on this side of the cable.
pub(super) const HOST_MAC: Mac = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];

/// Addresses of the guest that are kept; a guest that has more is reached under its NIC's.
const MAX_NEIGHBOURS: usize = 256;

/// Who is plugged in.
#[derive(Default)]
pub(super) struct Plug {
    pub(super) device: OnceLock<Weak<dyn NetDevice>>,
    pub(super) offloads: AtomicU8,
}

/// The cable.
pub(super) struct Link {
    plug: Arc<Plug>,
    /// Largest IP packet.
    mtu: usize,
    nic: Mac,
    neighbours: HashMap<IpAddr, Mac>,
    identification: std::cell::Cell<u16>,
}

/// A TCP segment for the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct TcpOut {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) queue: u16,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// The guest's largest segment.
    pub(super) mss: u16,
    /// In a SYN: the options, with the window's scale if that is to be offered.
    pub(super) options: Option<Option<u8>>,
}

impl Link {
    pub(super) fn new(plug: Arc<Plug>, mtu: u16, nic: Mac) -> Self {
        Self { plug, mtu: mtu.into(), nic, neighbours: HashMap::new(), identification: 0.into() }
    }

    pub(super) fn mtu(&self) -> usize {
        self.mtu
    }

    /// Remembers under which address a guest's address is reached.
    pub(super) fn learn(&mut self, address: IpAddr, mac: Mac) {
        if mac[0] & 1 == 0 && (self.neighbours.len() < MAX_NEIGHBOURS || self.neighbours.contains_key(&address)) {
            self.neighbours.insert(address, mac);
        }
    }

    /// Ethernet addresses of a packet to `to`, and from us.
    fn macs(&self, to: IpAddr) -> (Mac, Mac) {
        let mac = match to {
            IpAddr::V4(v4) if v4.is_broadcast() => [0xff; 6],
            IpAddr::V6(v6) if v6.is_multicast() => {
                let [.., a, b, c, d] = v6.octets();
                [0x33, 0x33, a, b, c, d]
            }
            _ => self.neighbours.get(&to).copied().unwrap_or(self.nic),
        };
        (mac, HOST_MAC)
    }

    fn offloads(&self) -> Offloads {
        Offloads::from_bits_truncate(self.plug.offloads.load(Ordering::Relaxed))
    }

    fn deliver(&self, queue: u16, header: PacketHeader, pieces: &[&[u8]]) -> Delivery {
        match self.plug.device.get().and_then(Weak::upgrade) {
            Some(device) => device.receive(queue, &Packet { header, pieces }),
            None => Delivery::Done,
        }
    }

    /// What a guest can be sent in a segment, and what our IP packets allow.
    fn segment(&self, guest: SocketAddr, mss: u16) -> usize {
        usize::from(mss).min(self.mtu.saturating_sub(ip_header(&guest) + TCP_HEADER)).max(1)
    }

    /// Bytes of data to hand over at once: a segment, or many that the guest takes as one.
    pub(super) fn largest(&self, guest: SocketAddr, mss: u16) -> usize {
        let segment = self.segment(guest, mss);
        let many = if guest.is_ipv4() { Offloads::TCP4 } else { Offloads::TCP6 };
        if self.offloads().contains(many | Offloads::CHECKSUM) {
            (usize::from(u16::MAX) - ip_header(&guest) - TCP_HEADER) / segment * segment
        } else {
            segment
        }
    }

    pub(super) fn tcp(&self, out: &TcpOut, data: [&[u8]; 2]) -> Delivery {
        let data_len: usize = data.iter().map(|piece| piece.len()).sum();
        let mss = (self.mtu.saturating_sub(ip_header(&out.destination) + TCP_HEADER)).min(usize::from(u16::MAX)) as u16;
        let [mss_high, mss_low] = mss.to_be_bytes();
        let options: &[u8] = match out.options {
            None => &[],
            Some(None) => &[2, 4, mss_high, mss_low],
            Some(Some(scale)) => &[2, 4, mss_high, mss_low, 1, 3, 3, scale],
        };
        let tcp_len = TCP_HEADER + options.len() + data_len;
        let (source, destination) = (out.source.ip(), out.destination.ip());
        let mut headers = Headers::ip(self.macs(destination), source, destination, TCP, tcp_len, None);
        let start = headers.len();
        headers.push(&out.source.port().to_be_bytes());
        headers.push(&out.destination.port().to_be_bytes());
        headers.push(&out.sequence.to_be_bytes());
        let acknowledges = out.flags & crate::net::wire::flag::ACK != 0;
        headers.push(&if acknowledges { out.acknowledgement } else { 0 }.to_be_bytes());
        headers.push(&[(((TCP_HEADER + options.len()) / 4) << 4) as u8, out.flags]);
        headers.push(&out.window.to_be_bytes());
        headers.push(&[0; 4]);
        headers.push(options);
        let mut sum = pseudo_header(source, destination, TCP, tcp_len);
        let mut header = PacketHeader::default();
        if self.offloads().contains(Offloads::CHECKSUM) {
            headers.put(start + 16, sum.folded());
            header.flags = PacketHeader::NEEDS_CHECKSUM;
            (header.csum_start, header.csum_offset) = (start as u16, 16);
            let segment = self.segment(out.destination, out.mss);
            if data_len > segment {
                let v4 = destination.is_ipv4();
                header.gso_type = if v4 { PacketHeader::GSO_TCP4 } else { PacketHeader::GSO_TCP6 };
                header.gso_size = segment as u16;
                header.header_len = headers.len() as u16;
            }
        } else {
            sum.add(&headers.bytes()[start..]);
            data.iter().for_each(|piece| sum.add(piece));
            headers.put(start + 16, sum.finish());
        }
        self.deliver(out.queue, header, &[headers.bytes(), data[0], data[1]])
    }

    /// Refuses a segment for which there is no connection (RFC 9293, 3.10.7.1).
    pub(super) fn refuse_tcp(
        &self,
        queue: u16,
        (guest, remote): (SocketAddr, SocketAddr),
        segment: &crate::net::wire::Segment,
        len: usize,
    ) {
        use crate::net::wire::flag::{ACK, FIN, RST, SYN};
        if segment.flags & RST != 0 {
            return;
        }
        let used = len as u32 + u32::from(segment.flags & SYN != 0) + u32::from(segment.flags & FIN != 0);
        let (sequence, flags) = if segment.flags & ACK != 0 { (segment.acknowledgement, RST) } else { (0, RST | ACK) };
        let out = TcpOut {
            source: remote,
            destination: guest,
            queue,
            sequence,
            acknowledgement: segment.sequence.wrapping_add(used),
            flags,
            window: 0,
            mss: u16::MAX,
            options: None,
        };
        // A guest without room asks again.
        let _ = self.tcp(&out, [&[], &[]]);
    }

    /// A UDP datagram; over IPv4 in as many parts as it takes. What a network cannot carry is lost.
    pub(super) fn udp(&self, queue: u16, source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Delivery {
        let len = UDP_HEADER + data.len();
        let Ok(len16) = u16::try_from(len) else { return Delivery::Done };
        let mut udp = [0; UDP_HEADER];
        udp[..2].copy_from_slice(&source.port().to_be_bytes());
        udp[2..4].copy_from_slice(&destination.port().to_be_bytes());
        udp[4..6].copy_from_slice(&len16.to_be_bytes());
        let mut sum = pseudo_header(source.ip(), destination.ip(), UDP, len);
        sum.add(&udp);
        sum.add(data);
        // Zero means "no checksum".
        let sum = match sum.finish() {
            0 => 0xffff,
            sum => sum,
        };
        udp[6..].copy_from_slice(&sum.to_be_bytes());
        self.ip(queue, source.ip(), destination.ip(), UDP, &udp, data)
    }

    /// An IP packet with a payload in two pieces.
    fn ip(&self, queue: u16, source: IpAddr, destination: IpAddr, protocol: u8, head: &[u8], data: &[u8]) -> Delivery {
        let macs = self.macs(destination);
        let len = head.len() + data.len();
        let most = self.mtu.saturating_sub(IPV4_HEADER) & !7;
        if len <= most || !destination.is_ipv4() || head.len() > most {
            let headers = Headers::ip(macs, source, destination, protocol, len, None);
            return self.deliver(queue, PacketHeader::default(), &[&[headers.bytes(), head].concat(), data]);
        }
        let id = self.identification.get();
        self.identification.set(id.wrapping_add(1));
        let mut offset = 0;
        while offset < len {
            let here = most.min(len - offset);
            let more = if offset + here < len { 0x2000 } else { 0 };
            let headers =
                Headers::ip(macs, source, destination, protocol, here, Some((id, (offset / 8) as u16 | more)));
            let front = if offset == 0 { head } else { &[] };
            let from = offset.saturating_sub(head.len());
            let part = &data[from..from + here - front.len()];
            if self.deliver(queue, PacketHeader::default(), &[&[headers.bytes(), front].concat(), part])
                == Delivery::NoRoom
            {
                return Delivery::NoRoom;
            }
            offset += here;
        }
        Delivery::Done
    }

    /// An ICMP message of either version; the checksum, at its third byte, is filled in here.
    pub(super) fn icmp(&self, queue: u16, source: IpAddr, destination: IpAddr, message: &mut [u8]) {
        let (protocol, mut sum) = if destination.is_ipv4() {
            (ICMP, Checksum::default())
        } else {
            (ICMPV6, pseudo_header(source, destination, ICMPV6, message.len()))
        };
        if let Some(field) = message.get_mut(2..4) {
            field.fill(0);
        }
        sum.add(message);
        if let Some(field) = message.get_mut(2..4) {
            field.copy_from_slice(&sum.finish().to_be_bytes());
        }
        // Nobody relies on these.
        let _ = self.ip(queue, source, destination, protocol, message, &[]);
    }

    /// Tells the guest that its packet found nobody, or was not allowed: an ICMP error with the start of that packet
    /// (RFC 792; RFC 4443, 3.1). `quote` is the beginning of its payload.
    pub(super) fn unreachable(
        &self,
        queue: u16,
        protocol: u8,
        (guest, remote): (IpAddr, IpAddr),
        quote: &[u8],
        why: Unreachable,
    ) {
        let quote = &quote[..quote.len().min(8)];
        let headers = Headers::ip(([0; 6], [0; 6]), guest, remote, protocol, quote.len(), None);
        let (kind, code) = match (guest.is_ipv4(), why) {
            (true, Unreachable::Port) => (3, 3),
            (true, Unreachable::Host) => (3, 1),
            (true, Unreachable::Prohibited) => (3, 13),
            (false, Unreachable::Port) => (1, 4),
            (false, Unreachable::Host) => (1, 3),
            (false, Unreachable::Prohibited) => (1, 1),
        };
        let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
        message.extend(&headers.bytes()[ETHERNET_HEADER..]);
        message.extend(quote);
        self.icmp(queue, remote, guest, &mut message);
    }

    /// An answer to an ARP request (RFC 826): `address` is here.
    pub(super) fn arp_answer(&self, queue: u16, address: [u8; 4], asker: (Mac, [u8; 4])) {
        let mut headers = Headers::ethernet(asker.0, HOST_MAC, ETHERTYPE_ARP);
        headers.push(&[0, 1, 8, 0, 6, 4, 0, 2]);
        headers.push(&HOST_MAC);
        headers.push(&address);
        headers.push(&asker.0);
        headers.push(&asker.1);
        let _ = self.deliver(queue, PacketHeader::default(), &[headers.bytes()]);
    }
}

/// Why a packet of the guest went nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unreachable {
    Port,
    Host,
    Prohibited,
}
