//! Interrupts on their way from devices to interrupt chips.

use std::sync::Arc;

/// The receiving side of interrupt lines: an interrupt chip, or a router in front of several.
pub trait IrqSink: Send + Sync {
    /// Sets the level of input `line`. Edges are what a chip sees between two calls.
    fn set_level(&self, line: u32, asserted: bool);
}

/// One interrupt line, as a device holds it.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    line: u32,
}

impl IrqLine {
    /// Input `line` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, line: u32) -> Self {
        Self { sink, line }
    }

    /// Asserts or de-asserts the line.
    pub fn set(&self, asserted: bool) {
        self.sink.set_level(self.line, asserted);
    }

    /// One edge: asserts, then de-asserts.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A message-signalled interrupt: one 32-bit memory write (PCI 3.0, 6.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MsiMessage {
    /// Where the message is written, normally 0xFEExxxxx.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Whoever delivers message-signalled interrupts.
pub trait MsiSink: Send + Sync {
    /// Delivers one message. An address outside 0xFEExxxxx is ignored.
    fn send(&self, message: MsiMessage);
}
