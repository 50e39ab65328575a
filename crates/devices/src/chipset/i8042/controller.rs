//! The 8042 as a register machine: between the guest and what is plugged in, without lock, lines or power.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::keyboard::Keyboard;
use super::mouse::Mouse;
use super::regs::*;
use super::scancode::Translator;

/// Replies of the controller that wait at most: a guest that never reads gets no more.
const REPLIES: usize = 16;

/// A byte for the guest.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Output {
    byte: u8,
    from_aux: bool,
}

/// All state of controller, keyboard and mouse; also the archived state, version 1.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Controller {
    /// Byte 0 is the mode.
    ram: [u8; 32],
    /// The output buffer.
    output: Option<Output>,
    /// Of the controller itself; they go before anything else.
    replies: VecDeque<Output>,
    /// The command whose parameter comes next.
    command: Option<u8>,
    /// The last write was a command.
    wrote_command: bool,
    translator: Translator,
    pub(super) keyboard: Keyboard,
    pub(super) mouse: Mouse,
}

impl Controller {
    pub(super) fn new() -> Self {
        let mut ram = [0; 32];
        ram[0] = mode::DEFAULT;
        Self {
            ram,
            output: None,
            replies: VecDeque::new(),
            command: None,
            wrote_command: false,
            translator: Translator::default(),
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.replies.len() > REPLIES {
            return Err(format!("{} replies of the controller", self.replies.len()));
        }
        self.keyboard.check()?;
        self.mouse.check()
    }

    /// Whether IRQ 1 is asserted.
    pub(super) fn keyboard_interrupt(&self) -> bool {
        self.mode(mode::KEYBOARD_INTERRUPT) && self.output.is_some_and(|output| !output.from_aux)
    }

    /// Whether IRQ 12 is asserted.
    pub(super) fn aux_interrupt(&self) -> bool {
        self.mode(mode::AUX_INTERRUPT) && self.output.is_some_and(|output| output.from_aux)
    }

    /// Reads port 64.
    pub(super) fn status(&self) -> u8 {
        let mut status = status::UNLOCKED;
        if let Some(output) = self.output {
            status |= status::OUTPUT_FULL | if output.from_aux { status::FROM_AUX } else { 0 };
        }
        if self.mode(mode::SYSTEM) {
            status |= status::SYSTEM;
        }
        if self.wrote_command {
            status |= status::COMMAND;
        }
        status
    }

    /// Reads port 60: empties the output buffer. What comes next is fetched by [`Self::fetch`].
    pub(super) fn take(&mut self) -> u8 {
        self.output.take().map_or(0, |output| output.byte)
    }

    /// Fills an empty output buffer, if there is anything.
    pub(super) fn fetch(&mut self) {
        while self.output.is_none() {
            if let Some(reply) = self.replies.pop_front() {
                self.output = Some(reply);
            } else if let Some(byte) = self.next_key_byte() {
                let translated = if self.mode(mode::TRANSLATE) { self.translator.translate(byte) } else { Some(byte) };
                self.output = translated.map(|byte| Output { byte, from_aux: false });
            } else if let Some(byte) = self.next_mouse_byte() {
                self.output = Some(Output { byte, from_aux: true });
            } else {
                return;
            }
        }
    }

    /// Writes port 64. Returns whether the machine is reset by it.
    pub(super) fn write_command(&mut self, command: u8) -> bool {
        self.wrote_command = true;
        self.command = None;
        match command {
            command::READ_RAM..=0x3f => self.reply(self.ram[usize::from(command & 0x1f)]),
            command::WRITE_RAM..=0x7f
            | command::WRITE_OUTPUT_PORT
            | command::WRITE_KEYBOARD_BUFFER
            | command::WRITE_AUX_BUFFER
            | command::WRITE_AUX => self.command = Some(command),
            command::TEST_PASSWORD => self.reply(NO_PASSWORD),
            command::DISABLE_AUX => self.ram[0] |= mode::AUX_DISABLED,
            command::ENABLE_AUX => self.ram[0] &= !mode::AUX_DISABLED,
            command::TEST_AUX | command::TEST_KEYBOARD => self.reply(PORT_PASSED),
            command::TEST_CONTROLLER => {
                self.ram[0] |= mode::SYSTEM;
                self.reply(TEST_PASSED);
            }
            command::DISABLE_KEYBOARD => self.ram[0] |= mode::KEYBOARD_DISABLED,
            command::ENABLE_KEYBOARD => self.ram[0] &= !mode::KEYBOARD_DISABLED,
            command::READ_INPUT_PORT => self.reply(INPUT_PORT),
            command::READ_OUTPUT_PORT => self.reply(self.output_port()),
            command::PULSE..=0xff => return command & output_port::NO_RESET == 0,
            _ => {}
        }
        false
    }

    /// Writes port 60. Returns whether the machine is reset by it.
    pub(super) fn write_data(&mut self, byte: u8) -> bool {
        self.wrote_command = false;
        match self.command.take() {
            // Talking to a device turns its port on.
            None => {
                self.ram[0] &= !mode::KEYBOARD_DISABLED;
                self.keyboard.write(byte);
            }
            Some(command::WRITE_AUX) => {
                self.ram[0] &= !mode::AUX_DISABLED;
                self.mouse.write(byte);
            }
            Some(command::WRITE_KEYBOARD_BUFFER) => self.reply(byte),
            Some(command::WRITE_AUX_BUFFER) => self.push_reply(Output { byte, from_aux: true }),
            Some(command::WRITE_OUTPUT_PORT) => return byte & output_port::NO_RESET == 0,
            Some(ram) => self.ram[usize::from(ram & 0x1f)] = byte,
        }
        false
    }

    fn mode(&self, bit: u8) -> bool {
        self.ram[0] & bit != 0
    }

    fn next_key_byte(&mut self) -> Option<u8> {
        if self.mode(mode::KEYBOARD_DISABLED) { None } else { self.keyboard.take() }
    }

    fn next_mouse_byte(&mut self) -> Option<u8> {
        if self.mode(mode::AUX_DISABLED) { None } else { self.mouse.take() }
    }

    fn reply(&mut self, byte: u8) {
        self.push_reply(Output { byte, from_aux: false });
    }

    fn push_reply(&mut self, reply: Output) {
        if self.replies.len() < REPLIES {
            self.replies.push_back(reply);
        }
    }

    /// A20 is always on.
    fn output_port(&self) -> u8 {
        let full = match self.output {
            None => 0,
            Some(output) if output.from_aux => output_port::AUX_FULL,
            Some(_) => output_port::KEYBOARD_FULL,
        };
        output_port::NO_RESET | output_port::A20 | full
    }
}
