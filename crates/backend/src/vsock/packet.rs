//! Packets of the virtio socket device (virtio 1.2, 5.10.6).

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// Streams, the only kind of connection.
pub(super) const STREAM: u16 = 1;

/// What a packet is for.
pub(super) mod op {
    pub(in crate::vsock) const REQUEST: u16 = 1;
    pub(in crate::vsock) const RESPONSE: u16 = 2;
    pub(in crate::vsock) const RST: u16 = 3;
    pub(in crate::vsock) const SHUTDOWN: u16 = 4;
    pub(in crate::vsock) const RW: u16 = 5;
    pub(in crate::vsock) const CREDIT_UPDATE: u16 = 6;
    pub(in crate::vsock) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown.
pub(super) mod shut {
    /// The sender receives no more.
    pub(in crate::vsock) const RECEIVE: u32 = 1;
    /// The sender sends no more.
    pub(in crate::vsock) const SEND: u32 = 2;
    /// Both.
    pub(in crate::vsock) const BOTH: u32 = 3;
}

/// The header of a packet.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Header {
    pub(super) source_cid: u64,
    pub(super) target_cid: u64,
    pub(super) source_port: u32,
    pub(super) target_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes that the sender has room for in all.
    pub(super) room: u32,
    /// Bytes that it has passed on so far, modulo 2^32.
    pub(super) passed_on: u32,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            source_cid: u64_at(0),
            target_cid: u64_at(8),
            source_port: u32_at(16),
            target_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            room: u32_at(36),
            passed_on: u32_at(40),
        }
    }

    /// Writes it.
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [(usize, &[u8]); 10] = [
            (0, &self.source_cid.to_le_bytes()),
            (8, &self.target_cid.to_le_bytes()),
            (16, &self.source_port.to_le_bytes()),
            (20, &self.target_port.to_le_bytes()),
            (24, &self.len.to_le_bytes()),
            (28, &self.kind.to_le_bytes()),
            (30, &self.op.to_le_bytes()),
            (32, &self.flags.to_le_bytes()),
            (36, &self.room.to_le_bytes()),
            (40, &self.passed_on.to_le_bytes()),
        ];
        for (at, field) in fields {
            bytes[at..at + field.len()].copy_from_slice(field);
        }
        bytes
    }

    /// Bytes behind the header.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
