//! The host's name server.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::config::DNS_PORT;

const FILE: &str = "/etc/resolv.conf";

/// The first name server of the host; without any, the host itself (resolv.conf(5)). Read anew each time, for hosts move
/// from network to network.
pub(super) fn server() -> SocketAddr {
    let text = fs::read_to_string(FILE).unwrap_or_default();
    SocketAddr::new(first(&text).unwrap_or(Ipv4Addr::LOCALHOST.into()), DNS_PORT)
}

fn first(text: &str) -> Option<IpAddr> {
    let mut lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    });
    lines.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_usable_server_is_taken() {
        assert_eq!(
            first("# x\nsearch a b\nnameserver fe80::1%eth0\nnameserver 192.0.2.1\nnameserver ::1\n"),
            "192.0.2.1".parse().ok()
        );
        assert_eq!(first("nameserver\n;nameserver 192.0.2.1\n"), None);
    }
}
