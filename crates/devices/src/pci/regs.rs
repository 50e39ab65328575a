//! Offsets and bits of configuration space (PCI Local Bus 3.0, chapter 6; PCI Express Base 3.0, chapter 7).
#![allow(missing_docs)]

pub const VENDOR_ID: u16 = 0x00;
pub const DEVICE_ID: u16 = 0x02;
pub const COMMAND: u16 = 0x04;
pub const STATUS: u16 = 0x06;
pub const REVISION: u16 = 0x08;
pub const PROG_IF: u16 = 0x09;
pub const SUBCLASS: u16 = 0x0a;
pub const CLASS: u16 = 0x0b;
pub const CACHE_LINE: u16 = 0x0c;
pub const HEADER_TYPE: u16 = 0x0e;
pub const BAR0: u16 = 0x10;
/// One past the last base address register.
pub const BAR_END: u16 = 0x28;
pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
pub const SUBSYSTEM: u16 = 0x2e;
pub const CAPABILITIES: u16 = 0x34;
pub const INTERRUPT_LINE: u16 = 0x3c;
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Where the chain of capabilities begins.
pub const FIRST_CAPABILITY: u16 = 0x40;
/// Size of the configuration space of conventional PCI; what lies beyond is PCI Express extended space.
pub const CONFIG_SIZE: usize = 256;

pub mod command {
    pub const IO: u16 = 1 << 0;
    pub const MEMORY: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
    pub const PARITY: u16 = 1 << 6;
    pub const SERR: u16 = 1 << 8;
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// What a guest may change.
    pub const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | PARITY | SERR | INTX_DISABLE;
}

pub mod status {
    pub const INTERRUPT: u16 = 1 << 3;
    pub const CAPABILITIES: u16 = 1 << 4;
}

pub mod header {
    pub const MULTI_FUNCTION: u8 = 1 << 7;
}

pub mod bar {
    pub const IO: u32 = 1;
    pub const MEMORY_64: u32 = 4;
    pub const PREFETCHABLE: u32 = 8;
    pub const IO_FLAGS: u32 = 3;
    pub const MEMORY_FLAGS: u32 = 0xf;
}

pub mod capability {
    pub const MSI: u8 = 0x05;
    pub const VENDOR: u8 = 0x09;
    pub const PCIE: u8 = 0x10;
    pub const MSIX: u8 = 0x11;
}

/// Class codes, as (class, subclass, programming interface).
pub mod class {
    pub const HOST_BRIDGE: (u8, u8, u8) = (0x06, 0x00, 0x00);
    pub const ISA_BRIDGE: (u8, u8, u8) = (0x06, 0x01, 0x00);
    pub const STORAGE_SCSI: (u8, u8, u8) = (0x01, 0x00, 0x00);
    pub const COMMUNICATION_OTHER: (u8, u8, u8) = (0x07, 0x80, 0x00);
    pub const INPUT_OTHER: (u8, u8, u8) = (0x09, 0x80, 0x00);
    pub const MEMORY_OTHER: (u8, u8, u8) = (0x05, 0x80, 0x00);
    pub const STORAGE_OTHER: (u8, u8, u8) = (0x01, 0x80, 0x00);
    pub const ETHERNET: (u8, u8, u8) = (0x02, 0x00, 0x00);
    pub const ENCRYPTION: (u8, u8, u8) = (0x10, 0x00, 0x00);
}
