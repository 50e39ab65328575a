//! The modern interface (virtio 1.2, 4.1.4): four structures in one memory BAR, found through vendor capabilities, and
//! a fifth capability through which configuration space reaches the same registers.

use platform::AccessSize;

use super::{LEGACY_BAR, MODERN_BAR, VirtioPci, VirtioSpec, part};
use crate::pci::{Capability, regs};

/// Each structure has a page of its own.
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const INTERRUPT_STATUS: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const DOORBELLS: u64 = 3 * PAGE;
pub(super) const BAR_SIZE: u64 = 4 * PAGE;

/// Bytes from one queue's doorbell to the next.
const DOORBELL_STRIDE: u32 = 4;

/// Kinds of capability (4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// Offsets inside a capability, from its start.
const CAP_BAR: u16 = 4;
const CAP_OFFSET: u16 = 8;
const CAP_LENGTH: u16 = 12;
const CAP_DATA: u16 = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Common {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    QueueCount,
    Status,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueDoorbell,
    DescriptorsLow,
    DescriptorsHigh,
    AvailableLow,
    AvailableHigh,
    UsedLow,
    UsedHigh,
    QueueNotifyData,
    QueueReset,
}

/// Start, length and name of each register of the common structure (4.1.4.3).
const COMMON_REGISTERS: [(u64, u64, Common); 21] = [
    (0, 4, Common::DeviceFeatureSelect),
    (4, 4, Common::DeviceFeature),
    (8, 4, Common::DriverFeatureSelect),
    (12, 4, Common::DriverFeature),
    (16, 2, Common::ConfigVector),
    (18, 2, Common::QueueCount),
    (20, 1, Common::Status),
    (21, 1, Common::ConfigGeneration),
    (22, 2, Common::QueueSelect),
    (24, 2, Common::QueueSize),
    (26, 2, Common::QueueVector),
    (28, 2, Common::QueueEnable),
    (30, 2, Common::QueueDoorbell),
    (32, 4, Common::DescriptorsLow),
    (36, 4, Common::DescriptorsHigh),
    (40, 4, Common::AvailableLow),
    (44, 4, Common::AvailableHigh),
    (48, 4, Common::UsedLow),
    (52, 4, Common::UsedHigh),
    (56, 2, Common::QueueNotifyData),
    (58, 2, Common::QueueReset),
];
const COMMON_SIZE: u32 = 60;

/// The five capabilities; configuration access is the last.
pub(super) fn capabilities(bar: u8, spec: &VirtioSpec) -> Vec<Capability> {
    let own = |kind, offset: u64, length: u32, extra: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, bar, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(extra);
        Capability::Own { id: regs::capability::VENDOR, body, writable: Vec::new() }
    };
    let doorbells = spec.queues.len() as u32 * DOORBELL_STRIDE;
    let mut all = vec![
        own(CAP_COMMON, COMMON, COMMON_SIZE, &[]),
        own(CAP_ISR, INTERRUPT_STATUS, 1, &[]),
        own(CAP_NOTIFY, DOORBELLS, doorbells, &DOORBELL_STRIDE.to_le_bytes()),
    ];
    if spec.config_size > 0 {
        all.push(own(CAP_DEVICE, DEVICE, spec.config_size, &[]));
    }
    let mut body = vec![20, CAP_PCI];
    body.resize(18, 0);
    let mut writable = vec![0, 0, 0xff, 0, 0, 0];
    writable.resize(14, 0xff);
    all.push(Capability::Own { id: regs::capability::VENDOR, body, writable });
    all
}

/// Whether `offset` of configuration space is the data register of the configuration access capability at `window`.
pub(super) fn in_config_data(window: u16, offset: u16) -> bool {
    (window + CAP_DATA..window + CAP_DATA + 4).contains(&offset)
}

/// Common register that holds the whole access: (register, bytes into it, its length).
fn decode(offset: u64, size: AccessSize) -> Option<(Common, u64, u64)> {
    let all = COMMON_REGISTERS.into_iter();
    let (start, len, register) = all.rev().find(|(start, ..)| *start <= offset)?;
    let within = offset - start;
    (within + size.bytes() <= len).then_some((register, within, len))
}

impl VirtioPci {
    pub(super) fn modern_read(&self, offset: u64, size: AccessSize) -> u64 {
        match offset & !(PAGE - 1) {
            COMMON if size == AccessSize::Qword => {
                let low = self.modern_read(offset, AccessSize::Dword) & 0xffff_ffff;
                low | self.modern_read(offset + 4, AccessSize::Dword) << 32
            }
            COMMON => match decode(offset, size) {
                Some((register, within, _)) => part(self.common_register(register), within, size),
                None => 0,
            },
            INTERRUPT_STATUS if offset == INTERRUPT_STATUS => u64::from(self.context.take_isr()),
            DEVICE => self.read_device_config(offset - DEVICE, size),
            _ => 0,
        }
    }

