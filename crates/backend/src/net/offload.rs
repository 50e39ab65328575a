//! Checksums and segmentation in software, for a guest that was sent a packet whose work it does not take.

use super::wire::{Checksum, IPV4_HEADER, IpPacket, Segment, TCP, flag, pseudo_header};
use super::{ETHERNET_HEADER, Offloads, PacketHeader};

/// Offsets in headers: IPv4's total length, identification and checksum, IPv6's payload length; TCP's sequence number,
/// flags and checksum.
const V4_LEN: usize = 2;
const V4_ID: usize = 4;
const V4_SUM: usize = 10;
const V6_LEN: usize = 4;
const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
const TCP_SUM: usize = 16;

/// Makes of a packet, with what is left to its receiver, one or more that leave no more than `taken`. One that makes no
/// sense makes none.
pub(super) fn adapt(
    header: PacketHeader,
    packet: &mut [u8],
    taken: Offloads,
    mut each: impl FnMut(PacketHeader, &[u8]),
) {
    let mut needed = Offloads::empty();
    if header.flags & PacketHeader::NEEDS_CHECKSUM != 0 {
        needed |= Offloads::CHECKSUM;
    }
    if header.gso_type & PacketHeader::GSO_ECN != 0 {
        needed |= Offloads::ECN;
    }
    match header.gso_type & !PacketHeader::GSO_ECN {
        PacketHeader::GSO_NONE => {}
        PacketHeader::GSO_TCP4 => needed |= Offloads::TCP4,
        PacketHeader::GSO_TCP6 => needed |= Offloads::TCP6,
        _ => return,
    }
    if taken.contains(needed) {
        return each(header, packet);
    }
    if needed.intersects(Offloads::TCP4 | Offloads::TCP6) {
        // Without a result it was no TCP.
        let _ = segment(packet, usize::from(header.gso_size), |packet| each(PacketHeader::default(), packet));
    } else if complete(header, packet).is_some() {
        each(PacketHeader::default(), packet);
    }
}

