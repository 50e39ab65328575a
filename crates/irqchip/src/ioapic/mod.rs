//! The I/O APIC (Intel 82093AA): turns interrupt lines into messages to local APICs.
//!
//! `chip` is the register machine; this file gives it a lock, a place on the memory bus, and snapshots.

mod chip;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::state::{StateError, decode, encode};
use platform::{AccessSize, BusDevice, IrqSink, Persist};

use crate::lapic::EoiSink;
use crate::message::MessageSink;

pub use chip::IoApicState;

use chip::Chip;

/// Guest-physical address of the I/O APIC.
pub const IOAPIC_ADDRESS: u64 = 0xfec0_0000;
/// Length of its register window, in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;

const KIND: &str = "ioapic";
const VERSION: u32 = 1;

/// The most pins the chip can have: one per bit of a word.
pub const MAX_PINS: u32 = 32;

/// An I/O APIC. Its interrupt inputs are lines 0 to `pins - 1` of its [`IrqSink`].
pub struct IoApic {
    chip: Mutex<Chip>,
    sink: Arc<dyn MessageSink>,
}

impl IoApic {
    /// A chip with 1 to 32 pins (other numbers are clamped) that sends its messages to `sink`. With `eoi_register` it is
    /// version 0x20 with an EOI register, otherwise version 0x11.
    pub fn new(pins: u32, eoi_register: bool, sink: Arc<dyn MessageSink>) -> Self {
        Self { chip: Mutex::new(Chip::new(pins.clamp(1, MAX_PINS), eoi_register)), sink }
    }

    fn lock(&self) -> MutexGuard<'_, Chip> {
        self.chip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of pins.
    pub fn pins(&self) -> u32 {
        self.lock().pins()
    }
}

impl IrqSink for IoApic {
    fn set_level(&self, line: u32, asserted: bool) {
        self.lock().set_level(line, asserted, &*self.sink);
    }
}

impl EoiSink for IoApic {
    fn end_of_interrupt(&self, vector: u8) {
        self.lock().end_of_interrupt(vector, &*self.sink);
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        u64::from(self.lock().read(offset)) & size.mask()
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.lock().write(offset, size, value as u32, &*self.sink);
    }
}

impl Persist for IoApic {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode(KIND, &self.lock().state)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: IoApicState = decode(KIND, VERSION, version, bytes)?;
        let mut chip = self.lock();
        state.check(chip.pins()).map_err(|why| StateError::Invalid { kind: KIND, why })?;
        chip.state = state;
        Ok(())
    }

    fn reset(&self) {
        self.lock().reset();
    }
}
