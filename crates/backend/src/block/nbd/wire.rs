//! The NBD protocol (nbd/doc/proto.md): fixed newstyle negotiation, requests and simple replies.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::uri::{NbdAddress, NbdUri};

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Bytes of an option's reply, at most: more is no answer to anything asked here.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// Bytes of data in a request where the server sets no limit, and never more than that.
const MAX_PAYLOAD: u32 = 2 << 20;
/// Bytes of the first read at most: twice that. Every server takes so much if it does not say otherwise.
const FIRST_READ: u32 = 2 * MAX_PAYLOAD;
/// Bytes to be had on their way to a server of this host. The host's limit, which is smaller in most cases, holds.
const SEND_BUFFER: usize = 1 << 20;

/// Time for the server to answer during negotiation.
const PATIENCE: Duration = Duration::from_secs(10);

/// Transmission flags.
pub(super) mod flag {
    pub(in super::super) const READ_ONLY: u16 = 1 << 1;
    pub(in super::super) const SEND_FLUSH: u16 = 1 << 2;
    pub(in super::super) const SEND_FUA: u16 = 1 << 3;
    pub(in super::super) const SEND_TRIM: u16 = 1 << 5;
    pub(in super::super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
}

/// Request types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub(super) enum Kind {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// Request flags.
pub(super) const FUA: u16 = 1 << 0;
pub(super) const NO_HOLE: u16 = 1 << 1;

/// What a request asks, without its data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// What the server told of the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Export {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// Unit of offsets and lengths.
    pub(super) min_block: u32,
    pub(super) preferred_block: u32,
    pub(super) max_payload: u32,
    /// Bytes of the one read that [`Part::first_read`](super::parts::Part::first_read) describes.
    pub(super) first_read: u32,
}

impl Export {
    pub(super) fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

/// A connection to the server.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects.
    pub(super) fn connect(address: &NbdAddress) -> io::Result<Self> {
        match address {
            NbdAddress::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
                Ok(Self::Unix(stream))
            }
            NbdAddress::Tcp(host, port) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, PATIENCE) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            keep_alive(&stream)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(why) => last = why,
                    }
                }
                Err(last)
            }
        }
    }

    pub(super) fn set_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(time),
            Self::Unix(stream) => stream.set_read_timeout(time),
        }
    }

    /// Ends the connection for both directions and all threads that use it.
    pub(super) fn shut(&self) {
        // It may be over already.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

/// Finds out when the server's host is gone, in a minute.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

impl Read for &Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(bytes),
            Stream::Unix(stream) => (&mut &*stream).read(bytes),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn write_vectored(&mut self, bytes: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write_vectored(bytes),
            Stream::Unix(stream) => (&mut &*stream).write_vectored(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn array<const N: usize>(mut stream: impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Connects and negotiates.
///
/// # Errors
/// The server cannot be reached, speaks something else, or does not have the export.
pub(super) fn open(uri: &NbdUri) -> io::Result<(Stream, Export)> {
    let stream = Stream::connect(&uri.address)?;
    stream.set_timeout(Some(PATIENCE))?;
    let export = negotiate(&stream, &uri.export).map_err(|why| match why.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "it accepts the connection but says nothing")
        }
        io::ErrorKind::UnexpectedEof => io::Error::new(why.kind(), "it closed the connection during negotiation"),
        _ => why,
    })?;
    stream.set_timeout(None)?;
    Ok((stream, export))
}

/// The handshake, up to the transmission phase.
pub(super) fn negotiate(stream: &Stream, name: &str) -> io::Result<Export> {
    if u64::from_be_bytes(array(stream)?) != INIT_MAGIC {
        return Err(bad("it is no NBD server"));
    }
    if u64::from_be_bytes(array(stream)?) != OPTION_MAGIC {
        return Err(bad("it speaks the old NBD protocol without exports; use a server of the newstyle protocol"));
    }
    let server = u16::from_be_bytes(array(stream)?);
    if server & FIXED_NEWSTYLE == 0 {
        return Err(bad("it does not speak the fixed newstyle protocol"));
    }
    let client = server & (FIXED_NEWSTYLE | NO_ZEROES);
    (&mut &*stream).write_all(&u32::from(client).to_be_bytes())?;
    match go(stream, name)? {
        Some(export) => Ok(export),
        None => export_name(stream, name, client & NO_ZEROES != 0),
    }
}

fn send_option(mut stream: &Stream, option: u32, data: &[u8]) -> io::Result<()> {
    let len = data.len() as u32;
    let header = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat();
    stream.write_all(&header)
}

/// NBD_OPT_GO; `None` if the server does not know it.
fn go(stream: &Stream, name: &str) -> io::Result<Option<Export>> {
    let len = name.len() as u32;
    let infos = [1u16.to_be_bytes(), INFO_BLOCK_SIZE.to_be_bytes()].concat();
    send_option(stream, OPT_GO, &[&len.to_be_bytes()[..], name.as_bytes(), &infos].concat())?;
    let mut export: Option<(u64, u16)> = None;
    let (mut min_block, mut preferred_block, mut max_payload) = (1, 4096, FIRST_READ);
    loop {
        if u64::from_be_bytes(array(stream)?) != OPTION_REPLY_MAGIC || u32::from_be_bytes(array(stream)?) != OPT_GO {
            return Err(bad("it answers out of turn"));
        }
        let kind = u32::from_be_bytes(array(stream)?);
        let len = u32::from_be_bytes(array(stream)?);
        if len > MAX_OPTION_REPLY {
            return Err(bad("it answers at too great length"));
        }
        let mut data = vec![0; len as usize];
        (&mut &*stream).read_exact(&mut data)?;
        match (kind, data.as_slice()) {
            (REP_ACK, _) => break,
            (REP_INFO, [0, 0, s0, s1, s2, s3, s4, s5, s6, s7, f0, f1]) => {
                debug_assert_eq!(INFO_EXPORT, 0);
                let size = u64::from_be_bytes([*s0, *s1, *s2, *s3, *s4, *s5, *s6, *s7]);
                export = Some((size, u16::from_be_bytes([*f0, *f1])));
            }
            (REP_INFO, [0, 3, rest @ ..]) if rest.len() == 12 => {
                let word = |at: usize| u32::from_be_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
                (min_block, preferred_block, max_payload) = (word(0), word(4), word(8));
            }
            (REP_INFO, _) => {}
            (REP_ERR_UNSUP, _) => return Ok(None),
            (error, text) => {
                let text = String::from_utf8_lossy(text);
                let text = text.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
                let text = if text.is_empty() { format!("error {:#x}", error & !REP_ERROR) } else { text };
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("it refuses export \"{name}\": {text}")));
            }
        }
    }
    let (size, flags) = export.ok_or_else(|| bad("it does not say how large the export is"))?;
    let sane = min_block.is_power_of_two() && min_block <= MAX_PAYLOAD;
    if !sane {
        return Err(bad(format!("it wants blocks of {min_block} bytes")));
    }
    let first_read = first_read(size, min_block, max_payload);
    let max_payload = max_payload.clamp(min_block.max(4096), MAX_PAYLOAD);
    Ok(Some(Export { size, flags, min_block, preferred_block, max_payload, first_read }))
}

