//! Registers of the 16550A (National Semiconductor PC16550D data sheet, section 8).

/// Register offsets. With LCR bit 7 (DLAB) set, 0 and 1 are the divisor latch.
pub(super) mod offset {
    /// Receive buffer (read), transmit holding (write).
    pub(crate) const DATA: u64 = 0;
    pub(crate) const IER: u64 = 1;
    /// Interrupt identification (read).
    pub(crate) const IIR: u64 = 2;
    /// FIFO control (write).
    pub(crate) const FCR: u64 = 2;
    pub(crate) const LCR: u64 = 3;
    pub(crate) const MCR: u64 = 4;
    pub(crate) const LSR: u64 = 5;
    pub(crate) const MSR: u64 = 6;
    pub(crate) const SCR: u64 = 7;
}

/// Interrupt enable.
pub(super) mod ier {
    pub(crate) const RECEIVED: u8 = 1 << 0;
    pub(crate) const THR_EMPTY: u8 = 1 << 1;
    pub(crate) const LINE_STATUS: u8 = 1 << 2;
    pub(crate) const MODEM_STATUS: u8 = 1 << 3;
    pub(crate) const ALL: u8 = 0x0f;
}

/// Interrupt identification, by falling priority.
pub(super) mod iir {
    pub(crate) const LINE_STATUS: u8 = 0x06;
    pub(crate) const RECEIVED: u8 = 0x04;
    /// Data waits in the FIFO below the trigger level.
    pub(crate) const TIMEOUT: u8 = 0x0c;
    pub(crate) const THR_EMPTY: u8 = 0x02;
    pub(crate) const MODEM_STATUS: u8 = 0x00;
    pub(crate) const NONE: u8 = 0x01;
    pub(crate) const FIFO_ENABLED: u8 = 0xc0;
}

/// FIFO control.
pub(super) mod fcr {
    pub(crate) const ENABLE: u8 = 1 << 0;
    pub(crate) const RESET_RX: u8 = 1 << 1;
    pub(crate) const RESET_TX: u8 = 1 << 2;
    pub(crate) const DMA_MODE: u8 = 1 << 3;
    pub(crate) const TRIGGER: u8 = 0xc0;
}

/// Line control.
pub(super) mod lcr {
    pub(crate) const BREAK: u8 = 1 << 6;
    pub(crate) const DLAB: u8 = 1 << 7;
}

/// Modem control.
pub(super) mod mcr {
    pub(crate) const DTR: u8 = 1 << 0;
    pub(crate) const RTS: u8 = 1 << 1;
    pub(crate) const OUT1: u8 = 1 << 2;
    pub(crate) const OUT2: u8 = 1 << 3;
    pub(crate) const LOOPBACK: u8 = 1 << 4;
    pub(crate) const ALL: u8 = 0x1f;
}

/// Line status.
pub(super) mod lsr {
    pub(crate) const DATA_READY: u8 = 1 << 0;
    pub(crate) const OVERRUN: u8 = 1 << 1;
    pub(crate) const PARITY: u8 = 1 << 2;
    pub(crate) const FRAMING: u8 = 1 << 3;
    pub(crate) const BREAK: u8 = 1 << 4;
    pub(crate) const THR_EMPTY: u8 = 1 << 5;
    pub(crate) const TRANSMITTER_EMPTY: u8 = 1 << 6;
    pub(crate) const FIFO_ERROR: u8 = 1 << 7;
    /// Errors that belong to one character.
    pub(crate) const CHARACTER_ERRORS: u8 = PARITY | FRAMING | BREAK;
    /// What raises the line status interrupt.
    pub(crate) const ERRORS: u8 = OVERRUN | CHARACTER_ERRORS;
}

/// Modem status: changes below, lines above.
pub(super) mod msr {
    pub(crate) const DELTA_CTS: u8 = 1 << 0;
    pub(crate) const DELTA_DSR: u8 = 1 << 1;
    /// Trailing edge of RI.
    pub(crate) const TERI: u8 = 1 << 2;
    pub(crate) const DELTA_DCD: u8 = 1 << 3;
    pub(crate) const DELTAS: u8 = 0x0f;
    pub(crate) const CTS: u8 = 1 << 4;
    pub(crate) const DSR: u8 = 1 << 5;
    pub(crate) const RI: u8 = 1 << 6;
    pub(crate) const DCD: u8 = 1 << 7;
}

/// Bytes in each FIFO.
pub(super) const FIFO_BYTES: usize = 16;
/// Divisor for 9600 baud (of 1.8432 MHz / 16), as the guest finds it.
pub(super) const DEFAULT_DIVISOR: u16 = 12;
