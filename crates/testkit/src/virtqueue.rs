//! The driver's side of virtio over PCI: set-up through the legacy or the modern interface, and the rings.
//!
//! Written from the specification, not from the device: where the two disagree, a test fails.

use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use memory::GuestMemory;
use platform::AccessSize::{self, Byte, Dword, Word};

use crate::irq::PATIENCE;
use crate::pci::{GuestBar, GuestFunction};

/// The feature bit of the modern interface.
pub const VERSION_1: u64 = 1 << 32;
/// The feature bit of indirect descriptors.
pub const INDIRECT: u64 = 1 << 28;
/// The feature bit of notification suppression by index.
pub const EVENT_IDX: u64 = 1 << 29;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// A part of a modern device's BAR.
#[derive(Clone, Copy, Debug)]
struct Structure {
    bar: GuestBar,
    offset: u64,
}

#[derive(Clone, Copy, Debug)]
enum Interface {
    Legacy { bar: GuestBar },
    Modern { common: Structure, isr: Structure, device: Option<Structure>, notify: Structure, stride: u64 },
}

/// A driver of one virtio function.
pub struct VirtioGuest {
    function: GuestFunction,
    ram: GuestMemory,
    interface: Interface,
    status: u8,
}

/// One buffer of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub device_writes: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, device_writes: false }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self { address, len, device_writes: true }
    }
}

impl VirtioGuest {
    /// A driver of the legacy interface. Decoding and bus mastering are on as left by the board.
    pub fn legacy(function: GuestFunction, ram: GuestMemory) -> Self {
        let interface = Interface::Legacy { bar: function.bar(0) };
        Self { function, ram, interface, status: 0 }
    }

    /// A driver of the modern interface.
    ///
    /// # Panics
    /// The function lacks one of the capabilities.
    pub fn modern(function: GuestFunction, ram: GuestMemory) -> Self {
        let all = function.capabilities(9);
        let find = |kind: u8| {
            let at = *all.iter().find(|at| function.config(**at + 3, Byte) == u32::from(kind))?;
            let bar = function.bar(function.config(at + 4, Byte) as u8);
            Some((at, Structure { bar, offset: u64::from(function.config32(at + 8)) }))
        };
        let need = |kind| find(kind).unwrap_or_else(|| panic!("no virtio capability of kind {kind}"));
        let (notify_at, notify) = need(2);
        let interface = Interface::Modern {
            common: need(1).1,
            isr: need(3).1,
            device: find(4).map(|(_, structure)| structure),
            notify,
            stride: u64::from(function.config32(notify_at + 16)),
        };
        Self { function, ram, interface, status: 0 }
    }

    /// The PCI function.
    pub fn function(&self) -> &GuestFunction {
        &self.function
    }

    fn common_read(&self, offset: u64, size: AccessSize) -> u64 {
        match self.interface {
            Interface::Legacy { bar } => self.function.read(bar, offset, size),
            Interface::Modern { common, .. } => self.function.read(common.bar, common.offset + offset, size),
        }
    }

    fn common_write(&self, offset: u64, size: AccessSize, value: u64) {
        match self.interface {
            Interface::Legacy { bar } => self.function.write(bar, offset, size, value),
            Interface::Modern { common, .. } => self.function.write(common.bar, common.offset + offset, size, value),
        }
    }

    fn is_modern(&self) -> bool {
        matches!(self.interface, Interface::Modern { .. })
    }

    /// Reads the device status.
    pub fn status(&self) -> u8 {
        self.common_read(if self.is_modern() { 20 } else { 18 }, Byte) as u8
    }

    /// Writes the device status.
    pub fn set_status(&mut self, status: u8) {
        self.status = status;
        self.common_write(if self.is_modern() { 20 } else { 18 }, Byte, u64::from(status));
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.set_status(0);
    }

    /// Reads (and so clears) the interrupt status.
    pub fn isr(&self) -> u8 {
        match self.interface {
            Interface::Legacy { bar } => self.function.read(bar, 19, Byte) as u8,
            Interface::Modern { isr, .. } => self.function.read(isr.bar, isr.offset, Byte) as u8,
        }
    }

    /// The features the device offers.
    pub fn offered(&self) -> u64 {
        if !self.is_modern() {
            return self.common_read(0, Dword);
        }
        (0..2).fold(0, |features, word| {
            self.common_write(0, Dword, word);
            features | self.common_read(4, Dword) << (32 * word)
        })
    }

