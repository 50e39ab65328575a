//! The pair of 8259A interrupt controllers with its edge/level control registers.
//!
//! | file   | part                                                        |
//! |--------|-------------------------------------------------------------|
//! | `chip` | one 8259A                                                   |
//! | `pair` | two of them, cascaded                                       |
//! | here   | lock, output, ports 20, 21, A0, A1, 4D0, 4D1, snapshots     |
//!
//! The output INTR is an atomic that local APICs read, not an event pushed to them, so two threads that change inputs at
//! the same time cannot leave a wrong level behind. Only its rising edges are announced, after the lock is released.

mod chip;
mod pair;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use platform::state::{StateError, decode, encode};
use platform::{AccessSize, Bus, BusDevice, BusError, IrqSink, Persist};

use crate::bytewise;
use crate::lapic::ExtIntSource;

use pair::{Pair, Port};

const KIND: &str = "i8259";
const VERSION: u32 = 1;

/// Number of inputs; input 2 is the cascade and cannot be driven.
pub const PIC_INPUTS: u32 = 16;

/// Told about rising edges of the pair's output. Called without any lock of the pair held.
pub trait IntrListener: Send + Sync {
    /// INTR rose, or stayed up through an acknowledge cycle because there is more to serve.
    fn intr_rose(&self);
}

/// The pair. Its interrupt inputs are lines 0 to 15 of its [`IrqSink`].
pub struct Pic {
    pair: Mutex<Pair>,
    intr: AtomicBool,
    listener: OnceLock<Arc<dyn IntrListener>>,
}

impl Pic {
    /// A pair after power-up: without output until it is initialised.
    pub fn new() -> Self {
        Self { pair: Mutex::new(Pair::new()), intr: AtomicBool::new(false), listener: OnceLock::new() }
    }

    /// Connects the output; only the first call counts.
    pub fn connect(&self, listener: Arc<dyn IntrListener>) {
        // A second listener would mean a board wired twice; the first one stays.
        let _ = self.listener.set(listener);
    }

    /// Puts the pair at its ports.
    ///
    /// # Errors
    /// One of the ports is taken.
    pub fn map(self: &Arc<Self>, ports: &Bus) -> Result<(), BusError> {
        for (start, first, second) in [
            (0x20, Port::Command(0), Port::Data(0)),
            (0xa0, Port::Command(1), Port::Data(1)),
            (0x4d0, Port::EdgeLevel(0), Port::EdgeLevel(1)),
        ] {
            ports.map(start, 2, Arc::new(PortPair { pic: self.clone(), ports: [first, second] }))?;
        }
        Ok(())
    }

    /// Runs `change` and brings the output up to date.
    fn with<T>(&self, change: impl FnOnce(&mut Pair) -> T) -> T {
        let mut pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut pair);
        let level = pair.update();
        let rose = level && !self.intr.load(Ordering::Relaxed);
        self.intr.store(level, Ordering::Release);
        drop(pair);
        if rose && let Some(listener) = self.listener.get() {
            listener.intr_rose();
        }
        result
    }
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl ExtIntSource for Pic {
    fn is_asserted(&self) -> bool {
        self.intr.load(Ordering::Acquire)
    }

    fn peek(&self) -> u8 {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner).peek()
    }

    fn acknowledge(&self) -> u8 {
        self.with(|pair| {
            // The cycle takes the output down; if there is more to serve, it rises again.
            self.intr.store(false, Ordering::Release);
            pair.acknowledge()
        })
    }
}

impl IrqSink for Pic {
    fn set_level(&self, line: u32, asserted: bool) {
        if let Ok(line) = u8::try_from(line) {
            self.with(|pair| pair.set_line(line, asserted));
        }
    }
}

/// Two neighbouring ports.
struct PortPair {
    pic: Arc<Pic>,
    ports: [Port; 2],
}

impl BusDevice for PortPair {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        bytewise::read(offset, size, |offset| match self.ports.get(offset as usize) {
            Some(&port) => self.pic.with(|pair| pair.read(port)),
            None => 0xff,
        })
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        bytewise::write(offset, size, value, |offset, byte| {
            if let Some(&port) = self.ports.get(offset as usize) {
                self.pic.with(|pair| pair.write(port, byte));
            }
        });
    }
}

impl Persist for Pic {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode(KIND, &*self.pair.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: Pair = decode(KIND, VERSION, version, bytes)?;
        state.check().map_err(|why| StateError::Invalid { kind: KIND, why })?;
        let mut pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        *pair = state;
        self.intr.store(pair.update(), Ordering::Release);
        Ok(())
    }

    fn reset(&self) {
        self.with(Pair::reset);
    }
}
