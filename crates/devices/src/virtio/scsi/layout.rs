//! The structures of the device and its requests (virtio 1.2, 5.6).

/// Bytes of the configuration structure.
pub(super) const CONFIG_SIZE: usize = 36;

/// Where the driver may write the sizes of sense data and command descriptor blocks.
pub(super) const SENSE_SIZE_AT: u32 = 20;
pub(super) const CDB_SIZE_AT: u32 = 24;

/// These sizes at first, and the largest possible.
pub(super) const SENSE_SIZE: u32 = 96;
pub(super) const CDB_SIZE: u32 = 32;
pub(super) const MAX_SENSE_SIZE: u32 = 252;
pub(super) const MAX_CDB_SIZE: u32 = 260;

/// Segments of a command's data, at most.
const SEGMENTS: u32 = 64 - 2;
/// 512-byte units of a command's data, at most.
const MAX_SECTORS: u32 = 0xffff;
/// Commands that one unit takes at a time.
const COMMANDS_PER_UNIT: u32 = 64;
/// Largest logical unit number.
pub(super) const MAX_LUN: u16 = 16383;

/// Bytes of an event.
pub(super) const EVENT_SIZE: usize = 16;
/// Parameters of a unit have changed.
pub(super) const EVENT_PARAM_CHANGE: u32 = 3;
/// Events were lost for want of buffers.
pub(super) const EVENTS_MISSED: u32 = 0x8000_0000;

/// Bytes of a request's header before the command descriptor block: unit, tag, task attribute, priority, CRN.
pub(super) const HEADER_LEN: usize = 19;
/// Bytes of a response before the sense data.
pub(super) const RESPONSE_LEN: usize = 12;

/// How the transport of a command went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Response {
    Ok = 0,
    Overrun = 1,
    Aborted = 2,
    BadTarget = 3,
    Failure = 9,
}

/// How a task management function went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum TmfResponse {
    Complete = 0,
    BadTarget = 3,
    Succeeded = 10,
    Rejected = 11,
    IncorrectLun = 12,
}

/// The configuration structure.
pub(super) fn config(queues: u16, sense_size: u32, cdb_size: u32) -> [u8; CONFIG_SIZE] {
    let mut bytes = [0; CONFIG_SIZE];
    let words = [
        u32::from(queues),
        SEGMENTS,
        MAX_SECTORS,
        COMMANDS_PER_UNIT,
        EVENT_SIZE as u32,
        sense_size,
        cdb_size,
        // max_channel and max_target.
        0,
        u32::from(MAX_LUN),
    ];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Whom an 8-byte address names (5.6.6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Address {
    /// A logical unit of the target.
    Unit(u16),
    /// The well-known unit that only answers REPORT LUNS.
    ReportLuns,
    /// A target that is not there.
    Nobody,
}

impl Address {
    pub(super) fn parse(bytes: [u8; 8]) -> Self {
        match bytes {
            [1, 0, high, low, 0, 0, 0, 0] => Self::Unit(u16::from_be_bytes([high & 0x3f, low])),
            [0xc1, 1, 0, 0, 0, 0, 0, 0] => Self::ReportLuns,
            _ => Self::Nobody,
        }
    }
}

/// The address of a unit, as events have it: in the form of REPORT LUNS, which is all that Linux understands there.
pub(super) fn address_of(lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    [1, 0, if high > 0 { high | 0x40 } else { 0 }, low, 0, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(Address::parse([1, 0, 0, 5, 0, 0, 0, 0]), Address::Unit(5));
        assert_eq!(Address::parse([1, 0, 0x41, 5, 0, 0, 0, 0]), Address::Unit(0x105));
        assert_eq!(Address::parse(address_of(300)), Address::Unit(300));
        assert_eq!(address_of(5), [1, 0, 0, 5, 0, 0, 0, 0]);
        assert_eq!(Address::parse([1, 1, 0x40, 0, 0, 0, 0, 0]), Address::Nobody);
        assert_eq!(Address::parse([0xc1, 1, 0, 0, 0, 0, 0, 0]), Address::ReportLuns);
        assert_eq!(Address::parse([0; 8]), Address::Nobody);
    }
}
