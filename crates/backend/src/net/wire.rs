//! Packets: reading those of the guest, making those for it. Formats: IEEE 802.3, RFC 791 (IPv4), RFC 8200 (IPv6),
//! RFC 9293 (TCP), RFC 768 (UDP), RFC 1071 (checksums).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::ETHERNET_HEADER;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
const IPV6_FRAGMENT: u8 = 44;
const IPV6_FRAGMENT_HEADER: usize = 8;

pub(super) const IPV4_HEADER: usize = 20;
pub(super) const IPV6_HEADER: usize = 40;
pub(super) const TCP_HEADER: usize = 20;
pub(super) const UDP_HEADER: usize = 8;

const HOP_LIMIT: u8 = 64;
/// Neighbour discovery works on one link only, which this proves (RFC 4861, 6.1).
const LINK_HOP_LIMIT: u8 = 255;

pub(super) type Mac = [u8; 6];

/// Bytes that hold all headers of any packet up to TCP's end.
pub(super) const HEAD: usize = 192;

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

fn long(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// Which part of an IP packet this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fragment {
    pub(super) id: u32,
    /// In bytes.
    pub(super) offset: usize,
    /// Others follow.
    pub(super) more: bool,
}

/// An IP packet's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct IpPacket {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    /// Where its payload begins in the frame, and how long that is.
    pub(super) payload: usize,
    pub(super) len: usize,
    /// If it is a part of a packet.
    pub(super) fragment: Option<Fragment>,
}

impl IpPacket {
    /// Reads the header behind an Ethernet header, in a frame of `frame_len` bytes that begins with `head`.
    pub(super) fn parse(head: &[u8], frame_len: usize) -> Option<Self> {
        match word(head, 12)? {
            ETHERTYPE_IPV4 => Self::parse_v4(head, frame_len),
            ETHERTYPE_IPV6 => Self::parse_v6(head, frame_len),
            _ => None,
        }
    }

    fn parse_v4(head: &[u8], frame_len: usize) -> Option<Self> {
        let header: &[u8; IPV4_HEADER] = head.get(ETHERNET_HEADER..)?.first_chunk()?;
        let header_len = usize::from(header[0] & 15) * 4;
        let total = usize::from(word(header, 2)?);
        if header[0] >> 4 != 4 || header_len < IPV4_HEADER || total < header_len || frame_len < ETHERNET_HEADER + total
        {
            return None;
        }
        let (flags, id) = (word(header, 6)?, word(header, 4)?);
        let fragment = Fragment { id: id.into(), offset: usize::from(flags & 0x1fff) * 8, more: flags & 0x2000 != 0 };
        let [.., s0, s1, s2, s3, d0, d1, d2, d3] = *header;
        Some(Self {
            source: Ipv4Addr::new(s0, s1, s2, s3).into(),
            destination: Ipv4Addr::new(d0, d1, d2, d3).into(),
            protocol: header[9],
            payload: ETHERNET_HEADER + header_len,
            len: total - header_len,
            fragment: (fragment.offset > 0 || fragment.more).then_some(fragment),
        })
    }

    fn parse_v6(head: &[u8], frame_len: usize) -> Option<Self> {
        let header: &[u8; IPV6_HEADER] = head.get(ETHERNET_HEADER..)?.first_chunk()?;
        let len = usize::from(word(header, 4)?);
        if header[0] >> 4 != 6 || frame_len < ETHERNET_HEADER + IPV6_HEADER + len {
            return None;
        }
        let address = |at: usize| header.get(at..)?.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes));
        let mut packet = Self {
            source: address(8)?.into(),
            destination: address(24)?.into(),
            protocol: header[6],
            payload: ETHERNET_HEADER + IPV6_HEADER,
            len,
            fragment: None,
        };
        if packet.protocol == IPV6_FRAGMENT {
            let fragment: &[u8; IPV6_FRAGMENT_HEADER] = head.get(packet.payload..)?.first_chunk()?;
            let place = word(fragment, 2)?;
            packet.protocol = fragment[0];
            packet.payload += IPV6_FRAGMENT_HEADER;
            packet.len = len.checked_sub(IPV6_FRAGMENT_HEADER)?;
            packet.fragment =
                Some(Fragment { id: long(fragment, 4)?, offset: usize::from(place & !7), more: place & 1 != 0 });
        }
        Some(packet)
    }
}

