//! The PS/2 mouse behind the controller: three buttons, no wheel.
//!
//! Movement adds up until there is room for a packet, so nothing of a far jump is lost. Resolution, rate and scaling
//! are remembered, told, and have no effect: movement comes from the host in pixels.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::regs::{FIFO_BYTES, ps2};

const SCALING_1_1: u8 = 0xe6;
const SCALING_2_1: u8 = 0xe7;
const SET_RESOLUTION: u8 = 0xe8;
const STATUS: u8 = 0xe9;
const STREAM: u8 = 0xea;
const READ_DATA: u8 = 0xeb;
const END_WRAP: u8 = 0xec;
const WRAP: u8 = 0xee;
const REMOTE: u8 = 0xf0;
const IDENTITY: u8 = 0x00;

/// Largest movement in a packet.
const STEP: i32 = 255;
/// Movement that adds up at most, in each direction.
const FAR: i32 = 1 << 15;

/// Which buttons are down.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MouseButtons {
    /// The left one.
    pub left: bool,
    /// The middle one.
    pub middle: bool,
    /// The right one.
    pub right: bool,
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Mouse {
    /// Bytes on their way to the controller.
    fifo: VecDeque<u8>,
    /// Movement is reported as it happens, in stream mode.
    reporting: bool,
    remote: bool,
    wrap: bool,
    scaling_2_1: bool,
    resolution: u8,
    rate: u8,
    /// The command whose parameter comes next.
    command: Option<u8>,
    last_sent: u8,
    buttons: MouseButtons,
    /// Buttons in the last packet.
    reported: MouseButtons,
    /// Movement not yet reported, to the right.
    right: i32,
    /// Movement not yet reported, up.
    up: i32,
}

impl Mouse {
    pub(super) fn new() -> Self {
        Self {
            fifo: VecDeque::new(),
            reporting: false,
            remote: false,
            wrap: false,
            scaling_2_1: false,
            resolution: 2,
            rate: 100,
            command: None,
            last_sent: 0,
            buttons: MouseButtons::default(),
            reported: MouseButtons::default(),
            right: 0,
            up: 0,
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.fifo.len() > 2 * FIFO_BYTES {
            return Err(format!("{} bytes in the mouse", self.fifo.len()));
        }
        if self.right.unsigned_abs().max(self.up.unsigned_abs()) > FAR.unsigned_abs() {
            return Err(format!("movement of {}, {}", self.right, self.up));
        }
        Ok(())
    }

    /// Whether the guest listens to movement.
    pub(super) fn reporting(&self) -> bool {
        self.reporting
    }

    /// The next byte for the controller.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.fifo.pop_front()?;
        self.last_sent = byte;
        self.report();
        Some(byte)
    }

    /// Something happened to the mouse.
    pub(super) fn moved(&mut self, right: i32, up: i32, buttons: MouseButtons) {
        self.buttons = buttons;
        self.right = self.right.saturating_add(right).clamp(-FAR, FAR);
        self.up = self.up.saturating_add(up).clamp(-FAR, FAR);
        self.report();
    }

    /// Sends a packet if there is news, room, and somebody to listen.
    fn report(&mut self) {
        if !self.reporting && !self.remote {
            (self.right, self.up) = (0, 0);
        }
        let news = self.right != 0 || self.up != 0 || self.buttons != self.reported;
        if self.reporting && !self.remote && news && self.fifo.len() + 3 <= FIFO_BYTES {
            let packet = self.packet();
            self.fifo.extend(packet);
        }
    }

    fn packet(&mut self) -> [u8; 3] {
        let (right, up) = (self.right.clamp(-STEP, STEP), self.up.clamp(-STEP, STEP));
        self.right -= right;
        self.up -= up;
        self.reported = self.buttons;
        let MouseButtons { left: l, middle: m, right: r } = self.buttons;
        let signs = u8::from(right < 0) << 4 | u8::from(up < 0) << 5;
        [signs | 1 << 3 | u8::from(m) << 2 | u8::from(r) << 1 | u8::from(l), right as u8, up as u8]
    }

    /// A byte from the guest.
    pub(super) fn write(&mut self, byte: u8) {
        if self.wrap && !matches!(byte, ps2::RESET | END_WRAP) {
            self.reply(&[byte]);
            return;
        }
        match self.command.take() {
            Some(command) => {
                match command {
                    ps2::SET_RATE => self.rate = byte,
                    _ => self.resolution = byte & 3,
                }
                self.reply(&[ps2::ACK]);
            }
            None => {
                // A command ends what was being said.
                self.fifo.clear();
                self.command(byte);
            }
        }
    }

    fn reply(&mut self, bytes: &[u8]) {
        if self.fifo.len() + bytes.len() <= 2 * FIFO_BYTES {
            self.fifo.extend(bytes);
        }
    }

    fn command(&mut self, command: u8) {
        if command == ps2::SEND_AGAIN {
            return self.reply(&[self.last_sent]);
        }
        self.reply(&[ps2::ACK]);
        match command {
            ps2::RESET => {
                *self = Self { buttons: self.buttons, ..Self::new() };
                self.reply(&[ps2::ACK, ps2::PASSED, IDENTITY]);
            }
            ps2::DEFAULTS => {
                let defaults = Self::new();
                (self.resolution, self.rate, self.scaling_2_1) = (defaults.resolution, defaults.rate, false);
                (self.remote, self.reporting) = (false, false);
            }
            ps2::ENABLE => {
                self.reporting = true;
                (self.right, self.up, self.reported) = (0, 0, self.buttons);
            }
            ps2::DISABLE => self.reporting = false,
            ps2::IDENTIFY => self.reply(&[IDENTITY]),
            ps2::SET_RATE | SET_RESOLUTION => self.command = Some(command),
            STREAM => self.remote = false,
            REMOTE => self.remote = true,
            WRAP => self.wrap = true,
            END_WRAP => self.wrap = false,
            READ_DATA => {
                let packet = self.packet();
                self.reply(&packet);
            }
            STATUS => {
                let status = self.status();
                self.reply(&status);
            }
            SCALING_1_1 => self.scaling_2_1 = false,
            SCALING_2_1 => self.scaling_2_1 = true,
            _ => {
                self.fifo.clear();
                self.reply(&[ps2::RESEND]);
            }
        }
    }

    fn status(&self) -> [u8; 3] {
        let MouseButtons { left, middle, right } = self.buttons;
        let modes = u8::from(self.remote) << 6 | u8::from(self.reporting) << 5 | u8::from(self.scaling_2_1) << 4;
        let buttons = u8::from(left) << 2 | u8::from(middle) << 1 | u8::from(right);
        [modes | buttons, self.resolution, self.rate]
    }
}
