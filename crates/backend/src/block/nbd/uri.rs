//! Where an NBD server is: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH` (the NBD URI specification).

use std::path::PathBuf;

use crate::block::BlockError;

/// Port of NBD servers.
const PORT: u16 = 10809;

const TCP: &str = "nbd://";
const UNIX: &str = "nbd+unix://";
/// The forms with TLS, which are refused by name.
const TLS: [&str; 2] = ["nbds://", "nbds+unix://"];

/// Where the server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// Host name or address, and port.
    Tcp(String, u16),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

/// A server and one of its exports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdUri {
    /// The text it was made from.
    pub text: String,
    /// The server.
    pub address: NbdAddress,
    /// The export; empty for the server's default one.
    pub export: String,
}

impl NbdUri {
    /// Whether a disk's path is a URI of this kind, perhaps a wrong one.
    pub fn is_one(path: &str) -> bool {
        [TCP, UNIX].iter().chain(&TLS).any(|scheme| path.starts_with(scheme))
    }

    /// Reads a URI.
    ///
    /// # Errors
    /// It is not one, or of a form that is not available.
    pub fn parse(text: &str) -> Result<Self, BlockError> {
        let wrong = |why| BlockError::NbdUri { uri: text.into(), why };
        let (address, export) = if let Some(rest) = text.strip_prefix(TCP) {
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            if path.contains('?') {
                return Err(wrong("nothing can follow the export"));
            }
            (tcp(authority).map_err(wrong)?, path)
        } else if let Some(rest) = text.strip_prefix(UNIX) {
            let (path, query) = rest.split_once('?').ok_or_else(|| wrong("the socket is missing"))?;
            let socket = query.strip_prefix("socket=").filter(|socket| !socket.is_empty() && !socket.contains('&'));
            let socket = socket.ok_or_else(|| wrong("the socket is missing"))?;
            let export = path.strip_prefix('/').ok_or_else(|| wrong("a host has no place in it"))?;
            (NbdAddress::Unix(decode(socket).ok_or_else(|| wrong("bad %-sequence"))?.into()), export)
        } else if TLS.iter().any(|scheme| text.starts_with(scheme)) {
            return Err(wrong("TLS is not available; use a tunnel"));
        } else {
            return Err(wrong("unknown scheme"));
        };
        let export = decode(export).ok_or_else(|| wrong("bad %-sequence"))?;
        if export.len() > 4096 {
            return Err(wrong("the name of an export has 4096 bytes at most"));
        }
        Ok(Self { text: text.into(), address, export })
    }
}

/// `HOST[:PORT]`, where an IPv6 address stands in brackets.
fn tcp(authority: &str) -> Result<NbdAddress, &'static str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("the bracket is not closed")?;
            (host, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or("bad port")?)
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    let port = if port.is_empty() { Ok(PORT) } else { port.parse() };
    Ok(NbdAddress::Tcp(host.into(), port.ok().filter(|port| *port != 0).ok_or("bad port")?))
}

/// Resolves `%XX`.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let value = digit(rest.next())? * 16 + digit(rest.next())?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_forms() {
        let parse = |text: &str| NbdUri::parse(text).map(|uri| (uri.address, uri.export)).unwrap();
        let tcp = |host: &str, port| NbdAddress::Tcp(host.into(), port);
        assert_eq!(parse("nbd://host"), (tcp("host", 10809), String::new()));
        assert_eq!(parse("nbd://host/"), (tcp("host", 10809), String::new()));
        assert_eq!(parse("nbd://10.0.0.1:77/a/b"), (tcp("10.0.0.1", 77), "a/b".into()));
        assert_eq!(parse("nbd://[::1]:77/x%20y"), (tcp("::1", 77), "x y".into()));
        assert_eq!(parse("nbd://[::1]/"), (tcp("::1", 10809), String::new()));
        assert_eq!(
            parse("nbd+unix:///disk?socket=/run/a%3fb.sock"),
            (NbdAddress::Unix("/run/a?b.sock".into()), "disk".into())
        );
        assert_eq!(parse("nbd+unix:///?socket=s"), (NbdAddress::Unix("s".into()), String::new()));
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, why) in [
            ("nbd://", "host is missing"),
            ("nbd://:10/x", "host is missing"),
            ("nbd://h:0/", "bad port"),
            ("nbd://h:x/", "bad port"),
            ("nbd://[::1", "bracket"),
            ("nbd://[::1]x/", "bad port"),
            ("nbd://h/x?y", "nothing can follow"),
            ("nbd+unix:///x", "socket is missing"),
            ("nbd+unix:///x?socket=", "socket is missing"),
            ("nbd+unix://host/x?socket=/s", "host has no place"),
            ("nbd://h/%zz", "bad %-sequence"),
            ("nbds://h/x", "TLS"),
            ("http://h/x", "unknown scheme"),
        ] {
            let message = NbdUri::parse(text).unwrap_err().to_string();
            assert!(message.contains(why) && message.contains("nbd://HOST[:PORT]/EXPORT"), "{text}: {message}");
        }
        assert!(NbdUri::is_one("nbds://h/x") && !NbdUri::is_one("/dev/nbd0"));
    }
}
