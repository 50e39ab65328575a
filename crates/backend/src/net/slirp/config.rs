//! The options of user-mode networking, and its addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::net::NetError;

/// The guest's network.
pub(super) const NETWORK: [u8; 3] = [10, 0, 2];
/// The host, which is also the router and the DHCP server. The guest reaches the host's loopback address here.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub(super) const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The first address that is given out.
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The same for IPv6, in the network fec0::/64.
pub(super) const HOST6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
pub(super) const DNS6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 3);
/// The router's address on the link, from which it advertises itself.
pub(super) const LINK6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Port of name servers.
pub(super) const DNS_PORT: u16 = 53;

/// What the guest's address stands for on the host's side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// The host.
    Host,
    /// The name server.
    Dns,
    /// Nothing: an address of the guest's own network, or one that is no host's.
    Nowhere,
    /// A host elsewhere.
    Outside,
}

/// Where `address` is.
pub(super) fn place(address: IpAddr) -> Place {
    match address {
        IpAddr::V4(HOST) | IpAddr::V6(HOST6 | LINK6) => Place::Host,
        IpAddr::V4(DNS) | IpAddr::V6(DNS6) => Place::Dns,
        IpAddr::V4(v4) => {
            let nowhere =
                v4.octets()[..3] == NETWORK || v4.octets()[0] == 0 || v4.is_loopback() || v4.octets()[0] >= 224;
            if nowhere { Place::Nowhere } else { Place::Outside }
        }
        IpAddr::V6(v6) => {
            let top = v6.segments()[0];
            // Link-local and site-local addresses, multicast, loopback, and IPv4 in disguise.
            let nowhere = top & 0xff80 == 0xfe80 || top >= 0xff00 || v6.is_loopback() || v6.to_ipv4().is_some();
            if nowhere { Place::Nowhere } else { Place::Outside }
        }
    }
}

/// A port of the host that leads to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Forward {
    pub(super) tcp: bool,
    /// Where the host listens; port 0 takes a free one.
    pub(super) host: SocketAddr,
    /// Where the guest does.
    pub(super) guest: SocketAddr,
}

/// Reads a list of `PROTO:[HADDR]:HPORT-[GADDR]:GPORT`, with `;` between them. IPv6 addresses are in brackets.
pub(super) fn parse_forwards(list: &str) -> Result<Vec<Forward>, NetError> {
    list.split(';').map(str::trim).filter(|rule| !rule.is_empty()).map(parse_forward).collect()
}

fn parse_forward(rule: &str) -> Result<Forward, NetError> {
    let wrong = |why: &str| NetError::Value {
        option: "hostfwd",
        value: rule.into(),
        why: format!("{why}; write PROTO:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT, as in tcp:127.0.0.1:2222-:22"),
    };
    let (protocol, rest) = rule.split_once(':').ok_or_else(|| wrong("no protocol"))?;
    let tcp = match protocol {
        "tcp" => true,
        "udp" => false,
        _ => return Err(wrong(&format!("\"{protocol}\" is neither tcp nor udp"))),
    };
    let (host, guest) = rest.split_once('-').ok_or_else(|| wrong("no \"-\" between host and guest"))?;
    let guest = parse_end(guest, GUEST.into()).ok_or_else(|| wrong(&format!("\"{guest}\" is no address and port")))?;
    let any = if guest.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let host = parse_end(host, any).ok_or_else(|| wrong(&format!("\"{host}\" is no address and port")))?;
    if guest.port() == 0 {
        return Err(wrong("the guest has no port 0"));
    }
    if matches!(guest.ip(), IpAddr::V4(v4) if v4.octets()[..3] != NETWORK) {
        return Err(wrong(&format!("{} is not in the guest's network 10.0.2.0/24", guest.ip())));
    }
    if guest.is_ipv4() != host.is_ipv4() && !host.ip().is_unspecified() && !host.ip().is_loopback() {
        return Err(wrong("an IPv4 and an IPv6 address"));
    }
    Ok(Forward { tcp, host, guest })
}

