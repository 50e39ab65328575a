//! UDP and echo requests: each pair of ends has a socket of the host, for some time.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};

use super::config::DNS_PORT;

/// How long an exchange is remembered after its last packet.
const LIFE: Duration = Duration::from_secs(120);
/// The same for one question and one answer.
const SHORT_LIFE: Duration = Duration::from_secs(15);

/// Packets taken at a time, before others have their turn.
pub(super) const ROUNDS: usize = 64;

/// An exchange of datagrams.
pub(super) struct Exchange {
    pub(super) guest: SocketAddr,
    /// The other end, as the guest sees it. For echo requests the ports are identifications.
    pub(super) remote: SocketAddr,
    pub(super) queue: u16,
    pub(super) expires: Instant,
    way: Way,
}

enum Way {
    /// A socket that is connected to the other end.
    Own(OwnedFd),
    /// A forwarded port, and who came through it.
    Forwarded(Arc<UdpSocket>, SocketAddr),
}

impl Exchange {
    /// UDP to `target`.
    pub(super) fn udp(ends: (SocketAddr, SocketAddr), target: SocketAddr, now: Instant) -> io::Result<Self> {
        let socket = new_socket(target, None)?;
        Ok(Self::new(ends, Way::Own(socket), now))
    }

    /// UDP from `peer` that came through a forwarded port.
    pub(super) fn forwarded(
        ends: (SocketAddr, SocketAddr),
        socket: Arc<UdpSocket>,
        peer: SocketAddr,
        now: Instant,
    ) -> Self {
        Self::new(ends, Way::Forwarded(socket, peer), now)
    }

    /// Echo requests to `target`, if this user may send them (icmp(7), `ping_group_range`).
    pub(super) fn echo(ends: (SocketAddr, SocketAddr), target: SocketAddr, now: Instant) -> io::Result<Self> {
        let protocol = if target.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
        let socket = new_socket(SocketAddr::new(target.ip(), 0), Some(protocol))?;
        Ok(Self::new(ends, Way::Own(socket), now))
    }

    fn new((guest, remote): (SocketAddr, SocketAddr), way: Way, now: Instant) -> Self {
        let mut exchange = Self { guest, remote, queue: 0, expires: now, way };
        exchange.touch(now);
        exchange
    }

    /// Something came or went.
    pub(super) fn touch(&mut self, now: Instant) {
        let short = self.remote.port() == DNS_PORT || self.remote.port() == 0;
        self.expires = now + if short { SHORT_LIFE } else { LIFE };
    }

    /// The socket to wait on, if it has one of its own.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.way {
            Way::Own(socket) => Some(socket.as_fd()),
            Way::Forwarded(..) => None,
        }
    }

    /// Sends to the other end; what the host does not take now is lost.
    pub(super) fn send(&self, data: &[u8]) -> io::Result<()> {
        let sent = match &self.way {
            Way::Own(socket) => send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map_err(io::Error::from),
            Way::Forwarded(socket, peer) => socket.send_to(data, *peer),
        };
        match sent {
            Err(why) if why.kind() != io::ErrorKind::WouldBlock => Err(why),
            _ => Ok(()),
        }
    }

    /// Takes a datagram of the other end.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.way {
            Way::Own(socket) => Ok(recv(socket, buffer, RecvFlags::DONTWAIT)?.0),
            Way::Forwarded(..) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

fn new_socket(target: SocketAddr, protocol: Option<rustix::net::Protocol>) -> io::Result<OwnedFd> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::DGRAM, flags, protocol)?;
    connect(&socket, &target)?;
    Ok(socket)
}