/// NBD_OPT_EXPORT_NAME, for servers that know nothing newer.
fn export_name(stream: &Stream, name: &str, no_zeroes: bool) -> io::Result<Export> {
    send_option(stream, OPT_EXPORT_NAME, name.as_bytes())?;
    let size = u64::from_be_bytes(array(stream)?);
    let flags = u16::from_be_bytes(array(stream)?);
    if !no_zeroes {
        array::<124>(stream)?;
    }
    let first_read = first_read(size, 1, FIRST_READ);
    Ok(Export { size, flags, min_block: 1, preferred_block: 4096, max_payload: MAX_PAYLOAD, first_read })
}

/// As large as the export and the server allow, in whole blocks.
fn first_read(size: u64, min_block: u32, max_payload: u32) -> u32 {
    // It is far below 4 GiB.
    let len = size.min(u64::from(max_payload.min(FIRST_READ))) as u32;
    len - len % min_block
}

/// A request to be sent: its handle, and its data if it is a write.
pub(super) struct Outgoing {
    pub(super) handle: u64,
    pub(super) header: Header,
    pub(super) payload: Arc<Vec<u8>>,
}

/// Bytes of a request without its data.
const REQUEST_LEN: usize = 28;

fn request(handle: u64, header: Header) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&header.flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&(header.kind as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&handle.to_be_bytes());
    bytes[16..24].copy_from_slice(&header.offset.to_be_bytes());
    bytes[24..].copy_from_slice(&header.len.to_be_bytes());
    bytes
}

/// Sends requests, with one system call in most cases.
pub(super) fn send_all(mut stream: &Stream, requests: &[Outgoing]) -> io::Result<()> {
    let headers: Vec<_> = requests.iter().map(|one| request(one.handle, one.header)).collect();
    let pieces = headers.iter().zip(requests).flat_map(|(header, one)| [&header[..], one.payload.as_slice()]);
    let mut slices: Vec<_> = pieces.filter(|piece| !piece.is_empty()).map(io::IoSlice::new).collect();
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        match stream.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => io::IoSlice::advance_slices(&mut rest, sent),
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
    Ok(())
}

/// Sends one request.
pub(super) fn send(stream: &Stream, handle: u64, header: Header, payload: Arc<Vec<u8>>) -> io::Result<()> {
    send_all(stream, &[Outgoing { handle, header, payload }])
}

/// Bytes of the header of a reply.
pub(super) const REPLY_LEN: usize = 16;

/// Receives the header of a simple reply: its handle, and the server's verdict.
pub(super) fn receive(stream: impl Read) -> io::Result<(u64, io::Result<()>)> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, h @ ..] = array::<REPLY_LEN>(stream)?;
    if u32::from_be_bytes([m0, m1, m2, m3]) != REPLY_MAGIC {
        return Err(bad("a reply that is none"));
    }
    let error = match u32::from_be_bytes([e0, e1, e2, e3]) {
        0 => Ok(()),
        // The protocol's numbers are Linux's.
        code @ (1 | 5 | 12 | 22 | 28 | 75 | 95 | 108) => Err(io::Error::from_raw_os_error(code as i32)),
        _ => Err(io::Error::from_raw_os_error(libc::EIO)),
    };
    Ok((u64::from_be_bytes(h), error))
}
