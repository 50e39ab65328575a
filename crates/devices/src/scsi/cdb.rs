//! Command descriptor blocks (SPC-4, 4.3; SBC-3, 5).

/// Operation codes.
pub mod opcode {
    #![allow(missing_docs)]
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const RESERVE_6: u8 = 0x16;
    pub const RELEASE_6: u8 = 0x17;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const WRITE_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const WRITE_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const WRITE_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
}

/// Service action of [`opcode::SERVICE_ACTION_IN_16`].
pub const READ_CAPACITY_16: u8 = 0x10;

/// A command descriptor block. Bytes behind its end are zero.
#[derive(Clone, Copy, Debug)]
pub struct Cdb<'a>(pub &'a [u8]);

impl Cdb<'_> {
    /// Byte `at`.
    pub fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Big-endian number of `len` bytes, at most 8.
    pub fn number(&self, at: usize, len: usize) -> u64 {
        (at..at + len).fold(0, |number, at| number << 8 | u64::from(self.byte(at)))
    }

    /// Length by the group of the operation code (SPC-4, 4.3.2); variable and reserved ones have what is there.
    pub fn len(&self) -> usize {
        match self.opcode() >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            _ if self.opcode() == 0x7f => usize::from(self.byte(7)) + 8,
            _ => self.0.len(),
        }
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Operation code.
    pub fn opcode(&self) -> u8 {
        self.byte(0)
    }

    /// First block and number of blocks, of the commands that have both, by the group of the operation code.
    pub fn extent(&self) -> (u64, u64) {
        match self.opcode() >> 5 {
            // READ(6) and WRITE(6): 21 bits of address, and 0 means 256 blocks.
            0 => (self.number(1, 3) & 0x1f_ffff, if self.byte(4) == 0 { 256 } else { u64::from(self.byte(4)) }),
            4 => (self.number(2, 8), self.number(10, 4)),
            5 => (self.number(2, 4), self.number(6, 4)),
            _ => (self.number(2, 4), self.number(7, 2)),
        }
    }

    /// Whether reading or writing asks for protection information, which this disk has none of.
    pub fn has_protection(&self) -> bool {
        self.opcode() >> 5 != 0 && self.byte(1) >> 5 != 0
    }

    /// Force unit access.
    pub fn fua(&self) -> bool {
        self.opcode() >> 5 != 0 && self.byte(1) & 8 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_of_all_lengths() {
        assert_eq!(Cdb(&[0x08, 0xff, 1, 2, 3, 0]).extent(), (0x1f_0102, 3));
        assert_eq!(Cdb(&[0x0a, 0, 0, 0, 0, 0]).extent(), (0, 256));
        assert_eq!(Cdb(&[0x28, 8, 1, 2, 3, 4, 0, 5, 6, 0]).extent(), (0x0102_0304, 0x0506));
        assert_eq!(Cdb(&[0xa8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]).extent(), (0x0102_0304, 0x0506_0708));
        let long = [0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1, 0, 0, 0];
        assert_eq!(Cdb(&long).extent(), (0x0102_0304_0506_0708, 256));
        assert_eq!(Cdb(&[0x88]).extent(), (0, 0), "what is not there is zero");
        assert_eq!([0x12, 0x28, 0x5a, 0x88, 0xa8].map(|code| Cdb(&[code]).len()), [6, 10, 10, 16, 12]);
        assert!(Cdb(&[0x28, 8]).fua() && !Cdb(&[0x28]).fua() && !Cdb(&[0x08, 8]).fua());
        assert!(Cdb(&[0x2a, 0x20]).has_protection());
    }
}
