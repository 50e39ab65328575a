//! Packets in both directions.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;

use memory::{GuestMemory, MemoryError};
use platform::GuestRange;

use super::sys::{self, IoVec};

/// What is left to the receiver of a packet: the header of virtio 1.2, 5.1.6, which Linux's tap devices have too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PacketHeader {
    /// [`NEEDS_CHECKSUM`](Self::NEEDS_CHECKSUM), [`CHECKSUM_VALID`](Self::CHECKSUM_VALID).
    pub flags: u8,
    /// Kind of segmentation: one of the `GSO_` constants, perhaps with [`GSO_ECN`](Self::GSO_ECN).
    pub gso_type: u8,
    /// Bytes of headers up to the end of TCP's. A hint.
    pub header_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the bytes to be checksummed begin.
    pub csum_start: u16,
    /// Where the checksum goes, from there.
    pub csum_offset: u16,
}

impl PacketHeader {
    /// Encoded bytes, without the number of buffers that virtio adds.
    pub const SIZE: usize = 10;
    /// The checksum is not complete: it holds that of the pseudo header.
    pub const NEEDS_CHECKSUM: u8 = 1;
    /// The checksum was verified.
    pub const CHECKSUM_VALID: u8 = 2;
    /// A packet as it is.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4, to be segmented.
    pub const GSO_TCP4: u8 = 1;
    /// UDP, to be fragmented.
    pub const GSO_UDP: u8 = 3;
    /// TCP over IPv6, to be segmented.
    pub const GSO_TCP6: u8 = 4;
    /// With congestion notification.
    pub const GSO_ECN: u8 = 0x80;

    /// The little-endian form.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let words = [self.header_len, self.gso_size, self.csum_start, self.csum_offset].map(u16::to_le_bytes);
        let [[a, b], [c, d], [e, f], [g, h]] = words;
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// Reads the little-endian form. Nothing is checked: all of it may be nonsense.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h] = bytes;
        let [header_len, gso_size, csum_start, csum_offset] = [[a, b], [c, d], [e, f], [g, h]].map(u16::from_le_bytes);
        Self { flags, gso_type, header_len, gso_size, csum_start, csum_offset }
    }

    /// Whether nothing is left to the receiver.
    pub fn is_plain(&self) -> bool {
        self.flags & Self::NEEDS_CHECKSUM == 0 && self.gso_type == Self::GSO_NONE
    }
}

/// A packet of the guest, in guest memory, which may change at any time.
pub struct Frame<'a> {
    /// What is left to the receiver.
    pub header: PacketHeader,
    memory: &'a GuestMemory,
    ranges: &'a [GuestRange],
    len: usize,
}

impl<'a> Frame<'a> {
    /// Checks the scatter list; the packet's header is not part of it.
    ///
    /// # Errors
    /// A range is not wholly in RAM.
    pub fn new(memory: &'a GuestMemory, ranges: &'a [GuestRange], header: PacketHeader) -> Result<Self, MemoryError> {
        let mut len = 0usize;
        for range in ranges.iter().filter(|range| range.size > 0) {
            memory.host_address(range.start.0, range.size)?;
            len = len.saturating_add(range.size as usize);
        }
        Ok(Self { header, memory, ranges, len })
    }

    /// Bytes, from the Ethernet header on.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes from `offset` on; returns how many there were, at most `bytes.len()`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for range in self.ranges {
            let size = range.size as usize;
            if skip >= size {
                skip -= size;
                continue;
            }
            let here = (size - skip).min(bytes.len() - done);
            // The range was checked to be RAM, so this does not fail.
            if self.memory.read(range.start.0 + skip as u64, &mut bytes[done..done + here]).is_err() {
                break;
            }
            done += here;
            skip = 0;
            if done == bytes.len() {
                break;
            }
        }
        done
    }

    /// A copy of the whole.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        let count = self.read(0, &mut bytes);
        bytes.truncate(count);
        bytes
    }

    /// Writes `prefix` and then `len` bytes of the packet from `offset` on to a file or socket, by one system call that
    /// does not wait. Returns how many bytes were taken.
    ///
    /// # Errors
    /// What the kernel says; `WouldBlock` if it takes nothing now.
    pub(super) fn send(
        &self,
        to: BorrowedFd<'_>,
        way: sys::Way,
        prefix: &[u8],
        part: (usize, usize),
    ) -> io::Result<usize> {
        let (mut skip, mut left) = part;
        let mut pieces = Vec::with_capacity(self.ranges.len() + 1);
        if !prefix.is_empty() {
            pieces.push(IoVec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() });
        }
        for range in self.ranges {
            let size = range.size as usize;
            if skip >= size {
                skip -= size;
                continue;
            }
            let here = (size - skip).min(left);
            if here == 0 {
                break;
            }
            let base = self
                .memory
                .host_address(range.start.0 + skip as u64, here as u64)
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            pieces.push(IoVec { iov_base: base.cast(), iov_len: here });
            left -= here;
            skip = 0;
        }
        // SAFETY: the first piece is a live slice, which the kernel only reads; the others were checked to be guest RAM,
        // which stays mapped as long as `self.memory` and is only ever accessed raw.
        unsafe { sys::send(to, way, &pieces) }
    }
}

/// A packet for the guest, in host memory.
pub struct Packet<'a> {
    /// What is left to the guest.
    pub header: PacketHeader,
    /// The packet from the Ethernet header on, in pieces; the first holds at least the headers up to the payload, or
    /// everything.
    pub pieces: &'a [&'a [u8]],
}

impl Packet<'_> {
    /// Bytes, from the Ethernet header on.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len()).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use memory::MemoryOptions;

    use super::*;

    #[test]
    fn the_header_makes_the_round_trip() {
        let header =
            PacketHeader { flags: 1, gso_type: 4, header_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
        assert_eq!(header.encode(), [1, 4, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
        assert_eq!(PacketHeader::decode(header.encode()), header);
        assert!(PacketHeader::default().is_plain() && !header.is_plain());
    }

    #[test]
    fn frames_are_read_and_sent_in_parts() {
        let memory = GuestMemory::new(MemoryOptions { size: 0x3000, ..Default::default() }).unwrap();
        memory.write(0x100, b"abc").unwrap();
        memory.write(0x2000, b"defgh").unwrap();
        let ranges = [GuestRange::new(0x100, 3), GuestRange::new(0, 0), GuestRange::new(0x2000, 5)];
        let frame = Frame::new(&memory, &ranges, PacketHeader::default()).unwrap();
        assert_eq!((frame.len(), frame.to_vec()), (8, b"abcdefgh".to_vec()));
        let mut bytes = [0; 4];
        assert_eq!((frame.read(2, &mut bytes), &bytes), (4, b"cdef"));
        assert_eq!((frame.read(6, &mut bytes), &bytes[..2]), (2, &b"gh"[..]));
        assert_eq!(frame.read(8, &mut bytes), 0);
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut got = [0; 32];
        for (part, want) in [((0, 8), &b"<abcdefgh"[..]), ((3, 2), b"<de"), ((1, 99), b"<bcdefgh"), ((9, 9), b"<")] {
            frame.send(ours.as_fd(), sys::Way::Socket, b"<", part).unwrap();
            let count = theirs.recv(&mut got).unwrap();
            assert_eq!(&got[..count], want);
        }
        assert!(Frame::new(&memory, &[GuestRange::new(0x2fff, 2)], PacketHeader::default()).is_err());
    }
}
