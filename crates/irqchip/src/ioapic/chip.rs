//! The register machine of the 82093AA.

use platform::AccessSize;
use serde::{Deserialize, Serialize};

use crate::message::{DeliveryMode, Destination, Message, MessageSink, TriggerMode};

/// Offsets in the register window.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// Indirect registers.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;

/// Bits of a redirection entry.
mod entry {
    pub(super) const VECTOR: u64 = 0xff;
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    /// Vector, delivery mode, destination mode, polarity, trigger mode, mask.
    pub(super) const LOW_WRITABLE: u64 = 0x1_afff;
    /// Destination, and its bits 14:8 in bits 55:49 (the extension that CPUID leaf 0x40000001 announces).
    pub(super) const HIGH_WRITABLE: u64 = 0xfffe_0000_0000_0000;
}

/// State of an I/O APIC, version 1.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IoApicState {
    /// Bits 27:24 of the ID register.
    pub id: u8,
    /// Register selected for the window.
    pub select: u8,
    /// Redirection table, one entry per pin.
    pub entries: Vec<u64>,
    /// Levels of the pins, one bit each.
    pub levels: u32,
}

impl IoApicState {
    fn power_on(pins: u32) -> Self {
        Self { id: 0, select: 0, entries: vec![entry::MASKED; pins as usize], levels: 0 }
    }

    /// Why a chip with `pins` pins cannot be in this state.
    pub(super) fn check(&self, pins: u32) -> Result<(), String> {
        let known = entry::LOW_WRITABLE | entry::REMOTE_IRR | entry::HIGH_WRITABLE;
        if self.entries.len() != pins as usize {
            return Err(format!("it has {} pins, this chip has {pins}", self.entries.len()));
        }
        if self.entries.iter().any(|entry| entry & !known != 0) {
            return Err("reserved bits of a redirection entry are set".into());
        }
        if self.id > 0xf || u64::from(self.levels) >> pins != 0 {
            return Err("the ID or a pin's level is out of range".into());
        }
        Ok(())
    }
}

/// The registers, and what they do.
pub(super) struct Chip {
    pub(super) state: IoApicState,
    eoi_register: bool,
}

impl Chip {
    pub(super) fn new(pins: u32, eoi_register: bool) -> Self {
        Self { state: IoApicState::power_on(pins), eoi_register }
    }

    /// The registers after power-up; the pins' levels belong to whoever drives them.
    pub(super) fn reset(&mut self) {
        let levels = self.state.levels;
        self.state = IoApicState { levels, ..IoApicState::power_on(self.pins()) };
    }

    pub(super) fn pins(&self) -> u32 {
        self.state.entries.len() as u32
    }

    pub(super) fn set_level(&mut self, pin: u32, asserted: bool, sink: &dyn MessageSink) {
        if pin >= self.pins() {
            return;
        }
        let bit = 1 << pin;
        let rose = asserted && self.state.levels & bit == 0;
        if asserted {
            self.state.levels |= bit;
        } else {
            self.state.levels &= !bit;
        }
        if rose {
            self.request(pin, sink);
        }
    }

    /// Sends the interrupt of an asserted pin, if its entry lets it. An edge at a masked pin is lost, as on the chip.
    fn request(&mut self, pin: u32, sink: &dyn MessageSink) {
        let Some(entry) = self.state.entries.get_mut(pin as usize) else { return };
        if *entry & (entry::MASKED | entry::REMOTE_IRR) != 0 {
            return;
        }
        let mode = match DeliveryMode::from_bits((*entry >> 8) as u32) {
            Some(DeliveryMode::Startup) | None => return,
            Some(mode) => mode,
        };
        let vectored = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        let trigger = TriggerMode::from_bit(vectored && *entry & entry::LEVEL != 0);
        let id = (*entry >> 56) as u32 | ((*entry >> 49) as u32 & 0x7f) << 8;
        let destination = Destination::from_device(id, *entry & entry::LOGICAL != 0);
        let taken = sink.deliver(&Message { destination, mode, vector: (*entry & entry::VECTOR) as u8, trigger });
        if taken && trigger == TriggerMode::Level {
            *entry |= entry::REMOTE_IRR;
        }
    }

    /// A level-triggered pin asks again as long as it is asserted.
    fn retry_level(&mut self, pin: u32, sink: &dyn MessageSink) {
        let level = self.state.entries.get(pin as usize).is_some_and(|entry| entry & entry::LEVEL != 0);
        if level && self.state.levels & 1 << pin != 0 {
            self.request(pin, sink);
        }
    }

    pub(super) fn end_of_interrupt(&mut self, vector: u8, sink: &dyn MessageSink) {
        for pin in 0..self.pins() {
            let Some(entry) = self.state.entries.get_mut(pin as usize) else { return };
            if *entry & entry::REMOTE_IRR != 0 && (*entry & entry::VECTOR) as u8 == vector {
                *entry &= !entry::REMOTE_IRR;
                self.retry_level(pin, sink);
            }
        }
    }

    /// Reads 32 bits at the start of a register, or their upper part.
    pub(super) fn read(&self, offset: u64) -> u32 {
        let value = match offset & !3 {
            SELECT => u32::from(self.state.select),
            WINDOW => self.read_indirect(),
            _ => u32::MAX,
        };
        value >> ((offset & 3) * 8)
    }

    fn read_indirect(&self) -> u32 {
        match self.state.select {
            ID | ARBITRATION => u32::from(self.state.id) << 24,
            VERSION => {
                let version = if self.eoi_register { 0x20 } else { 0x11 };
                version | (self.pins() - 1) << 16
            }
            select => match self.entry_index(select).and_then(|index| self.state.entries.get(index)) {
                Some(entry) if select & 1 == 0 => *entry as u32,
                Some(entry) => (*entry >> 32) as u32,
                None => u32::MAX,
            },
        }
    }

    fn entry_index(&self, select: u8) -> Option<usize> {
        Some(usize::from(select.checked_sub(TABLE)?) / 2)
    }

    /// Writes a register: the select register in any width, the window only as 32 bits.
    pub(super) fn write(&mut self, offset: u64, size: AccessSize, value: u32, sink: &dyn MessageSink) {
        let wide = matches!(size, AccessSize::Dword | AccessSize::Qword);
        match offset {
            SELECT => self.state.select = value as u8,
            WINDOW if wide => self.write_indirect(value, sink),
            EOI if self.eoi_register => self.end_of_interrupt(value as u8, sink),
            _ => {}
        }
    }

    fn write_indirect(&mut self, value: u32, sink: &dyn MessageSink) {
        let select = self.state.select;
        if select == ID {
            self.state.id = (value >> 24) as u8 & 0xf;
            return;
        }
        let Some(index) = self.entry_index(select) else { return };
        let Some(entry) = self.state.entries.get_mut(index) else { return };
        if select & 1 == 0 {
            let kept = entry::REMOTE_IRR | entry::HIGH_WRITABLE;
            *entry = *entry & kept | u64::from(value) & entry::LOW_WRITABLE;
            if *entry & entry::LEVEL == 0 {
                // Software without an EOI register ends a level-triggered interrupt by making the pin edge-triggered.
                *entry &= !entry::REMOTE_IRR;
            }
        } else {
            *entry = *entry & !entry::HIGH_WRITABLE | u64::from(value) << 32 & entry::HIGH_WRITABLE;
        }
        self.retry_level(index as u32, sink);
    }
}
