//! The guest's side of PCI: configuration through ports 0xCF8/0xCFC and BARs on the buses.

use std::sync::Arc;

use platform::{AccessSize, Bus};

const ADDRESS_PORT: u64 = 0xcf8;
const DATA_PORT: u64 = 0xcfc;
const COMMAND: u16 = 4;
const STATUS: u16 = 6;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;

/// A PCI function, as a driver in the guest reaches it.
#[derive(Clone)]
pub struct GuestFunction {
    ports: Arc<Bus>,
    memory: Arc<Bus>,
    /// Bus, slot, function.
    address: (u8, u8, u8),
}

/// Where a BAR is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestBar {
    /// Ports, or memory.
    pub io: bool,
    /// First address.
    pub start: u64,
}

impl GuestFunction {
    /// The function at (bus, slot, function).
    pub fn new(ports: Arc<Bus>, memory: Arc<Bus>, address: (u8, u8, u8)) -> Self {
        Self { ports, memory, address }
    }

    fn select(&self, offset: u16) -> u64 {
        let (bus, slot, func) = self.address;
        let address =
            1 << 31 | u64::from(bus) << 16 | u64::from(slot) << 11 | u64::from(func) << 8 | u64::from(offset & 0xfc);
        self.ports.write(ADDRESS_PORT, AccessSize::Dword, address);
        DATA_PORT + u64::from(offset & 3)
    }

    /// Reads configuration space.
    pub fn config(&self, offset: u16, size: AccessSize) -> u32 {
        let port = self.select(offset);
        self.ports.read(port, size).unwrap_or(u64::MAX) as u32
    }

    /// Reads 32 bits of configuration space.
    pub fn config32(&self, offset: u16) -> u32 {
        self.config(offset, AccessSize::Dword)
    }

    /// Writes configuration space.
    pub fn set_config(&self, offset: u16, size: AccessSize, value: u32) {
        let port = self.select(offset);
        self.ports.write(port, size, u64::from(value));
    }

    /// All 256 bytes of configuration space.
    pub fn config_bytes(&self) -> Vec<u8> {
        (0..64).flat_map(|n| self.config32(n * 4).to_le_bytes()).collect()
    }

    /// Writes the COMMAND register.
    pub fn set_command(&self, command: u16) {
        self.set_config(COMMAND, AccessSize::Word, u32::from(command));
    }

    /// Offsets of all capabilities with this id, in the order of the chain.
    ///
    /// # Panics
    /// The chain does not end.
    pub fn capabilities(&self, id: u8) -> Vec<u16> {
        let mut found = Vec::new();
        if self.config(STATUS, AccessSize::Word) & 0x10 == 0 {
            return found;
        }
        let mut at = self.config(CAPABILITIES, AccessSize::Byte) as u16;
        let mut steps = 0;
        while at != 0 {
            let header = self.config32(at);
            if header as u8 == id {
                found.push(at);
            }
            at = u16::from((header >> 8) as u8);
            steps += 1;
            assert!(steps < 64, "the chain of capabilities does not end");
        }
        found
    }

    /// Where BAR `index` is, as its registers say.
    pub fn bar(&self, index: u8) -> GuestBar {
        let at = BAR0 + 4 * u16::from(index);
        let low = self.config32(at);
        if low & 1 != 0 {
            return GuestBar { io: true, start: u64::from(low & !3) };
        }
        let high = if low & 4 != 0 { u64::from(self.config32(at + 4)) } else { 0 };
        GuestBar { io: false, start: high << 32 | u64::from(low & !0xf) }
    }

    fn bus(&self, bar: GuestBar) -> &Bus {
        if bar.io { &self.ports } else { &self.memory }
    }

    /// Reads from a BAR; ones where nothing answers.
    pub fn read(&self, bar: GuestBar, offset: u64, size: AccessSize) -> u64 {
        self.bus(bar).read(bar.start.wrapping_add(offset), size).unwrap_or(size.mask())
    }

    /// Writes to a BAR.
    pub fn write(&self, bar: GuestBar, offset: u64, size: AccessSize, value: u64) {
        self.bus(bar).write(bar.start.wrapping_add(offset), size, value);
    }

    /// Enables MSI-X and makes every vector send `(0xfee00000, first + vector)`. Returns the number of vectors.
    ///
    /// # Panics
    /// The function has no MSI-X.
    pub fn enable_msix(&self, first: u32) -> u16 {
        let at = *self.capabilities(0x11).first().expect("the function has MSI-X");
        let vectors = (self.config(at + 2, AccessSize::Word) & 0x7ff) as u16 + 1;
        let table = self.config32(at + 4);
        let bar = self.bar((table & 7) as u8);
        for vector in 0..vectors {
            let entry = u64::from(table & !7) + 16 * u64::from(vector);
            self.write(bar, entry, AccessSize::Dword, 0xfee0_0000);
            self.write(bar, entry + 4, AccessSize::Dword, 0);
            self.write(bar, entry + 8, AccessSize::Dword, u64::from(first) + u64::from(vector));
            self.write(bar, entry + 12, AccessSize::Dword, 0);
        }
        self.set_config(at + 2, AccessSize::Word, 0x8000);
        vectors
    }
}