/// TCP's flags (RFC 9293, 3.1).
pub(super) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const PSH: u8 = 8;
    pub(crate) const ACK: u8 = 16;
    pub(crate) const CWR: u8 = 128;
}

/// A TCP segment's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Segment {
    pub(super) source: u16,
    pub(super) destination: u16,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Bytes of the header.
    pub(super) header: usize,
    pub(super) mss: Option<u16>,
    pub(super) scale: Option<u8>,
}

impl Segment {
    /// Reads the header of a segment of `len` bytes that begins with `bytes`.
    pub(super) fn parse(bytes: &[u8], len: usize) -> Option<Self> {
        let fixed: &[u8; TCP_HEADER] = bytes.first_chunk()?;
        let header = usize::from(fixed[12] >> 4) * 4;
        if header < TCP_HEADER || header > len {
            return None;
        }
        let mut segment = Self {
            source: word(fixed, 0)?,
            destination: word(fixed, 2)?,
            sequence: long(fixed, 4)?,
            acknowledgement: long(fixed, 8)?,
            flags: fixed[13],
            window: word(fixed, 14)?,
            header,
            mss: None,
            scale: None,
        };
        segment.read_options(bytes.get(TCP_HEADER..header)?);
        Some(segment)
    }

    /// Reads the options (RFC 9293, 3.2, and RFC 7323, 2.2); what makes no sense ends them.
    fn read_options(&mut self, mut options: &[u8]) {
        loop {
            options = match options {
                [1, rest @ ..] => rest,
                [2, 4, a, b, rest @ ..] => {
                    self.mss = Some(u16::from_be_bytes([*a, *b]));
                    rest
                }
                [3, 3, scale, rest @ ..] => {
                    self.scale = Some((*scale).min(14));
                    rest
                }
                [0, ..] | [] | [_] => return,
                [_, len, ..] => match options.get(usize::from(*len).max(2)..) {
                    Some(rest) => rest,
                    None => return,
                },
            }
        }
    }
}

/// Ports and payload length of a UDP datagram of at most `len` bytes that begins with `bytes`.
pub(super) fn parse_udp(bytes: &[u8], len: usize) -> Option<(u16, u16, usize)> {
    let said = usize::from(word(bytes, 4)?);
    let payload = said.checked_sub(UDP_HEADER).filter(|_| said <= len)?;
    Some((word(bytes, 0)?, word(bytes, 2)?, payload))
}

/// A ones' complement sum of 16-bit words, over any number of pieces.
#[derive(Clone, Copy, Default)]
pub(super) struct Checksum {
    sum: u64,
    odd: bool,
}

impl Checksum {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.sum += u64::from(*first);
            self.odd = false;
            bytes = rest;
        }
        let (quads, rest) = bytes.as_chunks::<4>();
        self.sum += quads.iter().map(|quad| u64::from(u32::from_be_bytes(*quad))).sum::<u64>();
        let mut pairs = rest.chunks_exact(2);
        self.sum += pairs.by_ref().map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u64>();
        if let [last] = pairs.remainder() {
            self.sum += u64::from(*last) << 8;
            self.odd = true;
        }
    }

    /// The sum, folded, not inverted.
    pub(super) fn folded(self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    pub(super) fn finish(self) -> u16 {
        !self.folded()
    }
}

/// The sum of a pseudo header.
pub(super) fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> Checksum {
    let mut sum = Checksum::default();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            sum.add(&source.octets());
            sum.add(&destination.octets());
        }
        (source, destination) => {
            for address in [source, destination] {
                if let IpAddr::V6(address) = address {
                    sum.add(&address.octets());
                }
            }
        }
    }
    sum.add(&(len as u32).to_be_bytes());
    sum.add(&[0, protocol]);
    sum
}

