//! What the virtual host does itself: ARP, DHCP (RFC 2131, 2132), neighbour discovery and router advertisement (RFC 4861,
//! 8106), echo (RFC 792, 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::config::{DNS, DNS6, GUEST, HOST, HOST6, LINK6, NETWORK, Place, place};
use super::link::{HOST_MAC, Link};
use crate::net::wire::Mac;

pub(super) const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// Addresses that are given out.
const LEASES: u8 = 32;
const LEASE_SECONDS: u32 = 86400;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const DHCP_FIXED: usize = 236;

/// Who was given which address.
#[derive(Default)]
pub(super) struct Leases(Vec<Mac>);

impl Leases {
    /// The address of `mac`, the next free one if it has none. When all are out, the last serves all others.
    fn address(&mut self, mac: Mac) -> Ipv4Addr {
        let at = self.0.iter().position(|known| *known == mac).unwrap_or_else(|| {
            if self.0.len() < usize::from(LEASES) {
                self.0.push(mac);
            }
            self.0.len() - 1
        });
        let [a, b, c, d] = GUEST.octets();
        Ipv4Addr::new(a, b, c, d + at as u8)
    }
}

/// Answers ARP requests for our addresses; tells who asks.
pub(super) fn arp(link: &Link, queue: u16, packet: &[u8]) -> Option<(IpAddr, Mac)> {
    let [0, 1, 8, 0, 6, 4, 0, operation, rest @ ..] = packet.get(..28)? else { return None };
    let (sender_mac, rest) = rest.split_first_chunk::<6>()?;
    let (sender, rest) = rest.split_first_chunk::<4>()?;
    let target: [u8; 4] = *rest.get(6..)?.first_chunk()?;
    let ours = [HOST.octets(), DNS.octets()].contains(&target);
    if *operation == 1 && ours {
        link.arp_answer(queue, target, (*sender_mac, *sender));
    }
    (sender[..3] == NETWORK).then(|| (Ipv4Addr::from(*sender).into(), *sender_mac))
}

mod dhcp {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const INFORM: u8 = 8;
}

/// Answers a DHCP message. In a restricted network, the guest is told of no router and no name server.
pub(super) fn dhcp(link: &Link, leases: &mut Leases, queue: u16, message: &[u8], restricted: bool) {
    let answer = dhcp_answer(leases, message, restricted, link.mtu());
    if let Some((answer, to)) = answer {
        let (from, to) = (SocketAddr::new(HOST.into(), DHCP_SERVER), SocketAddr::new(to.into(), DHCP_CLIENT));
        let _ = link.udp(queue, from, to, &answer);
    }
}

fn dhcp_answer(leases: &mut Leases, message: &[u8], restricted: bool, mtu: usize) -> Option<(Vec<u8>, Ipv4Addr)> {
    let (fixed, options) = message.split_at_checked(DHCP_FIXED)?;
    let options = options.strip_prefix(&COOKIE)?;
    if fixed[..3] != [1, 1, 6] {
        return None;
    }
    let mac: Mac = *fixed.get(28..)?.first_chunk()?;
    let client = Ipv4Addr::from(*fixed.get(12..)?.first_chunk::<4>()?);
    let server = address_option(options, 54);
    let lease = leases.address(mac);
    let kind = match *option(options, 53)? {
        [dhcp::DISCOVER] => dhcp::OFFER,
        // For another server.
        [dhcp::REQUEST] if server.is_some_and(|server| server != HOST) => return None,
        [dhcp::REQUEST] => {
            let wanted = address_option(options, 50).unwrap_or(client);
            if wanted == lease { dhcp::ACK } else { dhcp::NAK }
        }
        [dhcp::INFORM] => dhcp::ACK,
        _ => return None,
    };
    let inform = *option(options, 53)? == [dhcp::INFORM];
    let mut answer = vec![0; DHCP_FIXED];
    answer[..4].copy_from_slice(&[2, 1, 6, 0]);
    answer[4..8].copy_from_slice(&fixed[4..8]);
    answer[10..12].copy_from_slice(&fixed[10..12]);
    answer[12..16].copy_from_slice(&client.octets());
    if kind != dhcp::NAK && !inform {
        answer[16..20].copy_from_slice(&lease.octets());
    }
    answer[20..24].copy_from_slice(&HOST.octets());
    answer[28..34].copy_from_slice(&mac);
    answer.extend(COOKIE);
    let mut put = |code: u8, value: &[u8]| {
        answer.extend([code, value.len() as u8]);
        answer.extend(value);
    };
    put(53, &[kind]);
    put(54, &HOST.octets());
    if kind != dhcp::NAK {
        put(1, &[255, 255, 255, 0]);
        if !restricted {
            put(3, &HOST.octets());
            put(6, &DNS.octets());
        }
        put(26, &(mtu.min(usize::from(u16::MAX)) as u16).to_be_bytes());
        if !inform {
            put(51, &LEASE_SECONDS.to_be_bytes());
        }
    }
    answer.push(255);
    // Old clients want at least this much (RFC 1542, 2.1).
    answer.resize(answer.len().max(300), 0);
    // A client that cannot be reached under its address yet listens to broadcasts; none of ours can do without.
    let to = if client.is_unspecified() || kind == dhcp::NAK { Ipv4Addr::BROADCAST } else { client };
    Some((answer, to))
}

/// The value of a DHCP option.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        options = match options {
            [0, rest @ ..] => rest,
            [255, ..] => return None,
            [code, len, rest @ ..] => {
                let (value, rest) = rest.split_at_checked(usize::from(*len))?;
                if *code == wanted {
                    return Some(value);
                }
                rest
            }
            _ => return None,
        }
    }
}