/// Completes the checksum; `None` if the header points outside the packet.
fn complete(header: PacketHeader, packet: &mut [u8]) -> Option<()> {
    let start = usize::from(header.csum_start);
    let at = start.checked_add(usize::from(header.csum_offset))?;
    let mut sum = Checksum::default();
    sum.add(packet.get(start..)?);
    // In UDP, zero means "no checksum".
    let sum = match sum.finish() {
        0 => 0xffff,
        sum => sum,
    };
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// Divides a TCP packet into segments of `size` bytes of data.
fn segment(packet: &[u8], size: usize, mut each: impl FnMut(&[u8])) -> Option<()> {
    let ip = IpPacket::parse(packet, packet.len()).filter(|ip| ip.protocol == TCP && ip.fragment.is_none())?;
    let tcp = Segment::parse(packet.get(ip.payload..)?, ip.len)?;
    let (headers, rest) = packet.split_at_checked(ip.payload + tcp.header)?;
    let data = rest.get(..ip.len - tcp.header)?;
    let size = size.max(1);
    let (mut index, mut sequence) = (0u16, tcp.sequence);
    let mut out = Vec::with_capacity(headers.len() + size);
    let mut chunks = data.chunks(size).peekable();
    while let Some(chunk) = chunks.next() {
        out.clear();
        out.extend_from_slice(headers);
        out.extend_from_slice(chunk);
        let len = tcp.header + chunk.len();
        let put = |out: &mut [u8], at: usize, value: u16| out[at..at + 2].copy_from_slice(&value.to_be_bytes());
        if ip.source.is_ipv4() {
            put(&mut out, ETHERNET_HEADER + V4_LEN, (ip.payload - ETHERNET_HEADER + len) as u16);
            let id = u16::from_be_bytes([headers[ETHERNET_HEADER + V4_ID], headers[ETHERNET_HEADER + V4_ID + 1]]);
            put(&mut out, ETHERNET_HEADER + V4_ID, id.wrapping_add(index));
            put(&mut out, ETHERNET_HEADER + V4_SUM, 0);
            let mut sum = Checksum::default();
            sum.add(&out[ETHERNET_HEADER..ip.payload.max(ETHERNET_HEADER + IPV4_HEADER)]);
            put(&mut out, ETHERNET_HEADER + V4_SUM, sum.finish());
        } else {
            put(&mut out, ETHERNET_HEADER + V6_LEN, len as u16);
        }
        out[ip.payload + TCP_SEQUENCE..][..4].copy_from_slice(&sequence.to_be_bytes());
        if chunks.peek().is_some() {
            out[ip.payload + TCP_FLAGS] &= !(flag::FIN | flag::PSH);
        }
        if index > 0 {
            out[ip.payload + TCP_FLAGS] &= !flag::CWR;
        }
        put(&mut out, ip.payload + TCP_SUM, 0);
        let mut sum = pseudo_header(ip.source, ip.destination, TCP, len);
        sum.add(&out[ip.payload..]);
        put(&mut out, ip.payload + TCP_SUM, sum.finish());
        each(&out);
        index = index.wrapping_add(1);
        sequence = sequence.wrapping_add(chunk.len() as u32);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use smoltcp::wire::{Ipv4Packet, Ipv6Packet, TcpPacket};

    use super::*;
    use crate::net::wire::Headers;

    fn packet(source: IpAddr, destination: IpAddr, data: &[u8], flags: u8) -> Vec<u8> {
        let mut headers = Headers::ip(([2; 6], [4; 6]), source, destination, TCP, 20 + data.len(), None);
        headers.push(&[0, 80, 0, 81, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        let mut packet = [headers.bytes(), data].concat();
        let at = headers.len() - 20;
        let sum = pseudo_header(source, destination, TCP, 20 + data.len()).folded();
        packet[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    #[test]
    fn segments_add_up_to_the_whole() {
        let data: Vec<u8> = (0..4000u32).map(|at| (at * 7) as u8).collect();
        let v4 = [IpAddr::from([10, 0, 2, 2]), IpAddr::from([10, 0, 2, 15])];
        let v6 = [IpAddr::from([0xfec0, 0, 0, 0, 0, 0, 0, 2]), IpAddr::from([0xfec0, 0, 0, 0, 0, 0, 0, 0x15])];
        for ([from, to], gso_type) in [(v4, PacketHeader::GSO_TCP4), (v6, PacketHeader::GSO_TCP6)] {
            let mut whole = packet(from, to, &data, flag::ACK | flag::PSH | flag::FIN | flag::CWR);
            let header = PacketHeader { flags: 1, gso_type, gso_size: 1448, csum_offset: 16, ..Default::default() };
            let (mut got, mut flags) = (Vec::new(), Vec::new());
            adapt(header, &mut whole, Offloads::CHECKSUM, |header, packet| {
                assert!(header.is_plain());
                let tcp = if from.is_ipv4() {
                    let ip = Ipv4Packet::new_checked(&packet[14..]).unwrap();
                    assert!(ip.verify_checksum());
                    ip.payload()
                } else {
                    Ipv6Packet::new_checked(&packet[14..]).unwrap().payload()
                };
                let tcp = TcpPacket::new_checked(tcp).unwrap();
                assert!(tcp.verify_checksum(&from.into(), &to.into()));
                assert_eq!(tcp.seq_number().0 as u32, 0xffff_fff0_u32.wrapping_add(got.len() as u32));
                got.extend_from_slice(tcp.payload());
                flags.push((tcp.fin(), tcp.psh(), tcp.cwr()));
            });
            assert_eq!(got, data);
            assert_eq!(flags, [(false, false, true), (false, false, false), (true, true, false)]);
            let mut untouched = 0;
            adapt(header, &mut whole, Offloads::all(), |same, packet| {
                untouched = packet.len();
                assert_eq!(same, header);
            });
            assert_eq!(untouched, whole.len());
        }
    }

    #[test]
    fn checksums_are_completed() {
        let ends = [IpAddr::from([10, 0, 2, 2]), IpAddr::from([10, 0, 2, 15])];
        let mut whole = packet(ends[0], ends[1], b"abc", flag::ACK);
        let header = PacketHeader { flags: 1, csum_start: 34, csum_offset: 16, ..Default::default() };
        let mut count = 0;
        adapt(header, &mut whole, Offloads::empty(), |header, packet| {
            assert!(header.is_plain());
            let tcp = TcpPacket::new_checked(&packet[34..]).unwrap();
            assert!(tcp.verify_checksum(&ends[0].into(), &ends[1].into()));
            count += 1;
        });
        assert_eq!(count, 1);
        for (start, offset) in [(60, 16), (34, 60), (65535, 65535)] {
            let header = PacketHeader { csum_start: start, csum_offset: offset, ..header };
            adapt(header, &mut whole, Offloads::empty(), |_, _| panic!("it makes no sense"));
        }
    }

    #[test]
    fn nonsense_makes_nothing() {
        let header = PacketHeader { flags: 1, gso_type: 1, gso_size: 0, ..Default::default() };
        let whole = packet([10, 0, 2, 2].into(), [10, 0, 2, 15].into(), &[7; 100], flag::ACK);
        for len in 0..54 {
            adapt(header, &mut whole.clone()[..len], Offloads::empty(), |_, _| panic!("cut to {len}"));
        }
        let mut count = 0;
        adapt(header, &mut whole.clone(), Offloads::empty(), |_, _| count += 1);
        assert_eq!(count, 100, "segments of no data at all are made one byte long");
    }
}
