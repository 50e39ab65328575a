//! Numbers and strings of 9P messages: little-endian, strings with a length of two bytes in front.

use rustix::io::Errno;

/// Bytes in front of every message: size, type, tag.
pub const HEADER: usize = 7;
/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Shortest limit that a client may negotiate: every answer but data fits.
pub(super) const MIN_MESSAGE: u32 = 4096;
/// No fid.
pub(super) const NO_FID: u32 = u32::MAX;
/// No user, group: leave as it is.
pub(super) const NO_ID: u32 = u32::MAX;

/// Message types of requests; the answer's is one more.
pub(super) mod message {
    pub(in crate::share) const LERROR: u8 = 6;
    pub(in crate::share) const STATFS: u8 = 8;
    pub(in crate::share) const LOPEN: u8 = 12;
    pub(in crate::share) const LCREATE: u8 = 14;
    pub(in crate::share) const SYMLINK: u8 = 16;
    pub(in crate::share) const MKNOD: u8 = 18;
    pub(in crate::share) const RENAME: u8 = 20;
    pub(in crate::share) const READLINK: u8 = 22;
    pub(in crate::share) const GETATTR: u8 = 24;
    pub(in crate::share) const SETATTR: u8 = 26;
    pub(in crate::share) const XATTRWALK: u8 = 30;
    pub(in crate::share) const XATTRCREATE: u8 = 32;
    pub(in crate::share) const READDIR: u8 = 40;
    pub(in crate::share) const FSYNC: u8 = 50;
    pub(in crate::share) const LOCK: u8 = 52;
    pub(in crate::share) const GETLOCK: u8 = 54;
    pub(in crate::share) const LINK: u8 = 70;
    pub(in crate::share) const MKDIR: u8 = 72;
    pub(in crate::share) const RENAMEAT: u8 = 74;
    pub(in crate::share) const UNLINKAT: u8 = 76;
    pub(in crate::share) const VERSION: u8 = 100;
    pub(in crate::share) const ATTACH: u8 = 104;
    pub(in crate::share) const FLUSH: u8 = 108;
    pub(in crate::share) const WALK: u8 = 110;
    pub(in crate::share) const READ: u8 = 116;
    pub(in crate::share) const WRITE: u8 = 118;
    pub(in crate::share) const CLUNK: u8 = 120;
    pub(in crate::share) const REMOVE: u8 = 122;
}

/// The server's identity of a file: type, version (always 0: we have none) and number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Qid {
    pub(super) kind: u8,
    pub(super) path: u64,
}

/// Bytes of a [`Qid`] in a message.
pub(super) const QID_LEN: usize = 13;

/// The start of a message: (size, type, tag).
pub(super) fn header(bytes: &[u8]) -> Option<(u32, u8, u16)> {
    match bytes {
        [a, b, c, d, kind, e, f, ..] => {
            Some((u32::from_le_bytes([*a, *b, *c, *d]), *kind, u16::from_le_bytes([*e, *f])))
        }
        _ => None,
    }
}

/// Reads a request. What is not there is an invalid argument.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        self.bytes(N)?.try_into().map_err(|_| Errno::INVAL)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Errno> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Errno> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string; without NUL, for no file or attribute has one in its name.
    pub(super) fn string(&mut self) -> Result<&'a [u8], Errno> {
        let len = self.u16()?;
        let bytes = self.bytes(usize::from(len))?;
        if bytes.contains(&0) { Err(Errno::INVAL) } else { Ok(bytes) }
    }

    /// A name of something that is in a folder, or shall be.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.string()?;
        if is_name(name) { Ok(name) } else { Err(Errno::INVAL) }
    }
}

/// Whether this can be the name of an entry: not empty, no slash, not the folder itself or its parent.
pub(super) fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && !name.contains(&b'/') && !name.contains(&0) && name != b"." && name != b".."
}

/// Writes an answer of at most `limit` bytes, header included.
pub(super) struct Writer<'a> {
    pub(super) out: &'a mut Vec<u8>,
    limit: usize,
}

impl<'a> Writer<'a> {
    /// An empty answer, with room for its header.
    pub(super) fn new(out: &'a mut Vec<u8>, limit: usize) -> Self {
        out.clear();
        out.resize(HEADER, 0);
        Self { out, limit }
    }

    /// Bytes that still fit.
    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.out.len())
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// A string; one that is too long for the protocol is an error.
    pub(super) fn string(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.u16(u16::try_from(bytes.len()).map_err(|_| Errno::NAMETOOLONG)?);
        self.bytes(bytes);
        Ok(())
    }

    pub(super) fn qid(&mut self, qid: Qid) {
        self.u8(qid.kind);
        self.u32(0);
        self.u64(qid.path);
    }

    /// Completes the answer to a request of type `kind`, or makes it an error.
    pub(super) fn finish(self, kind: u8, tag: u16, result: Result<(), Errno>) {
        let result = if self.out.len() > self.limit { Err(Errno::NOBUFS) } else { result };
        let kind = match result {
            Ok(()) => kind.wrapping_add(1),
            Err(why) => {
                self.out.truncate(HEADER);
                self.out.extend_from_slice(&(why.raw_os_error() as u32).to_le_bytes());
                message::LERROR + 1
            }
        };
        let size = (self.out.len() as u32).to_le_bytes();
        let [t0, t1] = tag.to_le_bytes();
        let header = [size[0], size[1], size[2], size[3], kind, t0, t1];
        for (to, from) in self.out.iter_mut().zip(header) {
            *to = from;
        }
    }
}