    /// Resets the device and accepts those of `wanted` that it offers; a modern driver always takes the modern
    /// interface. Returns what was accepted.
    ///
    /// # Panics
    /// A modern device refuses.
    pub fn negotiate(&mut self, wanted: u64) -> u64 {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let offered = self.offered();
        if !self.is_modern() {
            let accepted = offered & wanted;
            self.common_write(4, Dword, accepted);
            return accepted;
        }
        let accepted = offered & (wanted | VERSION_1);
        self.write_features(accepted);
        self.set_status(self.status | FEATURES_OK);
        assert!(self.status() & FEATURES_OK != 0, "the device refuses the features it offered");
        accepted
    }

    /// Writes features through the modern interface.
    pub fn write_features(&self, features: u64) {
        for word in 0..2 {
            self.common_write(8, Dword, word);
            self.common_write(12, Dword, features >> (32 * word) & 0xffff_ffff);
        }
    }

    /// Tells the device that the driver is ready.
    pub fn driver_ok(&mut self) {
        self.set_status(self.status | DRIVER_OK);
    }

    /// Number of queues; a legacy device has those whose size is not zero.
    pub fn queue_count(&self) -> u16 {
        if self.is_modern() {
            return self.common_read(18, Word) as u16;
        }
        let sized = |index: &u16| {
            self.common_write(14, Word, u64::from(*index));
            self.common_read(12, Word) != 0
        };
        (0..u16::MAX).take_while(sized).count() as u16
    }

    /// Opens a queue of the device's size, its rings laid out from `start` (a page boundary) as the legacy interface
    /// wants them.
    ///
    /// # Panics
    /// The rings do not fit into RAM.
    pub fn open_queue(&self, index: u16, start: u64) -> GuestQueue {
        let modern = self.is_modern();
        self.common_write(if modern { 22 } else { 14 }, Word, u64::from(index));
        let size = self.common_read(if modern { 24 } else { 12 }, Word) as u16;
        let queue = GuestQueue::new(self.ram.clone(), index, start, size);
        if modern {
            for (offset, address) in [(32, queue.descriptors), (40, queue.available), (48, queue.used)] {
                self.common_write(offset, Dword, address & 0xffff_ffff);
                self.common_write(offset + 4, Dword, address >> 32);
            }
            self.common_write(28, Word, 1);
        } else {
            self.common_write(8, Dword, start >> 12);
        }
        queue
    }

    /// Resets one queue (modern, VIRTIO_F_RING_RESET).
    pub fn reset_queue(&self, index: u16) {
        self.common_write(22, Word, u64::from(index));
        self.common_write(58, Word, 1);
    }

    /// Whether a queue is open.
    pub fn queue_enabled(&self, index: u16) -> bool {
        if self.is_modern() {
            self.common_write(22, Word, u64::from(index));
            return self.common_read(28, Word) != 0;
        }
        self.common_write(14, Word, u64::from(index));
        self.common_read(8, Dword) != 0
    }

    /// Gives a queue an MSI-X vector (MSI-X must be enabled for the legacy interface); returns what the device took.
    pub fn set_queue_vector(&self, index: u16, vector: u16) -> u16 {
        let (select, register) = if self.is_modern() { (22, 26) } else { (14, 22) };
        self.common_write(select, Word, u64::from(index));
        self.common_write(register, Word, u64::from(vector));
        self.common_read(register, Word) as u16
    }

    /// Gives configuration changes an MSI-X vector; returns what the device took.
    pub fn set_config_vector(&self, vector: u16) -> u16 {
        let register = if self.is_modern() { 16 } else { 20 };
        self.common_write(register, Word, u64::from(vector));
        self.common_read(register, Word) as u16
    }

    /// Rings a queue's doorbell.
    pub fn notify(&self, index: u16) {
        match self.interface {
            Interface::Legacy { bar } => self.function.write(bar, 16, Word, u64::from(index)),
            Interface::Modern { common, notify, stride, .. } => {
                self.function.write(common.bar, common.offset + 22, Word, u64::from(index));
                let number = self.function.read(common.bar, common.offset + 30, Word);
                self.function.write(notify.bar, notify.offset + stride * number, Word, u64::from(index));
            }
        }
    }

    /// Reads device configuration. `msix`: whether MSI-X is enabled, which moves it in the legacy interface.
    pub fn device_config(&self, offset: u64, size: AccessSize, msix: bool) -> u64 {
        match self.interface {
            Interface::Legacy { bar } => self.function.read(bar, offset + if msix { 24 } else { 20 }, size),
            Interface::Modern { device, .. } => {
                device.map_or(size.mask(), |device| self.function.read(device.bar, device.offset + offset, size))
            }
        }
    }
}

