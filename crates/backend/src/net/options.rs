//! The keys of a NIC.

use std::fmt;
use std::path::Path;

use config::pci::PciAddress;
use config::{Config, NodeRef};
use md5::{Digest, Md5};

use super::NetError;

/// Keys of all NICs; `bootindex` is for the firmware, not for the NIC.
const KEYS: &[&str] = &[
    "device",
    "backend",
    "type",
    "mac",
    "mtu",
    "bootindex",
    "path",
    "peerhook",
    "socket",
    "hook",
    "hostfwd",
    "open",
    "dns",
    "listen",
];

/// The first half of generated addresses: FreeBSD's.
const OUI: [u8; 3] = [0x58, 0x9c, 0xfc];

/// Smallest and largest MTU of a NIC, in bytes: what IPv4 demands (RFC 791), and what an Ethernet frame's length can be.
const MTU: std::ops::RangeInclusive<u16> = 68..=65535;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Reads six hexadecimal bytes with colons between them; they must be an address that one NIC can have.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str) -> Result<Self, NetError> {
        let wrong = || NetError::Mac(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or_else(wrong)?;
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(wrong)?;
        }
        let multicast = bytes[0] & 1 != 0;
        if parts.next().is_some() || multicast || bytes == [0; 6] { Err(wrong()) } else { Ok(Self(bytes)) }
    }

    /// The address of a NIC that was given none: it follows from the NIC's place and the VM's name, so that it stays.
    pub fn generate(slot: u8, func: u8, vm: &str) -> Self {
        let hash = Md5::digest(format!("{slot}-{func}-{vm}"));
        let [a, b, c] = OUI;
        Self([a, b, c, hash[0], hash[1], hash[2]])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The kinds of network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Slirp,
    Stream,
    Switch,
    Tap,
    VhostUser,
}

/// How to make a NIC and what to plug it into.
#[derive(Clone, Debug)]
pub struct NicOptions {
    /// The network; none for a NIC without a link.
    pub backend: Option<String>,
    /// `type`, where it was given.
    kind: Option<String>,
    /// Its address.
    pub mac: MacAddress,
    /// Largest IP packet in bytes, where it was given.
    pub mtu: Option<u16>,
    /// slirp: ports of the host that lead to the guest.
    pub(super) forwards: Option<String>,
    /// slirp: the guest reaches more than what comes through these ports.
    pub(super) open: bool,
    /// slirp: the name server, instead of the host's.
    pub(super) dns: Option<String>,
    /// unix: make the socket and wait there, instead of connecting to it.
    pub(super) listen: bool,
    /// Pairs of queues, at least one.
    pub queues: u16,
    /// For messages and names of threads: "net-SLOT:FUNC".
    pub name: String,
}

impl NicOptions {
    /// Reads the keys of a NIC's node. Besides those it may have the keys of the emulation, `others`.
    ///
    /// # Errors
    /// A key that is none, or with a value that cannot be.
    pub fn from_node(
        config: &Config,
        node: &NodeRef<'_>,
        address: PciAddress,
        others: &[&str],
    ) -> Result<Self, NetError> {
        if let Some(unknown) = node.keys().find(|key| !KEYS.contains(key) && !others.contains(key)) {
            return Err(NetError::Option(unknown.into()));
        }
        let mac = match node.get_str("mac") {
            Some(text) => MacAddress::parse(&text)?,
            None => {
                let vm = config.get_str("name").unwrap_or_default();
                MacAddress::generate(address.slot, address.func, &vm)
            }
        };
        Ok(Self {
            backend: node.get_str("backend").filter(|name| !name.is_empty()),
            kind: node.get_str("type"),
            mac,
            mtu: node.get_int("mtu", MTU)?,
            forwards: node.get_str("hostfwd"),
            open: node.bool_or("open", false)?,
            dns: node.get_str("dns"),
            listen: node.bool_or("listen", false)?,
            queues: 1,
            name: format!("net-{}:{}", address.slot, address.func),
        })
    }

    /// The socket of a process that shall serve the NIC's queues itself, for NICs that can be served so.
    pub fn vhost_user(&self) -> Option<&Path> {
        let name = self.backend.as_deref()?;
        let is_kind = self.kind().is_ok_and(|kind| kind == Kind::VhostUser);
        is_kind.then(|| Path::new(name.strip_prefix("vhost-user:").unwrap_or(name)))
    }