    fn common_register(&self, register: Common) -> u64 {
        let registers = self.registers();
        let select = registers.queue_select;
        let queue = self.context.queue(select);
        let state = queue.map(|queue| queue.state());
        let word = |features: u64, select: u32| {
            if select < 2 { part(features, u64::from(select) * 4, AccessSize::Dword) } else { 0 }
        };
        match register {
            Common::DeviceFeatureSelect => u64::from(registers.device_feature_select),
            Common::DeviceFeature => word(self.modern_features(), registers.device_feature_select),
            Common::DriverFeatureSelect => u64::from(registers.driver_feature_select),
            Common::DriverFeature => word(registers.driver_features, registers.driver_feature_select),
            Common::ConfigVector => u64::from(self.context.config_vector()),
            Common::QueueCount => self.context.queues().len() as u64,
            Common::Status => u64::from(self.context.status()),
            Common::ConfigGeneration => u64::from(self.context.config_generation()),
            Common::QueueSelect => u64::from(select),
            Common::QueueSize => state.map_or(0, |state| u64::from(state.size)),
            Common::QueueVector => state.map_or(0, |state| u64::from(state.vector)),
            Common::QueueEnable => state.map_or(0, |state| u64::from(state.ready)),
            Common::QueueDoorbell | Common::QueueNotifyData => queue.map_or(0, |_| u64::from(select)),
            Common::DescriptorsLow => state.map_or(0, |state| state.descriptors & 0xffff_ffff),
            Common::DescriptorsHigh => state.map_or(0, |state| state.descriptors >> 32),
            Common::AvailableLow => state.map_or(0, |state| state.available & 0xffff_ffff),
            Common::AvailableHigh => state.map_or(0, |state| state.available >> 32),
            Common::UsedLow => state.map_or(0, |state| state.used & 0xffff_ffff),
            Common::UsedHigh => state.map_or(0, |state| state.used >> 32),
            // Reset is complete when the write that asked for it returns.
            Common::QueueReset => 0,
        }
    }

    pub(super) fn modern_write(&self, offset: u64, size: AccessSize, value: u64) {
        match offset & !(PAGE - 1) {
            COMMON if size == AccessSize::Qword => {
                self.modern_write(offset, AccessSize::Dword, value & 0xffff_ffff);
                self.modern_write(offset + 4, AccessSize::Dword, value >> 32);
            }
            COMMON => {
                if let Some((register, 0, len)) = decode(offset, size)
                    && len == size.bytes()
                {
                    self.write_common_register(register, value);
                }
            }
            DEVICE => self.write_device_config(offset - DEVICE, size, value),
            DOORBELLS => {
                let queue = (offset - DOORBELLS) / u64::from(DOORBELL_STRIDE);
                self.notify(u16::try_from(queue).unwrap_or(u16::MAX));
            }
            _ => {}
        }
    }

    fn write_common_register(&self, register: Common, value: u64) {
        if register == Common::Status {
            return self.write_status(value as u8);
        }
        let mut registers = self.registers();
        let select = registers.queue_select;
        match register {
            Common::DeviceFeatureSelect => registers.device_feature_select = value as u32,
            Common::DriverFeatureSelect => registers.driver_feature_select = value as u32,
            Common::DriverFeature => {
                let shift = match registers.driver_feature_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let features = registers.driver_features & !(0xffff_ffff << shift) | value << shift;
                self.write_features(&mut registers, features, self.modern_features());
            }
            Common::ConfigVector => self.context.set_config_vector(self.context.valid_vector(value as u16)),
            Common::QueueSelect => registers.queue_select = value as u16,
            Common::QueueReset if value == 1 => self.reset_queue(select),
            _ => self.write_queue_register(select, register, value),
        }
    }

    fn write_queue_register(&self, select: u16, register: Common, value: u64) {
        let Some(queue) = self.context.queue(select) else { return };
        let low = |old: u64| old & !0xffff_ffff | value;
        let high = |old: u64| old & 0xffff_ffff | value << 32;
        match register {
            Common::QueueVector => queue.set_vector(self.context.valid_vector(value as u16)),
            Common::QueueEnable if value == 1 => queue.open(self.context.features()),
            Common::QueueSize => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size() {
                    queue.configure(|state| state.size = size);
                }
            }
            Common::DescriptorsLow => queue.configure(|state| state.descriptors = low(state.descriptors)),
            Common::DescriptorsHigh => queue.configure(|state| state.descriptors = high(state.descriptors)),
            Common::AvailableLow => queue.configure(|state| state.available = low(state.available)),
            Common::AvailableHigh => queue.configure(|state| state.available = high(state.available)),
            Common::UsedLow => queue.configure(|state| state.used = low(state.used)),
            Common::UsedHigh => queue.configure(|state| state.used = high(state.used)),
            _ => {}
        }
    }

    /// Where the configuration access capability points: BAR, offset, access size, if that is a register of ours.
    fn config_access_target(&self, window: u16) -> Option<(usize, u64, AccessSize)> {
        let endpoint = self.context.endpoint();
        let bar = (endpoint.config(window + CAP_BAR) & 0xff) as usize;
        let offset = u64::from(endpoint.config(window + CAP_OFFSET));
        let length = endpoint.config(window + CAP_LENGTH);
        let size = AccessSize::from_bytes(length as usize).filter(|size| size.bytes() <= 4)?;
        let limit = match bar {
            LEGACY_BAR => super::legacy::bar_size(self.spec.config_size).next_power_of_two(),
            MODERN_BAR => BAR_SIZE,
            _ => return None,
        };
        (offset.is_multiple_of(size.bytes()) && offset + size.bytes() <= limit).then_some((bar, offset, size))
    }

    pub(super) fn config_access_read(&self, window: u16, _: AccessSize) -> u32 {
        match self.config_access_target(window) {
            Some((MODERN_BAR, offset, size)) => self.modern_read(offset, size) as u32,
            Some((_, offset, size)) => self.legacy_read(offset, size) as u32,
            None => 0,
        }
    }

    pub(super) fn config_access_write(&self, window: u16, value: u32) {
        match self.config_access_target(window) {
            Some((MODERN_BAR, offset, size)) => self.modern_write(offset, size, u64::from(value) & size.mask()),
            Some((_, offset, size)) => self.legacy_write(offset, size, u64::from(value) & size.mask()),
            None => {}
        }
    }
}
