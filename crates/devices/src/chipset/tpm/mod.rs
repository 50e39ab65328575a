//! A TPM 2.0 with a command response buffer (TCG PC Client Platform TPM Profile 1.05, section 6.5), and the memory of its
//! physical presence interface.
//!
//! The guest puts a command into the buffer and starts it; a thread has the host's TPM execute it meanwhile. There is no
//! interrupt: guests look whether the start bit is still set.

mod chip;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use backend::tpm::Tpm;
use platform::{AccessSize, BusDevice};

use chip::Chip;

/// Where the registers are.
pub const BASE: u64 = 0xfed4_0000;
/// Bytes of registers: locality 0.
pub const SIZE: u64 = 0x1000;
/// Where the physical presence interface is.
pub const PRESENCE_BASE: u64 = 0xfed4_5000;
/// Bytes of the physical presence interface.
pub const PRESENCE_SIZE: u64 = 0x400;

/// The content of the fw_cfg file `etc/tpm/config`, by which firmware finds the physical presence interface: its address, the
/// TPM's version (2.0) and the interface's version (1.3).
pub fn firmware_config() -> [u8; 6] {
    let [a, b, c, d] = (PRESENCE_BASE as u32).to_le_bytes();
    [a, b, c, d, 2, 1]
}

struct Inner {
    chip: Chip,
    /// What the thread has to do.
    command: Option<Vec<u8>>,
    closed: bool,
}

struct Shared {
    inner: Mutex<Inner>,
    started: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A TPM on its addresses.
pub struct TpmCrb(Arc<Shared>);

impl TpmCrb {
    /// A TPM that has `tpm` execute its commands, on a thread that ends some time after the device is dropped.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(tpm: Box<dyn Tpm>) -> std::io::Result<Arc<Self>> {
        let inner = Mutex::new(Inner { chip: Chip::new(), command: None, closed: false });
        let shared = Arc::new(Shared { inner, started: Condvar::new() });
        let served = shared.clone();
        std::thread::Builder::new().name("tpm".into()).spawn(move || serve(&served, tpm))?;
        Ok(Arc::new(Self(shared)))
    }
}

/// Executes commands until the device is gone. A TPM that has failed gets no more commands: every one fails.
fn serve(device: &Shared, tpm: Box<dyn Tpm>) {
    let mut tpm = Some(tpm);
    while let Some(command) = next_command(device) {
        let response = tpm.as_mut().map(|tpm| tpm.execute(&command));
        if let Some(Err(error)) = &response {
            log::error!("the TPM does not answer ({error}): the guest gets errors from now on");
            tpm = None;
        }
        device.lock().chip.finish(response.and_then(Result::ok).as_deref());
    }
}

/// Waits for a command; there is none any more when the device is gone.
fn next_command(device: &Shared) -> Option<Vec<u8>> {
    let mut inner = device.lock();
    loop {
        if inner.closed {
            return None;
        }
        if let Some(command) = inner.command.take() {
            return Some(command);
        }
        inner = device.started.wait(inner).unwrap_or_else(PoisonError::into_inner);
    }
}

impl Drop for TpmCrb {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.started.notify_all();
    }
}

impl BusDevice for TpmCrb {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.0.lock().chip.read(offset as usize, size.bytes() as usize)
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut inner = self.0.lock();
        let bytes = value.to_le_bytes();
        if let Some(command) = inner.chip.write(offset as usize, &bytes[..size.bytes() as usize]) {
            inner.command = Some(command);
            self.0.started.notify_all();
        }
    }
}

/// The memory in which OS and firmware leave each other what somebody has to confirm in front of the machine.
pub struct Presence(Mutex<Box<[u8; PRESENCE_SIZE as usize]>>);

impl Presence {
    /// Memory that is all zero: nothing is asked for.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Box::new([0; PRESENCE_SIZE as usize]))))
    }

    fn lock(&self) -> MutexGuard<'_, Box<[u8; PRESENCE_SIZE as usize]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Presence {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let memory = self.lock();
        let bytes = memory.iter().skip(offset as usize).take(size.bytes() as usize);
        bytes.rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut memory = self.lock();
        let places = memory.iter_mut().skip(offset as usize).take(size.bytes() as usize);
        places.zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte);
    }
}

#[cfg(test)]
mod tests;