/// Headers of a packet for the guest, growing from the front.
pub(super) struct Headers {
    bytes: [u8; 128],
    len: usize,
}

impl Headers {
    /// An Ethernet header.
    pub(super) fn ethernet(to: Mac, from: Mac, kind: u16) -> Self {
        let mut headers = Self { bytes: [0; 128], len: 0 };
        headers.push(&to);
        headers.push(&from);
        headers.push(&kind.to_be_bytes());
        headers
    }

    /// Ethernet and IP headers of a packet with `len` bytes of payload. `part`: identification and offset, in the form of
    /// the header's flags, of a part of an IPv4 packet.
    pub(super) fn ip(
        (to, from): (Mac, Mac),
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        len: usize,
        part: Option<(u16, u16)>,
    ) -> Self {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut headers = Self::ethernet(to, from, ETHERTYPE_IPV4);
                let start = headers.len;
                headers.push(&[0x45, 0]);
                headers.push(&((IPV4_HEADER + len) as u16).to_be_bytes());
                // Without a part: one that must not be divided.
                let (id, flags) = part.unwrap_or((0, 0x4000));
                headers.push(&id.to_be_bytes());
                headers.push(&flags.to_be_bytes());
                headers.push(&[HOP_LIMIT, protocol, 0, 0]);
                headers.push(&source.octets());
                headers.push(&destination.octets());
                let mut sum = Checksum::default();
                sum.add(&headers.bytes[start..headers.len]);
                headers.put(start + 10, sum.finish());
                headers
            }
            (source, destination) => {
                let mut headers = Self::ethernet(to, from, ETHERTYPE_IPV6);
                headers.push(&[0x60, 0, 0, 0]);
                headers.push(&(len as u16).to_be_bytes());
                headers.push(&[protocol, if protocol == ICMPV6 { LINK_HOP_LIMIT } else { HOP_LIMIT }]);
                for address in [source, destination] {
                    if let IpAddr::V6(address) = address {
                        headers.push(&address.octets());
                    }
                }
                headers
            }
        }
    }

    /// Appends bytes; there is room for the headers of every protocol here.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            to.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }

    /// Overwrites a word.
    pub(super) fn put(&mut self, at: usize, value: u16) {
        if let Some(to) = self.bytes.get_mut(at..at + 2) {
            to.copy_from_slice(&value.to_be_bytes());
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Bytes of an IP header for addresses like this one.
pub(super) fn ip_header(address: &SocketAddr) -> usize {
    if address.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_the_same_however_the_bytes_are_divided() {
        // The example of RFC 1071, 3.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        let mut sum = Checksum::default();
        sum.add(&bytes);
        assert_eq!(sum.folded(), 0xddf2);
        let bytes: Vec<u8> = (0..101u8).map(|at| at.wrapping_mul(37)).collect();
        let whole = {
            let mut sum = Checksum::default();
            sum.add(&bytes);
            sum.finish()
        };
        for cut in 0..bytes.len() {
            let mut sum = Checksum::default();
            sum.add(&bytes[..cut]);
            sum.add(&bytes[cut..]);
            assert_eq!(sum.finish(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn options_that_make_no_sense_end_the_list() {
        let scan = |options: &[u8]| {
            let mut segment = Segment::default();
            segment.read_options(options);
            (segment.mss, segment.scale)
        };
        assert_eq!(scan(&[2, 4, 5, 0xb4, 1, 3, 3, 7]), (Some(1460), Some(7)));
        assert_eq!(scan(&[4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 99]), (None, Some(14)));
        assert_eq!(scan(&[8, 0, 8, 0, 2, 4, 1, 0]), (Some(256), None));
        assert_eq!(scan(&[8, 200, 3, 3, 7]), (None, None));
        assert_eq!(scan(&[0, 3, 3, 7]), (None, None));
        assert_eq!(scan(&[2, 4, 1]), (None, None));
    }
}
