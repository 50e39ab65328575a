//! The legacy interface (virtio 0.9.5, 2.1; virtio 1.2, 4.1.4.10): one block of ports, the device's configuration at
//! its end. Where that begins depends on whether MSI-X is enabled, because two registers exist only then.

use platform::AccessSize;

use super::{Registers, VirtioPci, part};
use crate::virtio::queue::VirtQueue;

/// Queue addresses are page numbers.
const PAGE_SHIFT: u32 = 12;
const PAGE: u64 = 1 << PAGE_SHIFT;

const DEVICE_CONFIG: u64 = 20;
const DEVICE_CONFIG_WITH_MSIX: u64 = 24;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Register {
    DeviceFeatures,
    DriverFeatures,
    QueuePage,
    QueueSize,
    QueueSelect,
    QueueNotify,
    Status,
    InterruptStatus,
    ConfigVector,
    QueueVector,
    /// Device configuration, at this offset.
    Device(u64),
}

/// Start, length and name of each register.
const REGISTERS: [(u64, u64, Register); 10] = [
    (0, 4, Register::DeviceFeatures),
    (4, 4, Register::DriverFeatures),
    (8, 4, Register::QueuePage),
    (12, 2, Register::QueueSize),
    (14, 2, Register::QueueSelect),
    (16, 2, Register::QueueNotify),
    (18, 1, Register::Status),
    (19, 1, Register::InterruptStatus),
    (20, 2, Register::ConfigVector),
    (22, 2, Register::QueueVector),
];

/// Bytes of the BAR.
pub(super) fn bar_size(config_size: u32) -> u64 {
    DEVICE_CONFIG_WITH_MSIX + u64::from(config_size)
}

/// The register that holds the whole access: (register, bytes into it, its length).
fn decode(offset: u64, size: AccessSize, msix: bool) -> Option<(Register, u64, u64)> {
    let device = if msix { DEVICE_CONFIG_WITH_MSIX } else { DEVICE_CONFIG };
    if offset >= device {
        return Some((Register::Device(offset - device), 0, size.bytes()));
    }
    let (start, len, register) =
        REGISTERS.into_iter().find(|(start, len, _)| (*start..start + len).contains(&offset))?;
    let within = offset - start;
    (within + size.bytes() <= len).then_some((register, within, len))
}

impl VirtioPci {
    pub(super) fn legacy_read(&self, offset: u64, size: AccessSize) -> u64 {
        match decode(offset, size, self.context.endpoint().msix_enabled()) {
            Some((Register::Device(offset), ..)) => self.read_device_config(offset, size),
            Some((register, within, _)) => part(self.legacy_register(register), within, size),
            None => u64::MAX,
        }
    }

    fn legacy_register(&self, register: Register) -> u64 {
        let registers = self.registers();
        let queue = self.context.queue(registers.queue_select);
        match register {
            Register::DeviceFeatures => self.legacy_features(),
            Register::DriverFeatures => registers.driver_features & u64::from(u32::MAX),
            Register::QueuePage => queue.map_or(0, |queue| queue.state().descriptors >> PAGE_SHIFT),
            Register::QueueSize => queue.map_or(0, |queue| u64::from(queue.max_size())),
            Register::QueueSelect => u64::from(registers.queue_select),
            Register::QueueNotify | Register::Device(_) => 0,
            Register::Status => u64::from(self.context.status()),
            Register::InterruptStatus => u64::from(self.context.take_isr()),
            Register::ConfigVector => u64::from(self.context.config_vector()),
            Register::QueueVector => queue.map_or(0, |queue| u64::from(queue.vector())),
        }
    }

    pub(super) fn legacy_write(&self, offset: u64, size: AccessSize, value: u64) {
        match decode(offset, size, self.context.endpoint().msix_enabled()) {
            Some((Register::Device(offset), ..)) => self.write_device_config(offset, size, value),
            // A write of a part of a register means nothing.
            Some((register, 0, len)) if len == size.bytes() => self.write_legacy_register(register, value),
            _ => {}
        }
    }

    fn write_legacy_register(&self, register: Register, value: u64) {
        let index = value as u16;
        match register {
            Register::QueueNotify => return self.notify(index),
            Register::Status => return self.write_status(value as u8),
            _ => {}
        }
        let mut registers = self.registers();
        let Registers { queue_select, .. } = *registers;
        match register {
            Register::DriverFeatures => {
                let offered = self.legacy_features();
                self.write_features(&mut registers, value & offered, offered);
            }
            Register::QueuePage => self.place_queue(queue_select, value),
            Register::QueueSelect => registers.queue_select = index,
            Register::ConfigVector => self.context.set_config_vector(self.context.valid_vector(index)),
            Register::QueueVector => {
                if let Some(queue) = self.context.queue(queue_select) {
                    queue.set_vector(self.context.valid_vector(index));
                }
            }
            _ => {}
        }
    }

    /// Page 0 closes a queue; any other opens it there. A queue that is open is closed first.
    fn place_queue(&self, index: u16, page: u64) {
        let Some(queue) = self.context.queue(index) else { return };
        let vector = queue.vector();
        queue.close();
        queue.wait_idle();
        queue.set_vector(vector);
        if page != 0 {
            lay_out(queue, page << PAGE_SHIFT);
            queue.open(self.context.features());
        }
    }
}

/// The fixed layout of a legacy queue: descriptors, available ring, and from the next page the used ring.
fn lay_out(queue: &VirtQueue, start: u64) {
    queue.configure(|state| {
        let size = u64::from(state.size);
        // Start is below 2^44, sizes below 2^20: nothing wraps.
        state.descriptors = start;
        state.available = start + 16 * size;
        state.used = (state.available + 2 * size + 6).next_multiple_of(PAGE);
    });
}
