//! The virtio registers in a PCI function: a transitional device (virtio 1.2, 4.1), which drivers of either interface
//! find where they look for it.
//!
//! | BAR | contents |
//! |---|---|
//! | 0, ports | [`legacy`] registers, then the device's configuration |
//! | 1, memory | MSI-X table |
//! | 2, memory | [`modern`] registers, a page each: common, interrupt status, device configuration, doorbells |

mod legacy;
mod modern;
mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use platform::{AccessSize, Persist, StateError};

use super::context::{VirtioContext, status};
use super::{VirtioDevice, feature};
use crate::factory::{BuildContext, DeviceError};
use crate::pci::{Bar, BarKind, Capability, FunctionSpec, Identity, PciDevice, PciFunction};
use state::TransportState;

const LEGACY_BAR: usize = 0;
const MSIX_BAR: usize = 1;
const MODERN_BAR: usize = 2;

/// How long a reset waits for a device's requests to end before it tells the device again.
const RESET_AGAIN: Duration = Duration::from_millis(100);

/// Vendor id of all virtio devices.
pub const VENDOR: u16 = 0x1af4;

/// What the transport needs to know of a kind of device.
#[derive(Clone, Debug)]
pub struct VirtioSpec {
    /// Name of the emulation ("virtio-blk").
    pub name: &'static str,
    /// PCI device id.
    pub device: u16,
    /// Virtio device type, which is also the PCI subsystem id (virtio 1.2, chapter 5).
    pub device_type: u16,
    /// PCI class.
    pub class: (u8, u8, u8),
    /// Bytes of device configuration.
    pub config_size: u32,
    /// Largest size of each queue, a power of two.
    pub queues: Vec<u16>,
}

/// The registers that belong to no queue and no device.
#[derive(Default, Clone)]
struct Registers {
    queue_select: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
}

/// A virtio device behind its PCI registers.
pub(crate) struct VirtioPci {
    spec: VirtioSpec,
    context: Arc<VirtioContext>,
    device: Arc<dyn VirtioDevice>,
    registers: Mutex<Registers>,
    /// Offset of the capability that gives access to the BARs through configuration space, if the modern interface is
    /// offered.
    config_access: Option<u16>,
}

/// Makes a virtio device: the PCI function from `spec` and the global keys `virtio_msix` and `virtio.modern`, the device
/// itself by `make`.
///
/// # Errors
/// A key is wrong, or `make` fails.
pub fn build<D: VirtioDevice + 'static>(
    build: &BuildContext<'_>,
    spec: VirtioSpec,
    make: impl FnOnce(Arc<VirtioContext>) -> Result<Arc<D>, DeviceError>,
) -> Result<Arc<PciFunction>, DeviceError> {
    let use_msix = build.config.bool_or("virtio_msix", true)?;
    let modern = build.config.bool_or("virtio.modern", true)?;
    let function = function_spec(&spec, use_msix, modern);
    // The modern capabilities come last, and the one for configuration access last of them.
    let last = function.capabilities.len().saturating_sub(1);
    let endpoint = build.pci.endpoint(build.address, function);
    let config_access = if modern { endpoint.capability(last) } else { None };
    let context = VirtioContext::new(spec.name, build.memory.clone(), endpoint.clone(), &spec.queues);
    let device = make(context.clone())?;
    let transport = VirtioPci { spec, context, device, registers: Mutex::default(), config_access };
    Ok(PciFunction::new(endpoint, Arc::new(transport)))
}

fn function_spec(spec: &VirtioSpec, use_msix: bool, modern: bool) -> FunctionSpec {
    let mut function = FunctionSpec::new(Identity {
        vendor: VENDOR,
        device: spec.device,
        subsystem_vendor: VENDOR,
        subsystem: spec.device_type,
        class: spec.class,
        ..Identity::default()
    })
    .with_bar(LEGACY_BAR, Bar::new(BarKind::Io, legacy::bar_size(spec.config_size)))
    .with_intx();
    if use_msix {
        let vectors = spec.queues.len() as u16 + 1;
        function = function.with_capability(Capability::Msix { vectors, bar: MSIX_BAR });
    }
    function = function.with_capability(Capability::Msi(1));
    if modern {
        function = function.with_bar(MODERN_BAR, Bar::new(BarKind::Memory32, modern::BAR_SIZE));
        function.capabilities.extend(modern::capabilities(MODERN_BAR as u8, spec));
    }
    function
}

impl VirtioPci {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the legacy interface offers.
    fn legacy_features(&self) -> u64 {
        let transport = feature::NOTIFY_ON_EMPTY | feature::INDIRECT_DESC | feature::EVENT_IDX | feature::ANY_LAYOUT;
        (self.device.legacy_features() | transport & self.device.transport_features()) & u64::from(u32::MAX)
    }

    /// What the modern interface offers.
    fn modern_features(&self) -> u64 {
        let transport = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1 | feature::RING_RESET;
        self.device.features() | transport & self.device.transport_features()
    }

