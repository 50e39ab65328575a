//! Messages of vhost-user: request, flags, size, content; file descriptors beside it.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
}

/// Bits of the protocol's own features.
pub(super) mod protocol {
    pub(in crate::vhost_user) const MULTI_QUEUE: u64 = 1 << 0;
    pub(in crate::vhost_user) const REPLY_ACK: u64 = 1 << 3;
}

const VERSION: u32 = 1;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;
/// Most file descriptors of a message: regions of memory.
const MAX_FILES: usize = 8;
/// Longest content of an answer.
const MAX_ANSWER: usize = 4096;

/// The content of a request.
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn new() -> Self {
        Self(Vec::new())
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
}

/// Sends a request.
pub(super) fn send(
    stream: &UnixStream,
    request: Request,
    need_reply: bool,
    body: &Body,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
    let mut message = Vec::with_capacity(12 + body.0.len());
    for word in [request as u32, flags, body.0.len() as u32] {
        message.extend(word.to_ne_bytes());
    }
    message.extend_from_slice(&body.0);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // One message of a few hundred bytes goes at once or not at all.
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives the answer to a request: the number in it, or of a queue's state the index.
pub(super) fn receive(stream: &mut UnixStream, request: Request) -> io::Result<u64> {
    let mut header = [0; 12];
    stream.read_exact(&mut header)?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (kind, flags, size) = (word(0), word(4), word(8) as usize);
    if kind != request as u32 || flags & REPLY == 0 || size > MAX_ANSWER {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("its answer to {request:?} is none")));
    }
    let mut body = vec![0; size];
    stream.read_exact(&mut body)?;
    match body.first_chunk::<8>() {
        Some(bytes) if request == Request::GetVringBase => Ok(u64::from_ne_bytes(*bytes) >> 32),
        Some(bytes) => Ok(u64::from_ne_bytes(*bytes)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("its answer to {request:?} is too short"))),
    }
}
