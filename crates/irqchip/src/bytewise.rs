//! Wider port accesses to 8-bit devices: the ISA bus splits them into bytes.

use platform::AccessSize;

/// Reads `size` bytes from consecutive ports, the lowest first.
pub(crate) fn read(offset: u64, size: AccessSize, mut port: impl FnMut(u64) -> u8) -> u64 {
    (0..size.bytes()).fold(0, |value, byte| value | u64::from(port(offset.wrapping_add(byte))) << (byte * 8))
}

/// Writes `size` bytes to consecutive ports, the lowest first.
pub(crate) fn write(offset: u64, size: AccessSize, value: u64, mut port: impl FnMut(u64, u8)) {
    for byte in 0..size.bytes() {
        port(offset.wrapping_add(byte), (value >> (byte * 8)) as u8);
    }
}
