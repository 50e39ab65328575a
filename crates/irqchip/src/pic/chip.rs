//! One 8259A (Intel data sheet 231468).

use serde::{Deserialize, Serialize};

/// What the next write to the data port is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) enum Expect {
    /// The interrupt mask (OCW1).
    #[default]
    Mask,
    /// ICW2: the vectors.
    Vectors,
    /// ICW3: the cascade.
    Cascade,
    /// ICW4: modes.
    Modes,
}

/// The registers of one 8259A. Plain data: it is also its own snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the inputs.
    lines: u8,
    /// Inputs that are level-triggered (edge/level control register).
    pub(super) elcr: u8,
    vector_base: u8,
    expect: Expect,
    /// The initialisation sequence under way has no ICW3 / has an ICW4.
    single: bool,
    wants_modes: bool,
    /// The initialisation sequence has been completed: there is no output before.
    ready: bool,
    /// Input of lowest priority.
    lowest: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    /// The command port reads the in-service register.
    read_isr: bool,
    /// The next read is a poll.
    poll: bool,
}

impl Chip {
    /// Why a chip cannot be in this state.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.lowest > 7 || self.vector_base & 7 != 0 {
            return Err("the priority or the vectors are out of range".into());
        }
        Ok(())
    }

    /// Power-up; the inputs' levels belong to whoever drives them.
    pub(super) fn reset(&mut self) {
        *self = Self { lines: self.lines, lowest: 7, ..Self::default() };
    }

    pub(super) fn set_line(&mut self, input: u8, asserted: bool) {
        let bit = 1 << (input & 7);
        let rose = asserted && self.lines & bit == 0;
        self.lines = if asserted { self.lines | bit } else { self.lines & !bit };
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rose {
            self.irr |= bit;
        }
    }

    /// The input that the other chip of a pair is cascaded to: it requests as long as the other chip does.
    pub(super) fn set_cascade(&mut self, input: u8, requested: bool) {
        let bit = 1 << (input & 7);
        self.irr = if requested { self.irr | bit } else { self.irr & !bit };
    }

    pub(super) fn set_elcr(&mut self, value: u8) {
        self.elcr = value;
        self.irr = self.irr & !value | self.lines & value;
    }

    /// The input to be served next, if the chip requests an interrupt. `cascade` is the input another chip is at.
    pub(super) fn request(&self, cascade: Option<u8>) -> Option<u8> {
        let requested = self.irr & !self.imr;
        if !self.ready || requested == 0 {
            return None;
        }
        let mut blocking = self.isr;
        if self.special_mask {
            blocking &= !self.imr;
        }
        let next = self.by_priority(requested | blocking)?;
        // In special fully nested mode the chip at `cascade` may interrupt itself: it knows its own priorities.
        let blocked = blocking & 1 << next != 0 && !(self.special_fully_nested && cascade == Some(next));
        (!blocked && requested & 1 << next != 0).then_some(next)
    }

    /// The input of highest priority in `set`.
    fn by_priority(&self, set: u8) -> Option<u8> {
        (1..=8).map(|step| (self.lowest + step) & 7).find(|input| set & 1 << input != 0)
    }

    /// The acknowledge cycle's effect: `input` is in service.
    pub(super) fn serve(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    /// The vector of an input.
    pub(super) fn vector(&self, input: u8) -> u8 {
        self.vector_base | input & 7
    }

    /// Takes the pending poll command, if any.
    pub(super) fn take_poll(&mut self) -> bool {
        std::mem::take(&mut self.poll)
    }

    pub(super) fn read_command(&self) -> u8 {
        if self.read_isr { self.isr } else { self.irr }
    }

    pub(super) fn read_data(&self) -> u8 {
        self.imr
    }

    pub(super) fn write_command(&mut self, value: u8) {
        const ICW1: u8 = 1 << 4;
        const OCW3: u8 = 1 << 3;
        if value & ICW1 != 0 {
            self.initialise(value);
        } else if value & OCW3 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn initialise(&mut self, icw1: u8) {
        const NEEDS_ICW4: u8 = 1;
        const SINGLE: u8 = 1 << 1;
        *self = Self {
            // The edge detectors are cleared; level inputs go on requesting. Which inputs are which is the ELCR's
            // business in a PC, not ICW1's.
            irr: self.lines & self.elcr,
            lines: self.lines,
            elcr: self.elcr,
            expect: Expect::Vectors,
            single: icw1 & SINGLE != 0,
            wants_modes: icw1 & NEEDS_ICW4 != 0,
            lowest: 7,
            ..Self::default()
        };
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => {
                self.end_highest();
            }
            0b101 => {
                if let Some(input) = self.end_highest() {
                    self.lowest = input;
                }
            }
            0b011 => self.isr &= !(1 << level),
            0b111 => {
                self.isr &= !(1 << level);
                self.lowest = level;
            }
            0b110 => self.lowest = level,
            _ => {}
        }
    }

    /// Non-specific EOI. In special mask mode, inputs that are masked are left in service.
    fn end_highest(&mut self) -> Option<u8> {
        let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let input = self.by_priority(candidates)?;
        self.isr &= !(1 << input);
        Some(input)
    }

    fn write_ocw3(&mut self, value: u8) {
        const POLL: u8 = 1 << 2;
        match value & 3 {
            2 => self.read_isr = false,
            3 => self.read_isr = true,
            _ => {}
        }
        match value >> 5 & 3 {
            2 => self.special_mask = false,
            3 => self.special_mask = true,
            _ => {}
        }
        self.poll = value & POLL != 0;
    }

    pub(super) fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Mask => self.imr = value,
            Expect::Vectors => {
                self.vector_base = value & 0xf8;
                if self.single { self.after_cascade() } else { self.expect = Expect::Cascade }
            }
            // The pair's wiring is fixed.
            Expect::Cascade => self.after_cascade(),
            Expect::Modes => {
                self.auto_eoi = value & 1 << 1 != 0;
                self.special_fully_nested = value & 1 << 4 != 0;
                self.finish();
            }
        }
    }

    fn after_cascade(&mut self) {
        if self.wants_modes { self.expect = Expect::Modes } else { self.finish() }
    }

    fn finish(&mut self) {
        self.expect = Expect::Mask;
        self.ready = true;
    }
}
