//! One more source on every input of an interrupt chip, by number: what a PIRQ router drives.

use irqchip::IrqRouter;
use platform::{IrqLine, IrqSink};

/// One line per input; `None` where there is none to drive.
pub(crate) struct Sources(Vec<Option<IrqLine>>);

impl Sources {
    /// On the inputs of the 8259 pair.
    pub(crate) fn pic(router: &IrqRouter) -> Self {
        Self((0..16).map(|input| router.pic_source(input)).collect())
    }

    /// On the pins of the I/O APIC.
    pub(crate) fn ioapic(router: &IrqRouter, pins: u32) -> Self {
        Self((0..pins).map(|pin| router.ioapic_source(pin)).collect())
    }
}

impl IrqSink for Sources {
    fn set_level(&self, line: u32, asserted: bool) {
        if let Some(Some(source)) = self.0.get(line as usize) {
            source.set(asserted);
        }
    }
}
