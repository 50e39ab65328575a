//! Networks: what a NIC's cable is plugged into.
//!
//! | module | what it does |
//! |---|---|
//! | `packet` | packets in both directions, with the header that tells of work left to the receiver |
//! | `options` | the keys of a NIC, its MAC address |
//! | `sys` | the system calls |
//! | `offload` | checksums and segmentation in software |
//! | `wire` | formats of packets |
//! | `slirp` | user-mode networking: address translation without rights or set-up |
//! | `tap` | Linux tap devices |
//! | `stream` | unix sockets, to other VMs and to passt |
//! | `vale` | a switch between the VMs of one user |
//!
//! One [`NetBackend`] serves one NIC, whatever the NIC's kind. The guest's packets come as scatter lists of guest memory
//! and go to the host without a copy ([`Frame`]). Packets for the guest are handed over when their size is known, in
//! host memory ([`Packet`]), and are copied once: to read them straight into guest memory, room for the largest
//! possible one (64 KiB) would have to be set aside for each.
//!
//! No call blocks. A back end that is full says so and calls [`NetDevice::send_ready`] later; a NIC that has no room
//! says so and calls [`NetBackend::resume`] later.

mod offload;
mod options;
mod packet;
mod slirp;
mod stream;
mod sys;
mod tap;
#[cfg(test)]
mod tests;
mod vale;
mod wire;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use bitflags::bitflags;
use config::ConfigError;

pub use options::{MacAddress, NicOptions};
pub use packet::{Frame, Packet, PacketHeader};

/// Bytes of the largest packet: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_PACKET: usize = 65535 + 18;

/// Bytes of an Ethernet header.
pub const ETHERNET_HEADER: usize = 14;

bitflags! {
    /// Work on packets that can be left to the other side.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Offloads: u8 {
        /// TCP and UDP checksums.
        const CHECKSUM = 1;
        /// Segmentation of TCP over IPv4.
        const TCP4 = 2;
        /// Segmentation of TCP over IPv6.
        const TCP6 = 4;
        /// Segmentation of TCP with congestion notification.
        const ECN = 8;
    }
}

/// What a back end can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Abilities {
    /// Work the guest may leave to it.
    pub send: Offloads,
    /// Work it would like to leave to the guest, as far as the guest can take it.
    pub receive: Offloads,
}

/// Whether the back end took a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Sending {
    /// Taken care of: on its way, or dropped as a network may.
    Taken,
    /// Not taken. [`NetDevice::send_ready`] will be called.
    Busy,
}

/// What became of a packet for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Delivery {
    /// Taken care of: delivered, or dropped as a NIC may.
    Done,
    /// There is no room. [`NetBackend::resume`] will be called.
    NoRoom,
}

/// A NIC, as its back end sees it. Called on the back end's threads, and inside [`NetBackend::send`].
pub trait NetDevice: Send + Sync {
    /// Takes a packet on queue `queue`; queues that the NIC does not use stand for the first.
    fn receive(&self, queue: u16, packet: &Packet<'_>) -> Delivery;
    /// The back end takes packets again, after it said [`Sending::Busy`].
    fn send_ready(&self, queue: u16);
    /// The cable was plugged in or pulled out.
    fn set_link(&self, up: bool);
}

/// The host's side of a NIC.
///
/// Calls may come from several threads, each queue's from one at a time.
pub trait NetBackend: Send + Sync {
    /// What it can do.
    fn abilities(&self) -> Abilities;
    /// Whether there is a link at the start; changes are told by [`NetDevice::set_link`].
    fn link(&self) -> bool;
    /// Says whose packets these are; packets flow from now on.
    fn attach(&self, device: Weak<dyn NetDevice>);
    /// Sends a packet of the guest.
    fn send(&self, queue: u16, frame: &Frame<'_>) -> Sending;
    /// Called when a series of packets has been sent.
    fn flush(&self, queue: u16) {
        let _ = queue;
    }
    /// The NIC has room again.
    fn resume(&self, queue: u16);
    /// Work the guest's driver takes from now on, a part of [`Abilities::receive`].
    fn set_offloads(&self, offloads: Offloads);
}

/// Why a network could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A key of the configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A key that a NIC does not have.
    #[error("Invalid device option \"{0}\"")]
    Option(String),
    /// No MAC address, or none that a NIC can have.
    #[error("Invalid MAC {0}")]
    Mac(String),
    /// None of the known kinds of network.
    #[error(
        "\"{0}\" is no network: use slirp (user-mode NAT), tapN, valeX:PORT (between VMs), unix:/PATH, \
         vhost-user:/PATH, or nothing for a NIC without a link"
    )]
    Unknown(String),
    /// A kind that another system has.
    #[error("\"{0}\": {1}")]
    Elsewhere(String, &'static str),
    /// An option's value makes no sense.
    #[error("{option}=\"{value}\": {why}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value, or the part of it that is wrong.
        value: String,
        /// What is wrong, and what is right.
        why: String,
    },
    /// A tap device cannot be had.
    #[error("cannot {what} tap device {name}{advice}")]
    Tap {
        /// What was being done.
        what: &'static str,
        /// The device.
        name: String,
        /// What can be done about it.
        advice: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A socket file cannot be used.
    #[error("cannot {what} {}{advice}", path.display())]
    Socket {
        /// What was being done.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// What can be done about it.
        advice: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The host refused something else.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// Opens the network that `options` name; `None` for a NIC without one.
///
/// # Errors
/// The network is unknown or cannot be had.
pub fn open(options: &NicOptions) -> Result<Option<Arc<dyn NetBackend>>, NetError> {
    let Some(name) = options.backend.as_deref() else { return Ok(None) };
    match options.kind()? {
        options::Kind::Slirp => Ok(Some(slirp::Slirp::open(options)?)),
        options::Kind::Stream => Ok(Some(stream::Stream::open(name.strip_prefix("unix:").unwrap_or(name), options)?)),
        options::Kind::Switch => Ok(Some(vale::Port::open(name, options)?)),
        options::Kind::VhostUser => {
            Err(NetError::Elsewhere(name.into(), "only virtio-net can be served by a vhost-user back end"))
        }
        options::Kind::Tap => Ok(Some(tap::Tap::open(name, options)?)),
    }
}
