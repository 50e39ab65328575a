//! Registers of the HPET (IA-PC HPET specification 1.0a, section 2.3).

/// Where bhyve has it.
pub const ADDRESS: u64 = 0xfed0_0000;
/// Bytes of registers.
pub const LENGTH: u64 = 0x400;
/// Frequency of the main counter: 2^24 Hz.
pub const FREQUENCY_HZ: u64 = 1 << 24;
/// Number of timers.
pub const TIMERS: usize = 8;

/// Register offsets; all are 64 bits wide.
pub(super) mod offset {
    pub(crate) const CAPABILITIES: u64 = 0x000;
    pub(crate) const CONFIG: u64 = 0x010;
    pub(crate) const STATUS: u64 = 0x020;
    pub(crate) const COUNTER: u64 = 0x0f0;
    /// First timer; each has 0x20 bytes.
    pub(crate) const TIMERS: u64 = 0x100;
    pub(crate) const TIMER_BYTES: u64 = 0x20;
    // Within a timer.
    pub(crate) const TIMER_CONFIG: u64 = 0x00;
    pub(crate) const COMPARATOR: u64 = 0x08;
    pub(crate) const FSB_ROUTE: u64 = 0x10;
}

/// Period of the main counter in femtoseconds.
const PERIOD_FS: u64 = 1_000_000_000_000_000 / FREQUENCY_HZ;
/// General capabilities: period, vendor 8086, legacy replacement, 32-bit counter, last timer, revision 1.
pub(super) const CAPABILITIES: u64 = PERIOD_FS << 32 | 0x8086 << 16 | 1 << 15 | (TIMERS as u64 - 1) << 8 | 1;

/// General configuration.
pub(super) mod config {
    pub(crate) const ENABLE: u64 = 1 << 0;
    pub(crate) const LEGACY: u64 = 1 << 1;
    pub(crate) const ALL: u64 = ENABLE | LEGACY;
}

/// Configuration and capabilities of a timer. The upper half of the register lists the routes.
pub(super) mod timer {
    pub(crate) const LEVEL: u32 = 1 << 1;
    pub(crate) const INTERRUPT: u32 = 1 << 2;
    pub(crate) const PERIODIC: u32 = 1 << 3;
    pub(crate) const CAN_BE_PERIODIC: u32 = 1 << 4;
    /// The next write to the comparator of a periodic timer sets the comparator, too.
    pub(crate) const SET_VALUE: u32 = 1 << 6;
    pub(crate) const ROUTE_SHIFT: u32 = 9;
    pub(crate) const ROUTE: u32 = 0x1f << ROUTE_SHIFT;
    pub(crate) const FSB: u32 = 1 << 14;
    pub(crate) const CAN_DO_FSB: u32 = 1 << 15;
    pub(crate) const WRITABLE: u32 = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | ROUTE | FSB;
    pub(crate) const CAPABILITIES: u32 = CAN_BE_PERIODIC | CAN_DO_FSB;
}