fn address_option(options: &[u8], wanted: u8) -> Option<Ipv4Addr> {
    option(options, wanted)?.first_chunk::<4>().copied().map(Ipv4Addr::from)
}

/// Answers an echo request to one of our addresses; `false` if it is for somebody else.
pub(super) fn echo(link: &Link, queue: u16, guest: IpAddr, to: IpAddr, message: &[u8]) -> bool {
    if !matches!(place(to), Place::Host | Place::Dns) {
        return false;
    }
    let mut answer = message.to_vec();
    if let Some(kind) = answer.first_mut() {
        *kind = if guest.is_ipv4() { 0 } else { 129 };
    }
    link.icmp(queue, to, guest, &mut answer);
    true
}

/// ICMPv6 messages of neighbour discovery: answers those that concern us.
pub(super) fn neighbours(link: &Link, queue: u16, guest: Ipv6Addr, message: &[u8], restricted: bool) {
    match message.first() {
        Some(133) => {
            let to = if guest.is_unspecified() { Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1) } else { guest };
            link.icmp(queue, LINK6.into(), to.into(), &mut advertisement(link.mtu() as u32, restricted));
        }
        Some(135) => {
            let Some(target) = message.get(8..).and_then(|rest| rest.first_chunk::<16>()) else { return };
            let target = Ipv6Addr::from(*target);
            if [HOST6, DNS6, LINK6].contains(&target) && !guest.is_unspecified() {
                // Router, solicited, override.
                let mut answer = vec![136, 0, 0, 0, 0xe0, 0, 0, 0];
                answer.extend(target.octets());
                answer.extend([2, 1]);
                answer.extend(HOST_MAC);
                link.icmp(queue, target.into(), guest.into(), &mut answer);
            }
        }
        _ => {}
    }
}

/// A router advertisement: the prefix, from which guests make their addresses; the router, MTU and name server.
fn advertisement(mtu: u32, restricted: bool) -> Vec<u8> {
    let lifetime: u16 = if restricted { 0 } else { 1800 };
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(HOST_MAC);
    message.extend([5, 1, 0, 0]);
    message.extend(mtu.to_be_bytes());
    // On this link, and for making addresses.
    message.extend([3, 4, 64, 0xc0]);
    message.extend(LEASE_SECONDS.to_be_bytes());
    message.extend(LEASE_SECONDS.to_be_bytes());
    message.extend([0; 4]);
    message.extend(Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0).octets());
    if !restricted {
        message.extend([25, 3, 0, 0]);
        message.extend(LEASE_SECONDS.to_be_bytes());
        message.extend(DNS6.octets());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, mac: u8, more: &[u8]) -> Vec<u8> {
        let mut message = vec![0; DHCP_FIXED];
        message[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
        message[28..34].copy_from_slice(&[2, 0, 0, 0, 0, mac]);
        message.extend(COOKIE);
        message.extend([53, 1, kind]);
        message.extend(more);
        message.push(255);
        message
    }

    #[test]
    fn leases_stay_and_differ() {
        let mut leases = Leases::default();
        let mut ask = |kind, mac, more: &[u8]| {
            let (answer, to) = dhcp_answer(&mut leases, &message(kind, mac, more), false, 1500)?;
            let options = answer[DHCP_FIXED + 4..].to_vec();
            Some((option(&options, 53)?[0], answer[19], to.is_broadcast()))
        };
        assert_eq!(ask(dhcp::DISCOVER, 1, &[]), Some((dhcp::OFFER, 15, true)));
        assert_eq!(ask(dhcp::DISCOVER, 2, &[]), Some((dhcp::OFFER, 16, true)));
        assert_eq!(ask(dhcp::REQUEST, 1, &[50, 4, 10, 0, 2, 15]), Some((dhcp::ACK, 15, true)));
        assert_eq!(ask(dhcp::REQUEST, 2, &[50, 4, 10, 0, 2, 15]), Some((dhcp::NAK, 0, true)));
        assert_eq!(ask(dhcp::REQUEST, 2, &[54, 4, 10, 0, 2, 9]), None, "for another server");
        assert_eq!(ask(dhcp::INFORM, 2, &[]), Some((dhcp::ACK, 0, true)));
        assert_eq!(ask(4, 2, &[]), None);
        for mac in 3..=255 {
            assert!(ask(dhcp::DISCOVER, mac, &[]).is_some_and(|(_, last, _)| (17..=46).contains(&last)));
        }
    }

    #[test]
    fn a_restricted_guest_is_told_of_no_way_out() {
        let codes = |restricted| {
            let (answer, _) = dhcp_answer(&mut Leases::default(), &message(1, 1, &[]), restricted, 9000).unwrap();
            let options = &answer[DHCP_FIXED + 4..];
            assert_eq!(option(options, 26), Some(&[0x23, 0x28][..]));
            [3, 6].map(|code| option(options, code).is_some())
        };
        assert_eq!((codes(false), codes(true)), ([true; 2], [false; 2]));
        assert!(advertisement(1500, false).len() == advertisement(1500, true).len() + 24);
    }

    #[test]
    fn cut_messages_are_none() {
        let whole = message(3, 1, &[50, 4, 10, 0, 2, 15, 12, 9, 1]);
        for len in 0..whole.len() {
            let _ = dhcp_answer(&mut Leases::default(), &whole[..len], false, 1500);
        }
        assert_eq!(option(&[12, 9, 1], 53), None);
        assert_eq!(option(&[0, 0, 53, 1, 7], 53), Some(&[7][..]));
    }
}
