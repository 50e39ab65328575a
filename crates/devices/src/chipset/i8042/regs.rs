//! Ports and commands of the 8042 as a PC's keyboard controller, and of what is plugged into it (IBM PS/2 hardware
//! interface technical reference: keyboard and auxiliary device controller, keyboards, mouse).

/// Status register.
pub(super) mod status {
    /// The output buffer holds a byte for the guest.
    pub(crate) const OUTPUT_FULL: u8 = 1 << 0;
    pub(crate) const SYSTEM: u8 = 1 << 2;
    /// The last write was a command.
    pub(crate) const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked.
    pub(crate) const UNLOCKED: u8 = 1 << 4;
    /// The output buffer's byte is from the mouse.
    pub(crate) const FROM_AUX: u8 = 1 << 5;
}

/// The controller's mode: byte 0 of its RAM.
pub(super) mod mode {
    pub(crate) const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub(crate) const AUX_INTERRUPT: u8 = 1 << 1;
    pub(crate) const SYSTEM: u8 = 1 << 2;
    pub(crate) const KEYBOARD_DISABLED: u8 = 1 << 4;
    pub(crate) const AUX_DISABLED: u8 = 1 << 5;
    /// Scan codes of set 2 are translated to set 1.
    pub(crate) const TRANSLATE: u8 = 1 << 6;
    /// As a BIOS leaves it.
    pub(crate) const DEFAULT: u8 = KEYBOARD_INTERRUPT | SYSTEM | AUX_DISABLED | TRANSLATE;
}

/// The controller's commands. 20–3F read its RAM, 60–7F write it.
pub(super) mod command {
    pub(crate) const READ_RAM: u8 = 0x20;
    pub(crate) const WRITE_RAM: u8 = 0x60;
    pub(crate) const TEST_PASSWORD: u8 = 0xa4;
    pub(crate) const DISABLE_AUX: u8 = 0xa7;
    pub(crate) const ENABLE_AUX: u8 = 0xa8;
    pub(crate) const TEST_AUX: u8 = 0xa9;
    pub(crate) const TEST_CONTROLLER: u8 = 0xaa;
    pub(crate) const TEST_KEYBOARD: u8 = 0xab;
    pub(crate) const DISABLE_KEYBOARD: u8 = 0xad;
    pub(crate) const ENABLE_KEYBOARD: u8 = 0xae;
    pub(crate) const READ_INPUT_PORT: u8 = 0xc0;
    pub(crate) const READ_OUTPUT_PORT: u8 = 0xd0;
    pub(crate) const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub(crate) const WRITE_KEYBOARD_BUFFER: u8 = 0xd2;
    pub(crate) const WRITE_AUX_BUFFER: u8 = 0xd3;
    pub(crate) const WRITE_AUX: u8 = 0xd4;
    /// F0–FF pulse those of the output port's low four lines whose bits are clear.
    pub(crate) const PULSE: u8 = 0xf0;
}

/// The output port.
pub(super) mod output_port {
    /// Low resets the machine.
    pub(crate) const NO_RESET: u8 = 1 << 0;
    pub(crate) const A20: u8 = 1 << 1;
    pub(crate) const KEYBOARD_FULL: u8 = 1 << 4;
    pub(crate) const AUX_FULL: u8 = 1 << 5;
}

/// The input port: the keyboard is not locked.
pub(super) const INPUT_PORT: u8 = 0x80;
/// The controller is well.
pub(super) const TEST_PASSED: u8 = 0x55;
/// No password is installed.
pub(super) const NO_PASSWORD: u8 = 0xf1;
/// A port is well.
pub(super) const PORT_PASSED: u8 = 0x00;

/// Commands that keyboard and mouse have in common, and what they answer.
pub(super) mod ps2 {
    pub(crate) const ACK: u8 = 0xfa;
    /// "I do not understand": asks for the command again.
    pub(crate) const RESEND: u8 = 0xfe;
    /// Self-test passed.
    pub(crate) const PASSED: u8 = 0xaa;
    pub(crate) const IDENTIFY: u8 = 0xf2;
    pub(crate) const SET_RATE: u8 = 0xf3;
    pub(crate) const ENABLE: u8 = 0xf4;
    pub(crate) const DISABLE: u8 = 0xf5;
    pub(crate) const DEFAULTS: u8 = 0xf6;
    pub(crate) const SEND_AGAIN: u8 = 0xfe;
    pub(crate) const RESET: u8 = 0xff;
}

/// Bytes that keyboard and mouse each buffer.
pub(super) const FIFO_BYTES: usize = 16;
