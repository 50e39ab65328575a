//! Status and sense data (SAM-5, 5.3; SPC-4, 4.5).

use std::io;

use serde::{Deserialize, Serialize};

/// Bytes of fixed-format sense data as made here.
pub const SENSE_LEN: usize = 18;

/// Status codes.
pub mod status {
    /// Done.
    pub const GOOD: u8 = 0;
    /// Not done; the sense data tell why.
    pub const CHECK_CONDITION: u8 = 2;
}

/// Sense keys.
mod key {
    pub(super) const NONE: u8 = 0;
    pub(super) const MEDIUM_ERROR: u8 = 3;
    pub(super) const ILLEGAL_REQUEST: u8 = 5;
    pub(super) const UNIT_ATTENTION: u8 = 6;
    pub(super) const DATA_PROTECT: u8 = 7;
    pub(super) const ABORTED_COMMAND: u8 = 11;
}

/// Why a command was not done: sense key, additional sense code and its qualifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub code: u8,
    /// Its qualifier.
    pub qualifier: u8,
}

impl Sense {
    /// Nothing to tell.
    pub const NONE: Self = Self::new(key::NONE, 0, 0);
    /// The parameter list is shorter than it says.
    pub const PARAMETER_LIST_LENGTH: Self = Self::new(key::ILLEGAL_REQUEST, 0x1a, 0);
    /// No such command.
    pub const INVALID_OPCODE: Self = Self::new(key::ILLEGAL_REQUEST, 0x20, 0);
    /// Blocks that are not there.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(key::ILLEGAL_REQUEST, 0x21, 0);
    /// A field of the command descriptor block.
    pub const INVALID_FIELD: Self = Self::new(key::ILLEGAL_REQUEST, 0x24, 0);
    /// No such logical unit.
    pub const NO_UNIT: Self = Self::new(key::ILLEGAL_REQUEST, 0x25, 0);
    /// A field of the parameter list.
    pub const INVALID_PARAMETER: Self = Self::new(key::ILLEGAL_REQUEST, 0x26, 0);
    /// The disk is read-only.
    pub const WRITE_PROTECTED: Self = Self::new(key::DATA_PROTECT, 0x27, 0);
    /// The host has no room for the data.
    pub const NO_SPACE: Self = Self::new(key::DATA_PROTECT, 0x27, 7);
    /// Power on or reset.
    pub const RESET: Self = Self::new(key::UNIT_ATTENTION, 0x29, 0);
    /// The disk has another size now.
    pub const CAPACITY_CHANGED: Self = Self::new(key::UNIT_ATTENTION, 0x2a, 9);
    /// The host cannot read.
    pub const READ_ERROR: Self = Self::new(key::MEDIUM_ERROR, 0x11, 0);
    /// The host cannot write.
    pub const WRITE_ERROR: Self = Self::new(key::MEDIUM_ERROR, 0x0c, 0);
    /// The buffers that came with the command are no use.
    pub const DATA_PHASE_ERROR: Self = Self::new(key::ABORTED_COMMAND, 0x4b, 0);

    /// Any.
    pub const fn new(key: u8, code: u8, qualifier: u8) -> Self {
        Self { key, code, qualifier }
    }

    /// What a host's error becomes.
    pub fn of_host(why: &io::Error, writes: bool) -> Self {
        match why.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NO_SPACE,
            _ if writes => Self::WRITE_ERROR,
            _ => Self::READ_ERROR,
        }
    }

    /// Fixed-format sense data.
    pub fn to_bytes(self) -> [u8; SENSE_LEN] {
        let mut bytes = [0; SENSE_LEN];
        // Current error; length of what follows byte 7.
        (bytes[0], bytes[2], bytes[7]) = (0x70, self.key, SENSE_LEN as u8 - 8);
        (bytes[12], bytes[13]) = (self.code, self.qualifier);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format() {
        let bytes = Sense::CAPACITY_CHANGED.to_bytes();
        assert_eq!(bytes[..8], [0x70, 0, 6, 0, 0, 0, 0, 10]);
        assert_eq!(bytes[12..14], [0x2a, 9]);
        assert_eq!(Sense::of_host(&io::Error::from_raw_os_error(28), true), Sense::NO_SPACE);
        assert_eq!(Sense::of_host(&io::Error::from_raw_os_error(5), false), Sense::READ_ERROR);
    }
}
