//! The text that names a serial backend.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::{Tty, TtyError, file, path, pty, socket, stdio};

/// A serial backend by name: what stands behind `com1,` on the command line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TtySpec {
    /// `stdio`: standard input and output.
    Stdio,
    /// A path: a tty, a pseudo terminal's slave, or another character device.
    Path(PathBuf),
    /// `tcp=PORT`, `tcp=ADDR:PORT`, `tcp=[V6]:PORT`: listen there. Port 0 lets the system choose.
    Tcp(SocketAddr),
    /// `unix:PATH`: listen on a UNIX socket there. Ours.
    Unix(PathBuf),
    /// `pty` or `pty:LINK`: a new pseudo terminal, with a symbolic link to it at `LINK`. Ours.
    Pty(Option<PathBuf>),
    /// `/dev/nmdmNA` or `/dev/nmdmNB`: one side of FreeBSD's null-modem pair.
    NullModem(PathBuf),
    /// `file:PATH`: append output to a file; there is no input. Ours.
    File(PathBuf),
}

impl TtySpec {
    /// Reads the text of a serial backend. Nothing is opened.
    ///
    /// # Errors
    /// The text is empty, an `nmdm` device without a side, or none of the known forms.
    pub fn parse(text: &str) -> Result<Self, TtyError> {
        if text.is_empty() {
            return Err(TtyError::Empty);
        }
        if text == "stdio" {
            return Ok(Self::Stdio);
        }
        if let Some(address) = text.strip_prefix("tcp=") {
            return parse_tcp(text, address).map(Self::Tcp);
        }
        if let Some(path) = text.strip_prefix("file:") {
            return if path.is_empty() { Err(TtyError::Empty) } else { Ok(Self::File(path.into())) };
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(TtyError::Empty) } else { Ok(Self::Unix(path.into())) };
        }
        if text == "pty" {
            return Ok(Self::Pty(None));
        }
        if let Some(link) = text.strip_prefix("pty:") {
            return if link.is_empty() { Err(TtyError::Empty) } else { Ok(Self::Pty(Some(link.into()))) };
        }
        if let Some(name) = text.strip_prefix("/dev/nmdm") {
            let sides = name.len() > 1 && !name.contains('/') && name.ends_with(['A', 'B']);
            return if sides {
                Ok(Self::NullModem(text.into()))
            } else {
                Err(TtyError::NullModem { path: text.into() })
            };
        }
        if text.starts_with('/') {
            return Ok(Self::Path(text.into()));
        }
        Err(TtyError::Unknown { spec: text.to_owned() })
    }

    /// The backend of a virtio-console port: a bare path is that of a socket to make, unless a character device is there.
    ///
    /// # Errors
    /// As for [`parse`](Self::parse).
    pub fn parse_port(text: &str) -> Result<Self, TtyError> {
        let is_device = || {
            std::fs::metadata(text).is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_char_device(&meta.file_type()))
        };
        if text.starts_with('/') && !text.starts_with("/dev/nmdm") && !is_device() {
            return Ok(Self::Unix(text.into()));
        }
        match Self::parse(text) {
            // A relative path, which has a dot or a slash somewhere.
            Err(TtyError::Unknown { .. }) if text.contains(['/', '.']) => Ok(Self::Unix(text.into())),
            other => other,
        }
    }

    /// Whether a person sits at the other end, usually.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Stdio | Self::Path(_) | Self::Pty(_) | Self::NullModem(_))
    }

    /// Opens the backend and starts its threads; input waits until a device is attached.
    ///
    /// # Errors
    /// What the host refuses: a path that cannot be opened or is no character device, a port in use, a second `stdio`.
    pub fn open(&self) -> Result<Tty, TtyError> {
        match self {
            Self::Stdio => stdio::open(),
            Self::Path(path) => path::open(path),
            Self::Tcp(address) => socket::open_tcp(*address),
            Self::Unix(path) => socket::open_unix(path),
            Self::Pty(link) => pty::open(link.as_deref()),
            Self::NullModem(path) => pty::open_null_modem(path),
            Self::File(path) => file::open(path),
        }
    }
}

