//! Devices with byte-wide registers: a wider access is one to each register in turn, as on the ISA bus.

use platform::AccessSize;

/// Reads `size` registers from `offset`.
pub(super) fn read(offset: u64, size: AccessSize, mut register: impl FnMut(u64) -> u8) -> u64 {
    (0..size.bytes()).fold(0, |value, n| value | u64::from(register(offset.wrapping_add(n))) << (8 * n))
}

/// Writes `size` registers from `offset`.
pub(super) fn write(offset: u64, size: AccessSize, value: u64, mut register: impl FnMut(u64, u8)) {
    for n in 0..size.bytes() {
        register(offset.wrapping_add(n), (value >> (8 * n)) as u8);
    }
}
