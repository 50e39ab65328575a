//! The PCI host: which functions exist, and the two ways of a guest to their configuration space.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use config::pci::PciAddress;
use memory::GuestMemory;
use platform::{AccessSize, Bus, BusDevice, BusError, MsiSink, Persist};

use super::chipset::Chipset;
use super::endpoint::{Attachment, PciEndpoint};
use super::function::PciFunction;
use super::intx::{IntxRouter, PinRoute};
use super::mapper::BarMapper;
use super::pciexbar::PciExBar;
use super::resources::{BusWindows, NoSpace, Resources};
use super::spec::FunctionSpec;

/// Memory-mapped configuration: 256 buses of 1 MiB.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Size of memory-mapped configuration.
pub const ECAM_SIZE: u64 = 256 << 20;
/// Configuration address port; the data port is 4 bytes further, the reset control in between.
pub const CONFIG_PORT: u16 = 0xcf8;
const CONFIG_PORTS: u64 = 8;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Bits of the configuration address that exist.
const SELECTABLE: u32 = 0x80ff_fffc;

/// Why the PCI host cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// Two functions at one address.
    #[error("pci slot {0} already occupied!")]
    Occupied(PciAddress),
    /// The BARs do not fit.
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
    /// The configuration ranges are taken.
    #[error("cannot put PCI configuration on the bus")]
    Bus(#[from] BusError),
}

/// What the host is made with.
pub struct PciHostOptions {
    /// The port bus.
    pub ports: Arc<Bus>,
    /// The memory bus.
    pub memory: Arc<Bus>,
    /// Where MSI and MSI-X messages go.
    pub msi: Arc<dyn MsiSink>,
    /// Where interrupt pins go.
    pub router: Arc<IntxRouter>,
    /// Port 0xCF9, which lies inside the configuration ports: byte accesses go here, at offset 0.
    pub reset_control: Arc<dyn BusDevice>,
    /// The guest's RAM, above which 64-bit BARs are placed.
    pub ram: GuestMemory,
    /// Whether BARs decode from the start: yes without firmware that places and enables them.
    pub enable_bars: bool,
}

/// The PCI host with its functions.
pub struct PciHost {
    attachment: Attachment,
    ports: Arc<Bus>,
    memory: Arc<Bus>,
    reset_control: Arc<dyn BusDevice>,
    ecam: Arc<Ecam>,
    high_memory_end: u64,
    enable_bars: bool,
    functions: RwLock<BTreeMap<PciAddress, Arc<PciFunction>>>,
    windows: OnceLock<Vec<BusWindows>>,
    on_bus: OnceLock<()>,
    /// A [`Chipset`] by number.
    chipset: AtomicU8,
    /// What was last written to port 0xCF8.
    selected: Mutex<u32>,
}

impl PciHost {
    /// A host without functions, not yet on the bus.
    pub fn new(options: PciHostOptions) -> Arc<Self> {
        let PciHostOptions { ports, memory, msi, router, reset_control, ram, enable_bars } = options;
        let mapper = Arc::new(BarMapper::new(ports.clone(), memory.clone()));
        let high_memory_end = ram.ranges().map(|range| range.end()).max().unwrap_or(0);
        Arc::new_cyclic(|host| Self {
            attachment: Attachment { msi, router, mapper },
            ports,
            memory,
            reset_control,
            ecam: Arc::new(Ecam(host.clone())),
            high_memory_end,
            enable_bars,
            functions: RwLock::default(),
            windows: OnceLock::new(),
            on_bus: OnceLock::new(),
            chipset: AtomicU8::new(Chipset::default() as u8),
            selected: Mutex::new(0),
        })
    }

    /// An endpoint for a device to be at `address`.
    pub fn endpoint(&self, address: PciAddress, spec: FunctionSpec) -> Arc<PciEndpoint> {
        Arc::new(PciEndpoint::new(address, spec, self.attachment.clone()))
    }