/// Reads the address of a name server, with or without a port.
pub(super) fn parse_dns(text: &str) -> Result<SocketAddr, NetError> {
    let address = text.parse().ok().or_else(|| Some(SocketAddr::new(text.parse().ok()?, DNS_PORT)));
    address.ok_or_else(|| NetError::Value {
        option: "dns",
        value: text.into(),
        why: "write the address of a name server, as in 192.0.2.1, 127.0.0.1:5353 or 2001:db8::1".into(),
    })
}

/// `[ADDR]:PORT`.
fn parse_end(text: &str, default: IpAddr) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|_| port.bytes().all(|digit| digit.is_ascii_digit()))?;
    let address = match address.strip_prefix('[') {
        _ if address.is_empty() => default,
        Some(rest) => IpAddr::V6(rest.strip_suffix(']')?.parse().ok()?),
        None => IpAddr::V4(address.parse().ok()?),
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards() {
        let list = parse_forwards("tcp::2222-:22; udp:127.0.0.1:0-10.0.2.20:53;tcp:[::1]:80-[fec0::15]:8080;").unwrap();
        let all: Vec<_> = list.iter().map(|f| (f.tcp, f.host.to_string(), f.guest.to_string())).collect();
        assert_eq!(
            all,
            [
                (true, "0.0.0.0:2222".into(), "10.0.2.15:22".into()),
                (false, "127.0.0.1:0".into(), "10.0.2.20:53".into()),
                (true, "[::1]:80".into(), "[fec0::15]:8080".into()),
            ]
        );
        assert_eq!(parse_forwards("").unwrap(), []);
        for (bad, word) in [
            ("2222-22", "no protocol"),
            ("sctp::1-:2", "neither tcp nor udp"),
            ("tcp::2222", "no \"-\""),
            ("tcp:localhost:2222-:22", "\"localhost:2222\" is no address and port"),
            ("tcp::70000-:22", "is no address and port"),
            ("tcp::+1-:22", "is no address and port"),
            ("tcp::1-:0", "no port 0"),
            ("tcp::1-192.168.1.1:22", "not in the guest's network"),
            ("tcp:192.168.1.1:1-[fec0::15]:22", "an IPv4 and an IPv6 address"),
        ] {
            let error = parse_forwards(bad).unwrap_err().to_string();
            assert!(error.contains(word) && error.starts_with(&format!("hostfwd=\"{bad}\"")), "{error}");
        }
    }

    #[test]
    fn name_servers() {
        for (text, want) in [("192.0.2.1", "192.0.2.1:53"), ("127.0.0.1:5353", "127.0.0.1:5353"), ("::1", "[::1]:53")] {
            assert_eq!(parse_dns(text).unwrap().to_string(), want);
        }
        assert!(parse_dns("dns.example").unwrap_err().to_string().starts_with("dns=\"dns.example\": write"));
    }

    #[test]
    fn places() {
        for (address, want) in [
            ("10.0.2.2", Place::Host),
            ("10.0.2.3", Place::Dns),
            ("10.0.2.255", Place::Nowhere),
            ("127.0.0.1", Place::Nowhere),
            ("0.1.2.3", Place::Nowhere),
            ("224.0.0.251", Place::Nowhere),
            ("255.255.255.255", Place::Nowhere),
            ("192.0.2.1", Place::Outside),
            ("10.0.3.2", Place::Outside),
            ("fec0::2", Place::Host),
            ("fe80::2", Place::Host),
            ("fec0::3", Place::Dns),
            ("fe80::9", Place::Nowhere),
            ("ff02::1", Place::Nowhere),
            ("::1", Place::Nowhere),
            ("::ffff:127.0.0.1", Place::Nowhere),
            ("2001:db8::1", Place::Outside),
        ] {
            assert_eq!(place(address.parse().unwrap()), want, "{address}");
        }
    }
}
