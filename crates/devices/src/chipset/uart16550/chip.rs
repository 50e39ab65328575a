//! The 16550A as a register machine, without lock, line or host.
//!
//! Baud rates have no effect: a byte written is transmitted as soon as the host takes it, and the receiver times out
//! (the indication for data below the trigger level) as soon as there is data.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::regs::*;

/// A received character and what was wrong with it (bits of the line status register).
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Character {
    byte: u8,
    errors: u8,
}

/// All state of the chip; also the archived state, version 1.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Chip {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    modem_deltas: u8,
    overrun: bool,
    rx: VecDeque<Character>,
    tx: VecDeque<u8>,
    /// The transmitter ran empty (or its interrupt was just enabled) and nobody has taken notice.
    thr_empty_pending: bool,
}

impl Chip {
    pub(super) fn new() -> Self {
        Self {
            divisor: DEFAULT_DIVISOR,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            modem_deltas: 0,
            overrun: false,
            rx: VecDeque::with_capacity(FIFO_BYTES),
            tx: VecDeque::with_capacity(FIFO_BYTES),
            thr_empty_pending: false,
        }
    }

    /// Which rule an archived state breaks.
    pub(super) fn check(&self) -> Result<(), String> {
        let limits =
            [("IER", self.ier, ier::ALL), ("MCR", self.mcr, mcr::ALL), ("MSR", self.modem_deltas, msr::DELTAS)];
        if let Some((name, value, mask)) = limits.into_iter().find(|(_, value, mask)| value & !mask != 0) {
            return Err(format!("{name} bits {:#x} do not exist", value & !mask));
        }
        if self.rx.len() > self.capacity() || self.tx.len() > self.capacity() {
            return Err(format!("{} and {} bytes in the FIFOs", self.rx.len(), self.tx.len()));
        }
        Ok(())
    }

    /// Reads a register; offsets beyond the last read as ones.
    pub(super) fn read(&mut self, register: u64) -> u8 {
        match register {
            offset::DATA if self.divisor_latched() => self.divisor as u8,
            offset::IER if self.divisor_latched() => (self.divisor >> 8) as u8,
            offset::DATA => self.rx.pop_front().map_or(0, |character| character.byte),
            offset::IER => self.ier,
            offset::IIR => self.identify(),
            offset::LCR => self.lcr,
            offset::MCR => self.mcr,
            offset::LSR => self.read_line_status(),
            offset::MSR => self.modem_lines() | std::mem::take(&mut self.modem_deltas),
            offset::SCR => self.scr,
            _ => 0xff,
        }
    }

    /// Writes a register. What is to be transmitted waits for [`Self::transmit`].
    pub(super) fn write(&mut self, register: u64, value: u8) {
        match register {
            offset::DATA if self.divisor_latched() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            offset::IER if self.divisor_latched() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            offset::DATA => self.write_data(value),
            offset::IER => self.write_interrupt_enable(value & ier::ALL),
            offset::FCR => self.write_fifo_control(value),
            offset::LCR => self.write_line_control(value),
            offset::MCR => self.write_modem_control(value & mcr::ALL),
            offset::SCR => self.scr = value,
            // LSR and MSR are for reading; writing them is for factory tests.
            _ => {}
        }
    }

    /// Hands waiting bytes to `send`, which tells how many it took.
    pub(super) fn transmit(&mut self, send: impl FnOnce(&[u8]) -> usize) {
        if self.tx.is_empty() {
            return;
        }
        let sent = send(self.tx.make_contiguous()).min(self.tx.len());
        self.tx.drain(..sent);
        self.thr_empty_pending |= self.tx.is_empty();
    }