    /// The register by which the Q35's host bridge at `address` puts memory-mapped configuration where firmware wants it.
    pub(super) fn pciexbar(&self, address: PciAddress) -> PciExBar {
        // A number that no base address register has.
        const KEY: usize = usize::MAX;
        PciExBar::new(self.attachment.mapper.clone(), (address, KEY), self.ecam.clone())
    }

    /// The router of interrupt pins.
    pub fn router(&self) -> &Arc<IntxRouter> {
        &self.attachment.router
    }

    /// Adds a function.
    ///
    /// # Errors
    /// There is one at that address.
    pub fn add(&self, function: Arc<PciFunction>) -> Result<(), PciError> {
        let address = function.address();
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if functions.contains_key(&address) {
            return Err(PciError::Occupied(address));
        }
        functions.insert(address, function);
        Ok(())
    }

    /// All functions by rising address.
    pub fn functions(&self) -> Vec<Arc<PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The function at `address`.
    pub fn function(&self, address: PciAddress) -> Option<Arc<PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }

    /// Places BARs, routes pins and puts configuration space on the buses. Call once, when all functions are added.
    ///
    /// # Errors
    /// The BARs do not fit into their windows, or something is in the way of the configuration ranges.
    pub fn finish(self: &Arc<Self>) -> Result<(), PciError> {
        let functions = self.functions();
        let mut resources = Resources::new(self.high_memory_end);
        let mut windows = Vec::new();
        for on_bus in functions.chunk_by(|a, b| a.address().bus == b.address().bus) {
            let requests = on_bus
                .iter()
                .flat_map(|function| function.endpoint().bars().map(|(index, bar)| (function.address(), index, bar)))
                .collect();
            windows.push(resources.assign_bus(on_bus[0].address().bus, requests, |(address, index, _), start| {
                for function in on_bus.iter().filter(|function| function.address() == address) {
                    function.endpoint().assign_bar(index, start);
                }
            })?);
        }
        // A second call would find the ranges below taken, so this is the first.
        let _ = self.windows.set(windows);
        self.attachment.router.route_all();
        for slot in functions.chunk_by(|a, b| same_slot(a.address(), b.address())) {
            let multi_function = slot.iter().any(|function| function.address().func > 0);
            for function in slot {
                function.endpoint().power_on(self.enable_bars, multi_function);
            }
        }
        self.ports.map(CONFIG_PORT.into(), CONFIG_PORTS, Arc::new(ConfigPorts(Arc::downgrade(self))))?;
        if let Err(why) = self.memory.map(ECAM_BASE, ECAM_SIZE, self.ecam.clone()) {
            self.ports.unmap(CONFIG_PORT.into());
            return Err(why.into());
        }
        let _ = self.on_bus.set(());
        Ok(())
    }

    /// The windows of each bus that has functions; empty before [`finish`](Self::finish).
    pub fn windows(&self) -> &[BusWindows] {
        self.windows.get().map_or(&[], Vec::as_slice)
    }

    /// How interrupt pins are wired, for `_PRT` and the MP table; empty before [`finish`](Self::finish).
    pub fn pin_routes(&self) -> Vec<PinRoute> {
        self.attachment.router.routes()
    }

    /// Which board this is. The host bridge may choose another when it is made.
    pub fn set_chipset(&self, chipset: Chipset) {
        self.chipset.store(chipset as u8, Ordering::Relaxed);
    }

    /// Which board this is.
    pub fn chipset(&self) -> Chipset {
        Chipset::from_number(self.chipset.load(Ordering::Relaxed).into())
    }

    /// Resets all functions.
    pub fn reset(&self) {
        *self.selected.lock().unwrap_or_else(PoisonError::into_inner) = 0;
        for function in self.functions() {
            function.reset();
        }
    }

    /// Lets all functions go on after a restore.
    pub fn resume(&self) {
        for function in self.functions() {
            function.resume();
        }
    }

    /// Reads configuration space; ones where no function is.
    pub fn config_read(&self, address: PciAddress, offset: u16, size: AccessSize) -> u32 {
        let value = self.function(address).map_or(u32::MAX, |function| function.config_read(offset, size));
        let chipset = self.chipset();
        if chipset == Chipset::Bhyve {
            return value;
        }
        let mut bytes = value.to_le_bytes();
        for (byte, register) in bytes.iter_mut().zip(offset..).take(size.bytes() as usize) {
            *byte = chipset.power_management(address, register).unwrap_or(*byte);
        }
        u32::from_le_bytes(bytes)
    }

    /// Writes configuration space.
    pub fn config_write(&self, address: PciAddress, offset: u16, size: AccessSize, value: u32) {
        if let Some(function) = self.function(address) {
            function.config_write(offset, size, value);
        }
    }

    /// Function and register that the configuration data port reaches now.
    fn selected(&self, port_offset: u64) -> Option<(PciAddress, u16)> {
        let selected = *self.selected.lock().unwrap_or_else(PoisonError::into_inner);
        if selected & ADDRESS_ENABLE == 0 {
            return None;
        }
        let register = (selected & 0xfc) as u16 + (port_offset & 3) as u16;
        Some((address_from(selected >> 8)?, register))
    }
}

