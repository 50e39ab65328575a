//! The register that says where the Q35's memory-mapped configuration is (Intel 3 Series Express Chipset Family datasheet,
//! 5.1.15, PCIEXBAR). Firmware for that board chooses a place and then reaches all functions there; the place that bhyve's tables
//! name stays beside it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::{AccessSize, BusDevice};

use super::bar::Decode;
use super::host::{ECAM_BASE, ECAM_SIZE};
use super::mapper::{BarKey, BarMapper};

/// The register's bytes in the host bridge's configuration space.
const REGISTER: std::ops::Range<u16> = 0x60..0x68;
const ENABLE: u64 = 1;
/// Address 35:28 with the bits that smaller sizes add, size and enable.
const WRITABLE: u64 = 0xf_fc00_0007;

/// The register and the range that it puts on the memory bus.
pub(super) struct PciExBar {
    value: Mutex<u64>,
    mapper: Arc<BarMapper>,
    key: BarKey,
    configuration: Arc<dyn BusDevice>,
}

impl PciExBar {
    /// Off. `key` is the name of the range at the `mapper`.
    pub(super) fn new(mapper: Arc<BarMapper>, key: BarKey, configuration: Arc<dyn BusDevice>) -> Self {
        Self { value: Mutex::new(0), mapper, key, configuration }
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads it, if it is at `offset`; aligned.
    pub(super) fn config_read(&self, offset: u16, size: AccessSize) -> Option<u32> {
        let shift = shift(offset)?;
        Some((self.value() >> shift & size.mask()) as u32)
    }

    /// Writes it, if it is at `offset`; aligned.
    pub(super) fn config_write(&self, offset: u16, size: AccessSize, value: u32) -> bool {
        let Some(shift) = shift(offset) else { return false };
        let mut register = self.lock();
        let merged = *register & !(size.mask() << shift) | (u64::from(value) & size.mask()) << shift;
        self.set(&mut register, merged);
        true
    }

    /// The whole register.
    pub(super) fn value(&self) -> u64 {
        *self.lock()
    }

    /// Sets the whole register.
    pub(super) fn set_value(&self, value: u64) {
        self.set(&mut self.lock(), value);
    }

    fn set(&self, register: &mut u64, value: u64) {
        *register = value & WRITABLE;
        // Where it always is, it need not be put again.
        let wanted = decode(*register).filter(|decode| decode.start != ECAM_BASE);
        self.mapper.place(self.key, wanted, || self.configuration.clone());
    }
}

impl Drop for PciExBar {
    fn drop(&mut self) {
        self.mapper.remove(self.key);
    }
}

/// How far up in the register the byte at `offset` is.
fn shift(offset: u16) -> Option<u16> {
    REGISTER.contains(&offset).then(|| (offset - REGISTER.start) * 8)
}

/// The range that a value of the register means.
fn decode(value: u64) -> Option<Decode> {
    let size = match value >> 1 & 3 {
        0 => ECAM_SIZE,
        1 => ECAM_SIZE / 2,
        2 => ECAM_SIZE / 4,
        _ => return None,
    };
    let start = value & WRITABLE & !(size - 1);
    (value & ENABLE != 0 && start != 0).then_some(Decode { io: false, start, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_places() {
        let range = |value| decode(value).map(|decode| (decode.start, decode.size >> 20));
        assert_eq!(range(0xb000_0001), Some((0xb000_0000, 256)));
        assert_eq!(range(0xb800_0001), Some((0xb000_0000, 256)));
        assert_eq!(range(0xb800_0003), Some((0xb800_0000, 128)));
        assert_eq!(range(0xbc00_0005), Some((0xbc00_0000, 64)));
        for off in [0xb000_0000, 0xb000_0007, 1] {
            assert_eq!(range(off), None, "{off:#x}");
        }
    }
}
