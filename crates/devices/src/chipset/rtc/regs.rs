//! Registers of the MC146818 (Motorola data sheet) and the NVRAM bytes that firmware agrees on.

/// The clock's registers, as indices behind port 70.
pub(super) mod index {
    pub(crate) const SECONDS: u8 = 0x00;
    pub(crate) const SECONDS_ALARM: u8 = 0x01;
    pub(crate) const MINUTES: u8 = 0x02;
    pub(crate) const MINUTES_ALARM: u8 = 0x03;
    pub(crate) const HOURS: u8 = 0x04;
    pub(crate) const HOURS_ALARM: u8 = 0x05;
    pub(crate) const WEEKDAY: u8 = 0x06;
    pub(crate) const DAY: u8 = 0x07;
    pub(crate) const MONTH: u8 = 0x08;
    pub(crate) const YEAR: u8 = 0x09;
    pub(crate) const A: u8 = 0x0a;
    pub(crate) const B: u8 = 0x0b;
    pub(crate) const C: u8 = 0x0c;
    pub(crate) const D: u8 = 0x0d;
    pub(crate) const CENTURY: u8 = 0x32;
    /// Memory between 16 MB and 4 GB in units of 64 KB, low byte first (2 bytes).
    pub(crate) const MEMORY_ABOVE_16M: u8 = 0x34;
    /// Memory above 4 GB in units of 64 KB, low byte first (3 bytes).
    pub(crate) const MEMORY_ABOVE_4G: u8 = 0x5b;

    /// The registers that tell the time, other than the alarm.
    pub(crate) const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
    /// First byte of the NVRAM.
    pub(crate) const NVRAM: u8 = 0x0e;
}

/// Register A.
pub(super) mod a {
    pub(crate) const RATE: u8 = 0x0f;
    pub(crate) const DIVIDER: u8 = 0x70;
    /// The divider for a crystal of 32.768 kHz: the clock runs.
    pub(crate) const DIVIDER_RUNS: u8 = 0x20;
    pub(crate) const UPDATE_IN_PROGRESS: u8 = 0x80;
    pub(crate) const DEFAULT: u8 = 0x26;
}

/// Register B.
pub(super) mod b {
    pub(crate) const HOURS_24: u8 = 0x02;
    pub(crate) const BINARY: u8 = 0x04;
    pub(crate) const UPDATE_INTERRUPT: u8 = 0x10;
    pub(crate) const SET: u8 = 0x80;
    pub(crate) const DEFAULT: u8 = HOURS_24;
}

/// Register C. The interrupt enables in register B have the same places.
pub(super) mod c {
    pub(crate) const UPDATE: u8 = 0x10;
    pub(crate) const ALARM: u8 = 0x20;
    pub(crate) const PERIODIC: u8 = 0x40;
    pub(crate) const ALL: u8 = UPDATE | ALARM | PERIODIC;
    pub(crate) const INTERRUPT: u8 = 0x80;
}

/// Register D: time and NVRAM are valid.
pub(super) const VALID: u8 = 0x80;
/// Hours: afternoon, in 12-hour mode.
pub(super) const PM: u8 = 0x80;
/// An alarm register with these bits matches any time.
pub(super) const ALARM_ANY: u8 = 0xc0;
/// Bytes behind the index.
pub(super) const BYTES: usize = 128;
/// Frequency of the crystal.
pub(super) const CRYSTAL_HZ: u64 = 32_768;
/// Time before the end of a second during which an update is announced or goes on: 244 + 1984 µs.
pub(super) const UPDATE_NS: u64 = 2_228_000;