fn same_slot(a: PciAddress, b: PciAddress) -> bool {
    (a.bus, a.slot) == (b.bus, b.slot)
}

/// A function's address from its 16-bit form: bus 15:8, slot 7:3, function 2:0.
fn address_from(bits: u32) -> Option<PciAddress> {
    PciAddress::new((bits >> 8) as u8, (bits >> 3 & 0x1f) as u8, (bits & 7) as u8)
}

impl Drop for PciHost {
    fn drop(&mut self) {
        if self.on_bus.get().is_some() {
            self.ports.unmap(CONFIG_PORT.into());
            self.memory.unmap(ECAM_BASE);
        }
    }
}

/// Ports 0xCF8–0xCFF (PCI 3.0, 3.2.2.3.2). Weak, because the bus must not keep the host alive.
struct ConfigPorts(Weak<PciHost>);

const RESET_CONTROL: u64 = 1;
const DATA: u64 = 4;

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let Some(host) = self.0.upgrade() else { return u64::MAX };
        match (offset, size) {
            (0, AccessSize::Dword) => u64::from(*host.selected.lock().unwrap_or_else(PoisonError::into_inner)),
            (RESET_CONTROL, AccessSize::Byte) => host.reset_control.read(0, size),
            (DATA.., _) => match host.selected(offset) {
                Some((address, register)) => u64::from(host.config_read(address, register, size)),
                None => u64::MAX,
            },
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let Some(host) = self.0.upgrade() else { return };
        match (offset, size) {
            (0, AccessSize::Dword) => {
                *host.selected.lock().unwrap_or_else(PoisonError::into_inner) = value as u32 & SELECTABLE;
            }
            (RESET_CONTROL, AccessSize::Byte) => host.reset_control.write(0, size, value),
            (DATA.., _) => {
                if let Some((address, register)) = host.selected(offset) {
                    host.config_write(address, register, size, value as u32);
                }
            }
            _ => {}
        }
    }
}

/// Memory-mapped configuration (PCI Express 3.0, 7.2.2).
struct Ecam(Weak<PciHost>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        if size == AccessSize::Qword {
            return self.read(offset, AccessSize::Dword) | self.read(offset.wrapping_add(4), AccessSize::Dword) << 32;
        }
        match (self.0.upgrade(), address_from((offset >> 12) as u32)) {
            (Some(host), Some(address)) => u64::from(host.config_read(address, (offset & 0xfff) as u16, size)),
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        if size == AccessSize::Qword {
            self.write(offset, AccessSize::Dword, value & 0xffff_ffff);
            self.write(offset.wrapping_add(4), AccessSize::Dword, value >> 32);
        } else if let (Some(host), Some(address)) = (self.0.upgrade(), address_from((offset >> 12) as u32)) {
            host.config_write(address, (offset & 0xfff) as u16, size, value as u32);
        }
    }
}