    /// Takes bytes from the line, as far as there is room for them; returns how many.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> usize {
        // In loopback mode the receiver is disconnected from the line.
        let room = if self.loopback() { 0 } else { self.capacity() - self.rx.len().min(self.capacity()) };
        let taken = room.min(bytes.len());
        self.rx.extend(bytes.iter().take(taken).map(|&byte| Character { byte, errors: 0 }));
        taken
    }

    /// Whether enough has been read that the line should deliver more.
    pub(super) fn wants_input(&self) -> bool {
        !self.loopback() && self.rx.len() <= self.capacity() / 2
    }

    /// Whether the interrupt output is active.
    pub(super) fn interrupt(&self) -> bool {
        self.source() != iir::NONE
    }

    fn divisor_latched(&self) -> bool {
        self.lcr & lcr::DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & mcr::LOOPBACK != 0
    }

    fn fifos_enabled(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    /// Bytes that receiver and transmitter each hold.
    fn capacity(&self) -> usize {
        if self.fifos_enabled() { FIFO_BYTES } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        match (self.fifos_enabled(), self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    /// The pending interrupt of the highest priority (data sheet, table IV).
    fn source(&self) -> u8 {
        let enabled = |bit: u8| self.ier & bit != 0;
        if enabled(ier::LINE_STATUS) && self.line_status() & lsr::ERRORS != 0 {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED) && self.rx.len() >= self.trigger_level() {
            iir::RECEIVED
        } else if enabled(ier::RECEIVED) && !self.rx.is_empty() {
            iir::TIMEOUT
        } else if enabled(ier::THR_EMPTY) && self.thr_empty_pending {
            iir::THR_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.modem_deltas != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// Reading IIR acknowledges the THR-empty interrupt, if it is the one reported.
    fn identify(&mut self) -> u8 {
        let source = self.source();
        if source == iir::THR_EMPTY {
            self.thr_empty_pending = false;
        }
        if self.fifos_enabled() { source | iir::FIFO_ENABLED } else { source }
    }

    fn line_status(&self) -> u8 {
        let mut status = if self.overrun { lsr::OVERRUN } else { 0 };
        if let Some(first) = self.rx.front() {
            status |= lsr::DATA_READY | first.errors & lsr::CHARACTER_ERRORS;
        }
        if self.tx.is_empty() {
            status |= lsr::THR_EMPTY | lsr::TRANSMITTER_EMPTY;
        }
        if self.fifos_enabled() && self.rx.iter().any(|character| character.errors != 0) {
            status |= lsr::FIFO_ERROR;
        }
        status
    }

    fn read_line_status(&mut self) -> u8 {
        let status = self.line_status();
        self.overrun = false;
        if let Some(first) = self.rx.front_mut() {
            first.errors = 0;
        }
        status
    }

    fn write_data(&mut self, byte: u8) {
        self.thr_empty_pending = false;
        if self.loopback() {
            self.loop_back(Character { byte, errors: 0 });
            self.thr_empty_pending = self.tx.is_empty();
        } else if self.tx.len() < self.capacity() {
            self.tx.push_back(byte);
        }
        // A full transmitter loses the byte: the guest did not look at the line status.
    }

    /// The transmitter's output arrives at the receiver. Its own overrun: a FIFO keeps what it has, the single buffer
    /// is overwritten.
    fn loop_back(&mut self, character: Character) {
        if self.rx.len() >= self.capacity() {
            self.overrun = true;
            if self.fifos_enabled() {
                return;
            }
            self.rx.clear();
        }
        self.rx.push_back(character);
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        // Enabling the interrupt while the transmitter is empty raises it: drivers start their output this way.
        if value & !self.ier & ier::THR_EMPTY != 0 && self.tx.is_empty() {
            self.thr_empty_pending = true;
        }
        self.ier = value;
    }

    fn write_fifo_control(&mut self, value: u8) {
        let enable = value & fcr::ENABLE;
        let switched = enable != self.fcr & fcr::ENABLE;
        // The other bits are only taken while the FIFOs are enabled.
        if switched || (enable != 0 && value & fcr::RESET_RX != 0) {
            self.rx.clear();
        }
        if (switched || (enable != 0 && value & fcr::RESET_TX != 0)) && !self.tx.is_empty() {
            self.tx.clear();
            self.thr_empty_pending = true;
        }
        self.fcr = if enable != 0 { value & (fcr::ENABLE | fcr::DMA_MODE | fcr::TRIGGER) } else { 0 };
    }

    fn write_line_control(&mut self, value: u8) {
        let began = value & !self.lcr & lcr::BREAK != 0;
        self.lcr = value;
        if began && self.loopback() {
            self.loop_back(Character { byte: 0, errors: lsr::BREAK | lsr::FRAMING });
        }
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value;
        let now = self.modem_lines();
        let changed = before ^ now;
        for (line, delta) in [(msr::CTS, msr::DELTA_CTS), (msr::DSR, msr::DELTA_DSR), (msr::DCD, msr::DELTA_DCD)] {
            if changed & line != 0 {
                self.modem_deltas |= delta;
            }
        }
        if changed & before & msr::RI != 0 {
            self.modem_deltas |= msr::TERI;
        }
    }

    /// The modem's lines: always there and ready, so that nobody waits for a carrier; in loopback mode our own.
    fn modem_lines(&self) -> u8 {
        if !self.loopback() {
            return msr::CTS | msr::DSR | msr::DCD;
        }
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
    }
}