fn parse_tcp(spec: &str, text: &str) -> Result<SocketAddr, TtyError> {
    let bad_address = |address: &str| TtyError::Address { spec: spec.to_owned(), address: address.to_owned() };
    let (address, port) = match text.rsplit_once(':') {
        // The last colon may be one inside "[::1]".
        Some((_, port)) if port.ends_with(']') => return Err(bad_address(text)),
        Some((address, port)) => (address, port),
        None => ("", text),
    };
    let port = match port.parse::<u16>() {
        Ok(number) if port.bytes().all(|b| b.is_ascii_digit()) => number,
        _ => return Err(TtyError::Port { spec: spec.to_owned(), port: port.to_owned() }),
    };
    if address.is_empty() {
        return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
    }
    let Some(inner) = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else {
        let v4: Ipv4Addr = address.parse().map_err(|_| bad_address(address))?;
        return Ok(SocketAddr::new(IpAddr::V4(v4), port));
    };
    let (number, zone) = inner.split_once('%').map_or((inner, None), |(number, zone)| (number, Some(zone)));
    let v6: Ipv6Addr = number.parse().map_err(|_| bad_address(address))?;
    let scope = zone.map_or(Ok(0), |zone| interface_index(spec, zone))?;
    Ok(SocketAddr::V6(SocketAddrV6::new(v6, port, 0, scope)))
}

/// The number of a network interface given by name or by number.
fn interface_index(spec: &str, zone: &str) -> Result<u32, TtyError> {
    if let Ok(index) = zone.parse() {
        return Ok(index);
    }
    rustix::net::socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .and_then(|socket| rustix::net::netdevice::name_to_index(socket, zone))
        .map_err(|e| TtyError::Zone { spec: spec.to_owned(), zone: zone.to_owned(), source: e.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(text: &str) -> SocketAddr {
        match TtySpec::parse(text) {
            Ok(TtySpec::Tcp(address)) => address,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn forms() {
        assert_eq!(TtySpec::parse("stdio").unwrap(), TtySpec::Stdio);
        assert_eq!(TtySpec::parse("/dev/pts/3").unwrap(), TtySpec::Path("/dev/pts/3".into()));
        assert_eq!(TtySpec::parse("file:log.txt").unwrap(), TtySpec::File("log.txt".into()));
        assert_eq!(TtySpec::parse("unix:/s").unwrap(), TtySpec::Unix("/s".into()));
        assert_eq!(TtySpec::parse("pty").unwrap(), TtySpec::Pty(None));
        assert_eq!(TtySpec::parse("pty:/l").unwrap(), TtySpec::Pty(Some("/l".into())));
        assert_eq!(TtySpec::parse("/dev/nmdm-vm.1A").unwrap(), TtySpec::NullModem("/dev/nmdm-vm.1A".into()));
        assert_eq!(tcp("tcp=1234"), "127.0.0.1:1234".parse().unwrap());
        assert_eq!(tcp("tcp=:1234"), "127.0.0.1:1234".parse().unwrap());
        assert_eq!(tcp("tcp=0.0.0.0:1"), "0.0.0.0:1".parse().unwrap());
        assert_eq!(tcp("tcp=[::1]:65535"), "[::1]:65535".parse().unwrap());
        assert_eq!(tcp("tcp=[fe80::1%1]:80"), "[fe80::1%1]:80".parse().unwrap());
        assert_eq!(tcp("tcp=[fe80::1%lo]:80"), "[fe80::1%1]:80".parse().unwrap());
    }

    #[test]
    fn errors_name_the_culprit() {
        for (text, needle) in [
            ("", "needs a backend"),
            ("file:", "needs a backend"),
            ("studio", "\"studio\" is not a serial backend"),
            ("/dev/nmdm0", "ends in A or B"),
            ("/dev/nmdmA", "ends in A or B"),
            ("unix:", "needs a backend"),
            ("pty:", "needs a backend"),
            ("tcp=", "\"\" is not a TCP port"),
            ("tcp=65536", "\"65536\" is not a TCP port"),
            ("tcp=+5", "\"+5\" is not a TCP port"),
            ("tcp=::1:80", "\"::1\" is not an IP address"),
            ("tcp=[::1]", "\"[::1]\" is not an IP address"),
            ("tcp=[1.2.3.4]:5", "\"[1.2.3.4]\" is not an IP address"),
            ("tcp=300.1.1.1:5", "\"300.1.1.1\" is not an IP address"),
            ("tcp=[fe80::1%no-such-if]:5", "no network interface \"no-such-if\""),
        ] {
            let error = TtySpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
