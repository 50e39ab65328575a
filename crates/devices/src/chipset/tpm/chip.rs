//! The registers, without thread or TPM.

use backend::tpm::{HEADER_SIZE, size_field};

/// Bytes of registers before the buffer.
const REGISTERS: usize = 0x80;
/// Bytes of the buffer of commands and responses.
pub(super) const BUFFER: usize = super::SIZE as usize - REGISTERS;

/// Registers of locality 0 (TCG PC Client Platform TPM Profile 1.05, section 6.5.3), by byte offset.
mod offset {
    pub(super) const LOCALITY_STATE: usize = 0x00;
    pub(super) const LOCALITY_CONTROL: usize = 0x08;
    pub(super) const LOCALITY_STATUS: usize = 0x0c;
    pub(super) const INTERFACE_ID: usize = 0x30;
    pub(super) const VENDOR_ID: usize = 0x34;
    pub(super) const REQUEST: usize = 0x40;
    pub(super) const STATUS: usize = 0x44;
    pub(super) const CANCEL: usize = 0x48;
    pub(super) const START: usize = 0x4c;
    pub(super) const COMMAND_SIZE: usize = 0x58;
    pub(super) const COMMAND_LOW: usize = 0x5c;
    pub(super) const RESPONSE_SIZE: usize = 0x64;
    pub(super) const RESPONSE_LOW: usize = 0x68;
}

const LOCALITY_ASSIGNED: u32 = 1 << 1;
const LOCALITY_VALID: u32 = 1 << 7;
const REQUEST_ACCESS: u32 = 1 << 0;
const RELINQUISH: u32 = 1 << 1;
const GRANTED: u32 = 1 << 0;
/// A CRB of version 1 for TPM 2.0, transfers of 64 bytes, CRB only and selected.
const INTERFACE: u32 = 1 | 1 << 4 | 3 << 11 | 1 << 14 | 1 << 17 | 1 << 19;
/// Who made it: Intel's PCI vendor id and a device id of nobody, as bhyve has.
const VENDOR: u32 = 0x8086 | 0x0001 << 16;
const COMMAND_READY: u32 = 1 << 0;
const GO_IDLE: u32 = 1 << 1;
const FATAL: u32 = 1 << 0;
const IDLE: u32 = 1 << 1;
const INVOKE: u32 = 1 << 0;

/// Response codes (TPM 2.0 Library, part 2, section 6.6).
const TPM_RC_FAILURE: u32 = 0x101;
const TPM_RC_COMMAND_SIZE: u32 = 0x142;

/// The command response buffer of one locality.
pub(super) struct Chip {
    assigned: bool,
    idle: bool,
    fatal: bool,
    cancel: bool,
    /// A command is being executed; the buffer is the TPM's.
    executing: bool,
    buffer: Box<[u8; BUFFER]>,
}

impl Chip {
    pub(super) fn new() -> Self {
        let buffer = Box::new([0; BUFFER]);
        Self { assigned: false, idle: true, fatal: false, cancel: false, executing: false, buffer }
    }

    fn register(&self, offset: usize) -> u32 {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let buffer = (super::BASE + REGISTERS as u64) as u32;
        match offset {
            offset::LOCALITY_STATE => LOCALITY_VALID | flag(self.assigned, LOCALITY_ASSIGNED),
            offset::LOCALITY_STATUS => flag(self.assigned, GRANTED),
            offset::INTERFACE_ID => INTERFACE,
            offset::VENDOR_ID => VENDOR,
            offset::STATUS => flag(self.fatal, FATAL) | flag(self.idle, IDLE),
            offset::CANCEL => u32::from(self.cancel),
            offset::START => flag(self.executing, INVOKE),
            offset::COMMAND_SIZE | offset::RESPONSE_SIZE => BUFFER as u32,
            offset::COMMAND_LOW | offset::RESPONSE_LOW => buffer,
            // Requests are done when they are written.
            _ => 0,
        }
    }

    fn byte(&self, offset: usize) -> u8 {
        match offset.checked_sub(REGISTERS) {
            Some(at) => self.buffer.get(at).copied().unwrap_or(0xff),
            None => self.register(offset & !3).to_le_bytes()[offset & 3],
        }
    }

    /// Reads up to 8 bytes; they may lie in several registers.
    pub(super) fn read(&self, offset: usize, size: usize) -> u64 {
        let bytes = (offset..offset.saturating_add(size)).rev();
        bytes.fold(0, |value, offset| value << 8 | u64::from(self.byte(offset)))
    }

    /// Writes up to 8 bytes. Returns the command, if they start one.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> Option<Vec<u8>> {
        if let Some(at) = offset.checked_sub(REGISTERS) {
            if let Some(place) = self.buffer.get_mut(at..at.saturating_add(bytes.len())).filter(|_| !self.executing) {
                place.copy_from_slice(bytes);
            }
            return None;
        }
        // All bits that do something are in the first byte of their register.
        bytes.iter().zip(offset..).filter(|(_, at)| at & 3 == 0).fold(None, |command, (byte, at)| {
            let value = u32::from(*byte);
            match at {
                offset::START if value & INVOKE != 0 => self.start().or(command),
                _ => {
                    self.set(at, value);
                    command
                }
            }
        })
    }

    fn set(&mut self, offset: usize, value: u32) {
        match offset {
            offset::LOCALITY_CONTROL if value & REQUEST_ACCESS != 0 => self.assigned = true,
            offset::LOCALITY_CONTROL if value & RELINQUISH != 0 => self.assigned = false,
            offset::REQUEST if self.executing => {}
            offset::REQUEST if value & COMMAND_READY != 0 => self.idle = false,
            offset::REQUEST if value & GO_IDLE != 0 => self.idle = true,
            offset::CANCEL => self.cancel = value & 1 != 0,
            _ => {}
        }
    }

    /// Takes the command out of the buffer, unless there is none that makes sense.
    fn start(&mut self) -> Option<Vec<u8>> {
        if self.executing || self.idle {
            return None;
        }
        let size = size_field(&self.buffer[..]);
        match self.buffer.get(..size).filter(|_| size >= HEADER_SIZE) {
            Some(command) => {
                self.executing = true;
                Some(command.to_vec())
            }
            None => {
                self.respond(&failure(TPM_RC_COMMAND_SIZE));
                None
            }
        }
    }

    /// Ends the execution of a command with what the TPM says, or nothing if it failed.
    pub(super) fn finish(&mut self, response: Option<&[u8]>) {
        match response.filter(|response| response.len() <= BUFFER) {
            Some(response) => self.respond(response),
            None => {
                self.fatal = true;
                self.respond(&failure(TPM_RC_FAILURE));
            }
        }
        self.executing = false;
    }

    fn respond(&mut self, response: &[u8]) {
        for (place, byte) in self.buffer.iter_mut().zip(response) {
            *place = *byte;
        }
    }
}

/// A response without anything but a response code.
fn failure(code: u32) -> [u8; HEADER_SIZE] {
    const NO_SESSIONS: [u8; 2] = [0x80, 0x01];
    let [a, b, c, d] = code.to_be_bytes();
    [NO_SESSIONS[0], NO_SESSIONS[1], 0, 0, 0, HEADER_SIZE as u8, a, b, c, d]
}