    /// The kind of network: `type`, or what the name begins with.
    pub(super) fn kind(&self) -> Result<Kind, NetError> {
        let name = self.backend.as_deref().unwrap_or_default();
        let elsewhere = |why| Err(NetError::Elsewhere(name.into(), why));
        match self.kind.as_deref().unwrap_or(name) {
            "slirp" => Ok(Kind::Slirp),
            kind if kind.starts_with("unix") => Ok(Kind::Stream),
            kind if kind == "vhost-user" || kind.starts_with("vhost-user:") => Ok(Kind::VhostUser),
            kind if kind.starts_with("vale") => Ok(Kind::Switch),
            kind if kind.starts_with("tap") || kind.starts_with("vmnet") => Ok(Kind::Tap),
            kind if kind.starts_with("netgraph") => {
                elsewhere("netgraph exists only on FreeBSD; use a tap device in a bridge, or valeX:PORT between VMs")
            }
            kind if kind.starts_with("netmap") => {
                elsewhere("netmap exists only on FreeBSD; use a tap device, or valeX:PORT between VMs")
            }
            _ => Err(NetError::Unknown(name.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use config::NoWarnings;

    use super::*;

    fn options(keys: &[(&str, &str)]) -> Result<NicOptions, NetError> {
        let mut config = Config::new(NoWarnings);
        config.set("name", "vm0").unwrap();
        config.set("pci.0.5.0.device", "virtio-net").unwrap();
        for (key, value) in keys {
            config.set(&format!("pci.0.5.0.{key}"), *value).unwrap();
        }
        let address = PciAddress::new(0, 5, 0).unwrap();
        NicOptions::from_node(&config, &config.node("pci.0.5.0").unwrap(), address, &[])
    }

    #[test]
    fn addresses() {
        assert_eq!(MacAddress::parse("02:0:ff:aB:1:9").unwrap().to_string(), "02:00:ff:ab:01:09");
        for bad in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02:00:00:00:00:0g",
            "02:00:00:00:00:",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "02-00-00-00-00-01",
            "+2:00:00:00:00:01",
            "002:0:0:0:0:1",
        ] {
            assert_eq!(MacAddress::parse(bad).unwrap_err().to_string(), format!("Invalid MAC {bad}"));
        }
    }

    #[test]
    fn generated_addresses_follow_place_and_name() {
        // MD5("5-0-vm0") begins with these bytes.
        let hash = Md5::digest("5-0-vm0");
        assert_eq!(options(&[]).unwrap().mac.0, [0x58, 0x9c, 0xfc, hash[0], hash[1], hash[2]]);
        let all = [MacAddress::generate(5, 0, "a"), MacAddress::generate(5, 1, "a"), MacAddress::generate(5, 0, "b")];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
    }

    #[test]
    fn keys_and_kinds() {
        let all = options(&[("backend", "tap3"), ("mac", "02:00:00:00:00:01"), ("mtu", "9000")]).unwrap();
        assert_eq!((all.backend.as_deref(), all.mtu, all.name.as_str()), (Some("tap3"), Some(9000), "net-5:0"));
        assert_eq!(all.kind().unwrap(), Kind::Tap);
        assert!(options(&[]).unwrap().backend.is_none());
        let switch = options(&[("backend", "vhost-user:/run/s")]).unwrap();
        assert_eq!(switch.vhost_user(), Some(Path::new("/run/s")));
        assert_eq!(all.vhost_user(), None);
        let error = |keys: &[(&str, &str)]| {
            let options = options(keys)?;
            options.kind().map(drop)
        };
        let line = |keys: &[(&str, &str)]| error(keys).unwrap_err().to_string();
        assert!(line(&[("backend", "netgraph")]).contains("only on FreeBSD"));
        assert!(line(&[("backend", "netmap:eth0")]).contains("only on FreeBSD"));
        assert!(line(&[("backend", "bridge0")]).starts_with("\"bridge0\" is no network: use slirp"));
        assert_eq!(line(&[("bakcend", "tap0")]), "Invalid device option \"bakcend\"");
        assert!(line(&[("mtu", "67")]).contains("pci.0.5.0.mtu"));
        assert!(error(&[("backend", "br0"), ("type", "tap")]).is_ok());
    }
}