    /// The guest rang the doorbell of a queue.
    fn notify(&self, index: u16) {
        let Some(queue) = self.context.queue(index) else { return };
        // A legacy driver may use its queues before it says DRIVER_OK, a modern one must not.
        let too_early = self.context.has(feature::VERSION_1) && self.context.status() & status::DRIVER_OK == 0;
        if queue.is_ready() && !too_early {
            self.device.notify(index);
        }
    }

    fn write_status(&self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let before = self.context.status();
        let mut value = value;
        if value & !before & status::FEATURES_OK != 0 && !self.features_acceptable() {
            value &= !status::FEATURES_OK;
        }
        self.context.set_status(value);
        if value & !before & status::DRIVER_OK != 0 {
            self.device.start();
            self.notify_all();
        }
    }

    /// Whether the driver took only what is offered, and the modern interface as such (virtio 1.2, 2.2.2).
    fn features_acceptable(&self) -> bool {
        let accepted = self.registers().driver_features;
        accepted & !self.modern_features() == 0 && accepted & feature::VERSION_1 != 0
    }

    /// Features the driver writes count until it says that it is done with that.
    fn write_features(&self, registers: &mut Registers, features: u64, offered: u64) {
        if self.context.status() & (status::FEATURES_OK | status::DRIVER_OK) == 0 {
            registers.driver_features = features;
            self.context.set_features(features & offered);
        }
    }

    fn notify_all(&self) {
        for index in 0..self.context.queues().len() as u16 {
            self.notify(index);
        }
    }

    /// Device reset: returns when nothing of the device uses guest memory any more.
    fn reset_device(&self) {
        let mut registers = self.registers();
        for queue in self.context.queues() {
            queue.close();
        }
        self.device.reset();
        for queue in self.context.queues() {
            // A thread that was looking at a queue may have begun more of it meanwhile.
            while !queue.wait_idle_for(RESET_AGAIN) {
                self.device.reset();
            }
        }
        *registers = Registers::default();
        self.context.clear();
    }

    /// Reset of one queue (virtio 1.2, 2.6.1).
    fn reset_queue(&self, index: u16) {
        if let Some(queue) = self.context.queue(index)
            && self.context.has(feature::RING_RESET)
        {
            queue.close();
            queue.wait_idle();
        }
    }

    fn read_device_config(&self, offset: u64, size: AccessSize) -> u64 {
        let mut bytes = [0; 8];
        let len = size.bytes() as usize;
        if let Ok(offset) = u32::try_from(offset)
            && offset < self.spec.config_size
        {
            let inside = len.min((self.spec.config_size - offset) as usize);
            self.device.config_read(offset, &mut bytes[..inside]);
        }
        u64::from_le_bytes(bytes)
    }

    fn write_device_config(&self, offset: u64, size: AccessSize, value: u64) {
        if let Ok(offset) = u32::try_from(offset)
            && offset < self.spec.config_size
        {
            let inside = (size.bytes() as usize).min((self.spec.config_size - offset) as usize);
            self.device.config_write(offset, &value.to_le_bytes()[..inside]);
        }
    }
}

/// The part that an access of `size` at `within` bytes into a register reads.
fn part(register: u64, within: u64, size: AccessSize) -> u64 {
    register.checked_shr((within * 8) as u32).unwrap_or(0) & size.mask()
}

impl PciDevice for VirtioPci {
    fn bar_read(&self, bar: usize, offset: u64, size: AccessSize) -> u64 {
        match bar {
            LEGACY_BAR => self.legacy_read(offset, size),
            MODERN_BAR => self.modern_read(offset, size),
            _ => u64::MAX,
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, size: AccessSize, value: u64) {
        match bar {
            LEGACY_BAR => self.legacy_write(offset, size, value),
            MODERN_BAR => self.modern_write(offset, size, value),
            _ => {}
        }
    }

    fn config_read(&self, offset: u16, size: AccessSize) -> Option<u32> {
        let window = self.config_access?;
        modern::in_config_data(window, offset).then(|| self.config_access_read(window, size))
    }

    fn config_write(&self, offset: u16, _: AccessSize, value: u32) -> bool {
        match self.config_access {
            Some(window) if modern::in_config_data(window, offset) => {
                self.config_access_write(window, value);
                true
            }
            _ => false,
        }
    }

    fn resume(&self) {
        if self.context.status() & status::DRIVER_OK != 0 {
            self.device.start();
        }
        self.notify_all();
    }
}

impl Persist for VirtioPci {
    fn kind(&self) -> &'static str {
        self.spec.name
    }

    fn version(&self) -> u32 {
        state::VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        // First the device, which waits until nothing is under way; then its queues stand still.
        let device = self.device.save()?;
        for queue in self.context.queues() {
            queue.wait_idle();
        }
        TransportState::take(self, device).encode(self.kind())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        TransportState::decode(self.kind(), version, bytes)?.apply(self)
    }

    fn reset(&self) {
        self.reset_device();
    }
}
