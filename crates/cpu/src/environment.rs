//! What a CPU's pins connect to.

use std::sync::atomic::AtomicU64;

/// A time-stamp counter that emitted code reads without a call: the host's counter minus `base`, but never less than what
/// anybody has read from it before, which is in `highest`.
#[derive(Clone, Copy, Debug)]
pub struct HostCounter<'a> {
    /// The host's counter where the guest's is 0.
    pub base: u64,
    /// The highest value read so far, by all who share the counter. At the same address as long as the environment lives.
    pub highest: &'a AtomicU64,
}

/// The world outside one vCPU: buses, its local APIC, the policy for unknown MSRs, time.
/// Called on the vCPU's own thread.
pub trait Environment: Send + Sync {
    /// Reads `size` (1, 2, 4, 8) bytes of guest-physical space that is not RAM. All ones where nobody answers.
    /// The local APIC's page is part of this space.
    fn mmio_read(&self, gpa: u64, size: u8) -> u64;
    /// Writes `size` bytes of guest-physical space that is not RAM.
    fn mmio_write(&self, gpa: u64, size: u8, value: u64);
    /// Reads a port; `size` 1, 2 or 4. `rip` is the instruction's, for messages.
    fn io_read(&self, port: u16, size: u8, rip: u64) -> u32;
    /// Writes a port.
    fn io_write(&self, port: u16, size: u8, value: u32, rip: u64);
    /// Whether an interrupt is deliverable now (above the processor priority, or ExtINT).
    fn interrupt_pending(&self) -> bool;
    /// The interrupt-acknowledge cycle: the vector to deliver, or `None` if the interrupt has gone away.
    fn interrupt_acknowledge(&self) -> Option<u8>;
    /// Reads CR8: the task priority, 0–15.
    fn read_cr8(&self) -> u8;
    /// Writes CR8.
    fn write_cr8(&self, value: u8);
    /// Reads an MSR that the CPU core does not own: local APIC (0x1B, 0x800–0x8FF, 0x6E0) and unknown ones. `None` = #GP.
    fn read_msr(&self, index: u32) -> Option<u64>;
    /// Writes an MSR that the CPU core does not own; `false` = #GP.
    fn write_msr(&self, index: u32, value: u64) -> bool;
    /// The host's time-stamp counter in guest ticks, before IA32_TSC_ADJUST-like offsets of the vCPU.
    fn tsc(&self) -> u64;
    /// What [`Environment::tsc`] reads, if it is that; `None`: it has to be called.
    fn host_counter(&self) -> Option<HostCounter<'_>> {
        None
    }
    /// Called when INIT resets the vCPU, for its local APIC.
    fn init_reset(&self) {}
}
