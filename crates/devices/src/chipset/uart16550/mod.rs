//! 16550A UART: the serial ports com1 to com4, and the chip behind PCI serial ports.
//!
//! Neither direction blocks a vCPU. Output goes to the backend's queue; while that is full, bytes wait in the
//! transmitter and the guest sees it busy. Input stays with the host while the receiver is full. A port without a
//! backend swallows output.
//!
//! Modem status interrupts and loopback work as on the chip. OUT2 does not gate the interrupt: guests exist that never
//! set it.

mod chip;
mod regs;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use backend::tty::{SerialBackend, SerialDevice};
use platform::{AccessSize, BusDevice, IrqLine, Persist, StateError, state};

use self::chip::Chip;
use super::bytes;

/// Number of ports (or bytes of an I/O BAR) that a UART takes.
pub const LENGTH: u64 = 8;

const KIND: &str = "uart16550";
const VERSION: u32 = 1;

struct Inner {
    chip: Chip,
    /// The level last given to the line.
    asserted: bool,
    /// Input waits at the backend for room.
    input_waits: bool,
}

/// A UART on a bus.
pub struct Uart16550 {
    inner: Mutex<Inner>,
    irq: IrqLine,
    backend: Option<Arc<dyn SerialBackend>>,
}

impl Uart16550 {
    /// A UART after reset. Attached to `backend`, input flows from now on.
    pub fn new(irq: IrqLine, backend: Option<Arc<dyn SerialBackend>>) -> Arc<Self> {
        let inner = Inner { chip: Chip::new(), asserted: false, input_waits: false };
        let uart = Arc::new(Self { inner: Mutex::new(inner), irq, backend });
        if let Some(backend) = &uart.backend {
            let device: Arc<dyn SerialDevice> = uart.clone();
            let device: Weak<dyn SerialDevice> = Arc::downgrade(&device);
            backend.attach(device);
        }
        uart
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the line what the chip's state says.
    fn sync(&self, inner: &mut Inner) {
        let asserted = inner.chip.interrupt();
        if asserted != inner.asserted {
            inner.asserted = asserted;
            self.irq.set(asserted);
        }
    }

    /// Moves what can move after a change: output to the backend, and a wish for input.
    fn settle(&self, inner: &mut Inner) {
        // First what the access did, then what comes of transmitting: a guest that writes byte after byte gets an edge
        // for each that has left.
        self.sync(inner);
        inner.chip.transmit(|bytes| self.backend.as_ref().map_or(bytes.len(), |backend| backend.send(bytes)));
        self.sync(inner);
        if inner.input_waits && inner.chip.wants_input() {
            inner.input_waits = false;
            if let Some(backend) = &self.backend {
                backend.resume_input();
            }
        }
    }
}

impl BusDevice for Uart16550 {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        bytes::read(offset, size, |register| {
            let mut inner = self.lock();
            let value = inner.chip.read(register);
            self.settle(&mut inner);
            value
        })
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        bytes::write(offset, size, value, |register, byte| {
            let mut inner = self.lock();
            inner.chip.write(register, byte);
            self.settle(&mut inner);
        });
    }
}

impl SerialDevice for Uart16550 {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let taken = inner.chip.receive(bytes);
        inner.input_waits = taken < bytes.len();
        self.sync(&mut inner);
        taken
    }

    fn output_ready(&self) {
        self.settle(&mut self.lock());
    }
}

impl Persist for Uart16550 {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &self.lock().chip)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let chip: Chip = state::decode(KIND, VERSION, version, bytes)?;
        chip.check().map_err(|why| StateError::Invalid { kind: KIND, why })?;
        let mut inner = self.lock();
        inner.asserted = chip.interrupt();
        inner.chip = chip;
        // Whether input waits is this process's business, and unknown.
        inner.input_waits = true;
        // Output that waited for the former host goes to the new one now. Only this can make an edge, a true one:
        // interrupt chips are to be restored before.
        self.settle(&mut inner);
        Ok(())
    }

    fn reset(&self) {
        let mut inner = self.lock();
        inner.chip = Chip::new();
        inner.input_waits = true;
        self.settle(&mut inner);
    }
}
