//! Which board the host bridge says it is on. Firmware decides by its ids where it looks for power management.

use config::pci::PciAddress;
use config::{ConfigError, NodeRef};

/// A board.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Chipset {
    /// bhyve's own.
    #[default]
    Bhyve,
    /// QEMU's `pc`: Intel 440FX with PIIX4 power management.
    I440fx,
    /// QEMU's `q35`: Intel Q35 with ICH9.
    Q35,
}

/// The power-management block's first port, with the bit that says that these are ports.
const PM_BASE: [u8; 4] = [0x01, 0x04, 0, 0];

impl Chipset {
    /// The values of the configuration key, in the order of the numbers.
    pub const NAMES: [&'static str; 3] = ["bhyve", "i440fx", "q35"];

    /// The board with a number.
    pub fn from_number(number: usize) -> Self {
        match number {
            1 => Self::I440fx,
            2 => Self::Q35,
            _ => Self::Bhyve,
        }
    }

    /// What a host bridge's node of the configuration says, if it does.
    ///
    /// # Errors
    /// It names no board.
    pub fn from_node(node: &NodeRef<'_>) -> Result<Option<Self>, ConfigError> {
        Ok(node.get_word("compat", &Self::NAMES)?.map(Self::from_number))
    }

    /// Where RAM below 4 GiB has to end with `size` bytes of RAM in all, if it may not go on to where bhyve's ends: firmware for
    /// the Q35 puts memory-mapped configuration at 0xB000_0000.
    pub fn low_memory_limit(self, size: u64) -> Option<u64> {
        const FIRMWARE_ECAM: u64 = 0xb000_0000;
        (self == Self::Q35 && size > FIRMWARE_ECAM).then_some(2 << 30)
    }

    /// Vendor and device of the host bridge.
    pub fn host_bridge(self) -> (u16, u16) {
        match self {
            Self::Bhyve => (0x1275, 0x1275),
            Self::I440fx => (0x8086, 0x1237),
            Self::Q35 => (0x8086, 0x29c0),
        }
    }

    /// Configuration registers that say where power management is, and that it is enabled. They do not move: firmware that
    /// finds the block enabled uses it where it is. On the 440FX board nothing else of their function is there, so that guests
    /// do not see a function.
    pub(super) fn power_management(self, address: PciAddress, register: u16) -> Option<u8> {
        let (slot, func, enable) = match self {
            Self::Bhyve => return None,
            Self::I440fx => (1, 3, (0x80, 0x01)),
            Self::Q35 => (0x1f, 0, (0x44, 0x80)),
        };
        if (address.bus, address.slot, address.func) != (0, slot, func) {
            return None;
        }
        match register {
            0x40..0x44 => Some(PM_BASE[usize::from(register - 0x40)]),
            _ if register == enable.0 => Some(enable.1),
            _ => None,
        }
    }
}
