//! Where the exits of a vCPU go: buses and policy. Also what the pins of the interpreter connect to that executes what KVM
//! gives up on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use cpu::Environment;
use platform::{AccessSize, Bus};

use crate::engine::VmOptions;
use crate::policy::AccessPolicy;

/// The world outside one vCPU.
pub(super) struct Outside {
    index: u32,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    policy: Arc<AccessPolicy>,
    /// The interpreter's task priority; the kernel's local APIC has the real one.
    cr8: AtomicU8,
}

/// A port access that nobody answered.
pub(super) struct Unclaimed {
    pub(super) port: u16,
    pub(super) size: AccessSize,
    pub(super) write: bool,
}

fn value(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    all[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
    u64::from_le_bytes(all)
}

/// Splits an access of `len` bytes at `gpa` into what the bus carries: (offset, size). KVM's pieces of an access that crosses
/// pages can have odd lengths.
fn pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, AccessSize)> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(offset).filter(|left| *left > 0)?;
        let whole = if offset == 0 { AccessSize::from_bytes(len) } else { None };
        let size = whole.unwrap_or_else(|| {
            let aligned = gpa.wrapping_add(offset as u64).trailing_zeros().min(3);
            AccessSize::from_bytes(1 << aligned.min(left.ilog2())).unwrap_or(AccessSize::Byte)
        });
        offset += size.bytes() as usize;
        Some((offset - size.bytes() as usize, size))
    })
}

impl Outside {
    pub(super) fn new(index: u32, options: &VmOptions) -> Self {
        let (ports, mmio, policy) = (options.ports.clone(), options.mmio.clone(), options.policy.clone());
        Self { index, ports, mmio, policy, cr8: AtomicU8::new(0) }
    }

    /// Serves IN or INS: fills `data`, one value of `width` bytes after the other.
    pub(super) fn port_read(&self, port: u16, width: usize, data: &mut [u8]) -> Option<Unclaimed> {
        let size = AccessSize::from_bytes(width).unwrap_or(AccessSize::Byte);
        let mut unclaimed = None;
        for element in data.chunks_exact_mut(size.bytes() as usize) {
            let value = self.ports.read(u64::from(port), size).unwrap_or_else(|| {
                unclaimed = Some(Unclaimed { port, size, write: false });
                size.mask()
            });
            element.copy_from_slice(&value.to_le_bytes()[..element.len()]);
        }
        unclaimed
    }

    /// Serves OUT or OUTS.
    pub(super) fn port_write(&self, port: u16, width: usize, data: &[u8]) -> Option<Unclaimed> {
        let size = AccessSize::from_bytes(width).unwrap_or(AccessSize::Byte);
        let mut unclaimed = None;
        for element in data.chunks_exact(size.bytes() as usize) {
            if !self.ports.write(u64::from(port), size, value(element)) {
                unclaimed = Some(Unclaimed { port, size, write: true });
            }
        }
        unclaimed
    }

    /// What happens on a port access that nobody answered.
    pub(super) fn report(&self, access: &Unclaimed, rip: u64) {
        self.policy.unclaimed_port(access.port, access.size, access.write, rip);
    }

    /// Reads guest-physical space outside RAM.
    pub(super) fn memory_read(&self, gpa: u64, data: &mut [u8]) {
        for (offset, size) in pieces(gpa, data.len()) {
            let value = self.mmio.read(gpa.wrapping_add(offset as u64), size).unwrap_or(size.mask());
            let end = offset + size.bytes() as usize;
            data[offset..end].copy_from_slice(&value.to_le_bytes()[..end - offset]);
        }
    }

    /// Writes guest-physical space outside RAM.
    pub(super) fn memory_write(&self, gpa: u64, data: &[u8]) {
        for (offset, size) in pieces(gpa, data.len()) {
            let end = offset + size.bytes() as usize;
            self.mmio.write(gpa.wrapping_add(offset as u64), size, value(&data[offset..end]));
        }
    }

    pub(super) fn msr_read(&self, index: u32) -> Option<u64> {
        self.policy.read_msr(self.index, index)
    }

    pub(super) fn msr_write(&self, index: u32, value: u64) -> bool {
        self.policy.write_msr(self.index, index, value)
    }
}

/// For instructions that KVM gives up on. The kernel's chips cannot be reached from here; such instructions do not go there
/// (the kernel emulates all that system software uses on APICs).
impl Environment for Outside {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        let mut data = [0; 8];
        let size = usize::from(size).min(8);
        self.memory_read(gpa, &mut data[..size]);
        u64::from_le_bytes(data)
    }

    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        self.memory_write(gpa, &value.to_le_bytes()[..usize::from(size).min(8)]);
    }

    fn io_read(&self, port: u16, size: u8, rip: u64) -> u32 {
        let mut data = [0; 4];
        let size = usize::from(size).min(4);
        if let Some(unclaimed) = self.port_read(port, size, &mut data[..size]) {
            self.report(&unclaimed, rip);
        }
        u32::from_le_bytes(data)
    }

    fn io_write(&self, port: u16, size: u8, value: u32, rip: u64) {
        let size = usize::from(size).min(4);
        if let Some(unclaimed) = self.port_write(port, size, &value.to_le_bytes()[..size]) {
            self.report(&unclaimed, rip);
        }
    }

    /// The kernel delivers interrupts.
    fn interrupt_pending(&self) -> bool {
        false
    }

    fn interrupt_acknowledge(&self) -> Option<u8> {
        None
    }

    fn read_cr8(&self) -> u8 {
        self.cr8.load(Ordering::Relaxed)
    }

    fn write_cr8(&self, value: u8) {
        self.cr8.store(value, Ordering::Relaxed);
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        self.msr_read(index)
    }

    fn write_msr(&self, index: u32, value: u64) -> bool {
        self.msr_write(index, value)
    }

    /// The interpreter is given the time with the state, before each instruction.
    fn tsc(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(gpa: u64, len: usize) -> Vec<(usize, u64)> {
        pieces(gpa, len).map(|(offset, size)| (offset, size.bytes())).collect()
    }

    #[test]
    fn odd_lengths_become_aligned_pieces() {
        assert_eq!(split(0xffd, 4), [(0, 4)], "whole widths stay whole, aligned or not");
        assert_eq!(split(0xffd, 3), [(0, 1), (1, 2)]);
        assert_eq!(split(0x1000, 5), [(0, 4), (4, 1)]);
        assert_eq!(split(0x1001, 7), [(0, 1), (1, 2), (3, 4)]);
        assert_eq!(split(u64::MAX, 3).iter().map(|piece| piece.1).sum::<u64>(), 3);
        assert!(split(0, 0).is_empty());
    }
}
