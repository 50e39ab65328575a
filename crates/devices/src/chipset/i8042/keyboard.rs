//! The PS/2 keyboard behind the controller: a 101-key keyboard that speaks scan code sets 1 and 2.
//!
//! Keys repeat as the host sends them; the guest's wish for another rate is heard and has no effect.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::regs::{FIFO_BYTES, ps2};
use super::scancode::Translator;

const SET_LEDS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCAN_CODE_SET: u8 = 0xf0;
/// First and last of the commands on how keys repeat in set 3.
const SET_3_ALL: [u8; 4] = [0xf7, 0xf8, 0xf9, 0xfa];
const IDENTITY: [u8; 2] = [0xab, 0x83];

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Keyboard {
    /// Bytes on their way to the controller.
    fifo: VecDeque<u8>,
    /// Keys are reported.
    scanning: bool,
    /// Scan code set: 1 or 2.
    set: u8,
    leds: u8,
    /// The command whose parameter comes next.
    command: Option<u8>,
    last_sent: u8,
}

impl Keyboard {
    pub(super) fn new() -> Self {
        Self { fifo: VecDeque::new(), scanning: true, set: 2, leds: 0, command: None, last_sent: 0 }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.fifo.len() > 2 * FIFO_BYTES {
            return Err(format!("{} bytes in the keyboard", self.fifo.len()));
        }
        if matches!(self.set, 1 | 2) { Ok(()) } else { Err(format!("scan code set {}", self.set)) }
    }

    /// LEDs: bit 0 scroll lock, bit 1 num lock, bit 2 caps lock.
    pub(super) fn leds(&self) -> u8 {
        self.leds
    }

    /// The next byte for the controller.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.fifo.pop_front()?;
        self.last_sent = byte;
        Some(byte)
    }

    /// Reports keys, given in set 2; all of it or, where nobody listens or there is no room, nothing.
    pub(super) fn keys(&mut self, codes: &[u8]) -> bool {
        if !self.scanning || self.fifo.len() + codes.len() > FIFO_BYTES {
            return false;
        }
        if self.set == 1 {
            let mut translator = Translator::default();
            self.fifo.extend(codes.iter().filter_map(|&code| translator.translate(code)));
        } else {
            self.fifo.extend(codes);
        }
        true
    }

    /// A byte from the guest.
    pub(super) fn write(&mut self, byte: u8) {
        match self.command.take() {
            Some(command) => self.parameter(command, byte),
            None => self.command(byte),
        }
    }

    /// Replies have room of their own behind keys; a guest that never reads them gets no more.
    fn reply(&mut self, bytes: &[u8]) {
        if self.fifo.len() + bytes.len() <= 2 * FIFO_BYTES {
            self.fifo.extend(bytes);
        }
    }

    fn command(&mut self, command: u8) {
        match command {
            // bhyve's keyboard acknowledges this one, too.
            0x00 => self.reply(&[ps2::ACK]),
            SET_LEDS | SCAN_CODE_SET | ps2::SET_RATE => {
                self.command = Some(command);
                self.reply(&[ps2::ACK]);
            }
            ECHO => self.reply(&[ECHO]),
            ps2::IDENTIFY => self.reply(&[ps2::ACK, IDENTITY[0], IDENTITY[1]]),
            ps2::ENABLE => self.restart(true),
            ps2::DISABLE => self.restart(false),
            ps2::DEFAULTS => {
                self.set = 2;
                self.restart(true);
            }
            ps2::SEND_AGAIN => self.reply(&[self.last_sent]),
            ps2::RESET => {
                *self = Self::new();
                self.reply(&[ps2::ACK, ps2::PASSED]);
            }
            all if SET_3_ALL.contains(&all) => self.reply(&[ps2::ACK]),
            _ => self.reply(&[ps2::RESEND]),
        }
    }

    fn restart(&mut self, scanning: bool) {
        self.fifo.clear();
        self.scanning = scanning;
        self.reply(&[ps2::ACK]);
    }

    fn parameter(&mut self, command: u8, value: u8) {
        self.reply(&[ps2::ACK]);
        match (command, value) {
            (SET_LEDS, leds) => self.leds = leds & 7,
            (SCAN_CODE_SET, 0) => self.reply(&[self.set]),
            // There is no set 3: whoever asks which one it is now finds out.
            (SCAN_CODE_SET, set @ (1 | 2)) => self.set = set,
            _ => {}
        }
    }
}