/// The driver's side of a split virtqueue.
pub struct GuestQueue {
    ram: GuestMemory,
    /// The queue's number.
    pub index: u16,
    /// Its size.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    free: Vec<u16>,
    /// Descriptors of the chain that begins at each head.
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

impl GuestQueue {
    /// Empty rings of `size` from `start`.
    ///
    /// # Panics
    /// They do not fit into RAM.
    pub fn new(ram: GuestMemory, index: u16, start: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let available = start + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(4096);
        ram.fill(start, used + 6 + 8 * entries - start, 0).expect("the rings fit into RAM");
        Self {
            ram,
            index,
            size,
            descriptors: start,
            available,
            used,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            next_used: 0,
        }
    }

    /// First address behind the rings.
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    /// Writes a descriptor of any table.
    pub fn write_descriptor(&self, table: u64, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        let flags = flags | u16::from(buffer.device_writes) << 1;
        self.ram.write_u64(at, buffer.address).expect("descriptor in RAM");
        self.ram.write_u32(at + 8, buffer.len).expect("descriptor in RAM");
        self.ram.write_u16(at + 12, flags).expect("descriptor in RAM");
        self.ram.write_u16(at + 14, next).expect("descriptor in RAM");
    }

    /// Makes a chain available; returns its head.
    ///
    /// # Panics
    /// The chain is empty or there are not enough free descriptors.
    pub fn push(&mut self, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (n, buffer) in buffers.iter().enumerate() {
            let next = indices.get(n + 1).copied();
            self.write_descriptor(self.descriptors, indices[n], *buffer, u16::from(next.is_some()), next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.announce(head);
        head
    }

    /// Makes a chain in an indirect table at `table` available; returns its head.
    pub fn push_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        let last = buffers.len() as u16 - 1;
        for (n, buffer) in (0..).zip(buffers) {
            self.write_descriptor(table, n, *buffer, u16::from(n < last), n + 1);
        }
        let head = self.free.pop().expect("a free descriptor");
        let buffer = Buffer::readable(table, 16 * buffers.len() as u32);
        self.write_descriptor(self.descriptors, head, buffer, 4, 0);
        self.chains[usize::from(head)] = vec![head];
        self.announce(head);
        head
    }

    /// Puts a head on the available ring.
    pub fn announce(&mut self, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.ram.write_u16(slot, head).expect("ring in RAM");
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Writes the available index.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.ram.store_u16(self.available + 2, index, Ordering::Release).expect("ring in RAM");
        fence(Ordering::SeqCst);
    }

    /// Writes the available ring's flags; 1 suppresses interrupts.
    pub fn set_available_flags(&self, flags: u16) {
        self.ram.store_u16(self.available, flags, Ordering::SeqCst).expect("ring in RAM");
    }

    /// With EVENT_IDX: asks for an interrupt when the used index passes `index`.
    pub fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + 2 * u64::from(self.size);
        self.ram.store_u16(at, index, Ordering::SeqCst).expect("ring in RAM");
    }

    /// With EVENT_IDX: the available index after which the device wants a doorbell.
    pub fn available_event(&self) -> u16 {
        let at = self.used + 4 + 8 * u64::from(self.size);
        self.ram.load_u16(at, Ordering::SeqCst).expect("ring in RAM")
    }

    /// The used ring's flags; 1 means that the device wants no doorbell.
    pub fn used_flags(&self) -> u16 {
        self.ram.load_u16(self.used, Ordering::SeqCst).expect("ring in RAM")
    }

    /// The used index.
    pub fn used_index(&self) -> u16 {
        self.ram.load_u16(self.used + 2, Ordering::Acquire).expect("ring in RAM")
    }

    /// The next chain the device has given back, as (head, bytes written).
    ///
    /// # Panics
    /// The device gave back a head it was not given.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let element = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let head = self.ram.read_u32(element).expect("ring in RAM");
        let written = self.ram.read_u32(element + 4).expect("ring in RAM");
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).ok().filter(|head| *head < self.size).expect("a used head of this queue");
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "head {head} was not out");
        self.free.extend(chain);
        Some((head, written))
    }

    /// Waits for the next chain the device gives back.
    ///
    /// # Panics
    /// None comes within [`PATIENCE`].
    pub fn wait_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "the device gives nothing back");
            std::thread::yield_now();
        }
    }
}
