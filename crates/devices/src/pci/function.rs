//! A PCI function: the shared endpoint and the device behind it.

use std::sync::{Arc, Weak};

use config::pci::PciAddress;
use platform::state::{decode, encode};
use platform::{AccessSize, BusDevice, Persist, StateError};
use serde::{Deserialize, Serialize};

use super::endpoint::{EndpointState, PciEndpoint};
use super::regs;

/// What a device does behind its PCI function. Accesses arrive on vCPU threads, several at a time; see
/// [`BusDevice`] for what they must not do.
///
/// [`Persist`] covers the device's own state; configuration space, BARs and the MSI-X table are saved, restored and
/// reset around it. `restore` is called on a device that has just been reset.
pub trait PciDevice: Persist {
    /// Reads a BAR. Accesses are inside the BAR, but of any alignment.
    fn bar_read(&self, bar: usize, offset: u64, size: AccessSize) -> u64;

    /// Writes a BAR. Accesses are inside the BAR, but of any alignment.
    fn bar_write(&self, bar: usize, offset: u64, size: AccessSize, value: u64);

    /// Answers a read of configuration space itself, where the device has registers of its own; aligned.
    fn config_read(&self, offset: u16, size: AccessSize) -> Option<u32> {
        let _ = (offset, size);
        None
    }

    /// Takes a write to configuration space itself; `false` leaves it to the shared part.
    fn config_write(&self, offset: u16, size: AccessSize, value: u32) -> bool {
        let _ = (offset, size, value);
        false
    }

    /// Goes on with work that a restored state implies. Called when guest memory and all devices are restored.
    fn resume(&self) {}
}

/// A PCI function on its bus.
pub struct PciFunction {
    endpoint: Arc<PciEndpoint>,
    device: Arc<dyn PciDevice>,
}

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct FunctionState {
    endpoint: EndpointState,
    device_version: u32,
    device: Vec<u8>,
}

impl PciFunction {
    /// Joins a device to its endpoint.
    pub fn new(endpoint: Arc<PciEndpoint>, device: Arc<dyn PciDevice>) -> Arc<Self> {
        let function = Arc::new(Self { endpoint, device });
        function.endpoint.attach(Arc::downgrade(&function));
        function
    }

    /// Where it sits.
    pub fn address(&self) -> PciAddress {
        self.endpoint.address()
    }

    pub(crate) fn endpoint(&self) -> &PciEndpoint {
        &self.endpoint
    }

    /// Reads configuration space, 4096 bytes of it; unaligned accesses read ones.
    pub fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        if !aligned(offset, size) {
            return u32::MAX;
        }
        match usize::from(offset) {
            // No extended capabilities: a zero header ends their list.
            regs::CONFIG_SIZE => 0,
            at if at > regs::CONFIG_SIZE => u32::MAX,
            _ => self.device.config_read(offset, size).unwrap_or_else(|| self.endpoint.read_config(offset, size)),
        }
    }

    /// Writes configuration space; unaligned and extended accesses are ignored.
    pub fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        if aligned(offset, size)
            && usize::from(offset) < regs::CONFIG_SIZE
            && !self.device.config_write(offset, size, value)
        {
            self.endpoint.write_config(offset, size, value);
        }
    }

    /// See [`PciDevice::resume`].
    pub fn resume(&self) {
        self.device.resume();
    }

    fn bar_read(&self, bar: usize, offset: u64, size: AccessSize) -> u64 {
        match self.endpoint.read_msix(bar, offset, size) {
            Some(value) => value,
            None => self.device.bar_read(bar, offset, size),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, size: AccessSize, value: u64) {
        if !self.endpoint.write_msix(bar, offset, size, value) {
            self.device.bar_write(bar, offset, size, value);
        }
    }
}

fn aligned(offset: u16, size: AccessSize) -> bool {
    size != AccessSize::Qword && u64::from(offset).is_multiple_of(size.bytes())
}

impl Persist for PciFunction {
    fn kind(&self) -> &'static str {
        self.device.kind()
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        // The device first: it may wait for work that still changes the interrupt state.
        let device = self.device.save()?;
        let state = FunctionState { endpoint: self.endpoint.save(), device_version: self.device.version(), device };
        encode(self.kind(), &state)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: FunctionState = decode(self.kind(), VERSION, version, bytes)?;
        self.device.reset();
        self.endpoint.restore(state.endpoint).map_err(|why| StateError::Invalid { kind: self.kind(), why })?;
        self.device.restore(state.device_version, &state.device)
    }

    fn reset(&self) {
        self.device.reset();
        self.endpoint.reset();
    }
}

impl Drop for PciFunction {
    fn drop(&mut self) {
        self.endpoint.detach();
    }
}

/// One BAR of a function, as the bus sees it. Weak, because the bus must not keep a function alive.
pub(crate) struct BarWindow {
    function: Weak<PciFunction>,
    bar: usize,
}

impl BarWindow {
    pub(crate) fn new(function: Weak<PciFunction>, bar: usize) -> Self {
        Self { function, bar }
    }
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.function.upgrade().map_or(u64::MAX, |function| function.bar_read(self.bar, offset, size))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        if let Some(function) = self.function.upgrade() {
            function.bar_write(self.bar, offset, size, value);
        }
    }
}
