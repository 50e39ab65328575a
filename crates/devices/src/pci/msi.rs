//! Message-signalled interrupts (PCI 3.0, 6.8.1): the capability, 64-bit addresses, no per-vector masks.

use platform::MsiMessage;

use super::config_space::ConfigSpace;
use super::regs;

const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;
const DATA: u16 = 12;

const ENABLE: u16 = 1;
const ADDRESS_64: u16 = 1 << 7;
/// Multiple message enable: log2 of the number of messages the guest granted.
const GRANTED: u16 = 7 << 4;

/// Where a function's MSI capability is and how many messages it asks for.
#[derive(Clone, Copy)]
pub(crate) struct Msi {
    at: u16,
    log2_messages: u16,
}

impl Msi {
    /// Adds a capability that asks for `messages`, rounded up to a power of two, at most 32.
    pub(crate) fn add(space: &mut ConfigSpace, messages: u8) -> Self {
        let log2_messages = u16::from(messages.clamp(1, 32)).next_power_of_two().trailing_zeros() as u16;
        let mut body = [0; 12];
        body[..2].copy_from_slice(&(ADDRESS_64 | log2_messages << 1).to_le_bytes());
        let mut writable = [0; 12];
        writable[..2].copy_from_slice(&(ENABLE | GRANTED).to_le_bytes());
        writable[2..10].copy_from_slice(&(!3u64).to_le_bytes());
        writable[10..12].copy_from_slice(&[0xff, 0xff]);
        Self { at: space.add_capability(regs::capability::MSI, &body, &writable), log2_messages }
    }

    pub(crate) fn offset(&self) -> u16 {
        self.at
    }

    pub(crate) fn enabled(&self, space: &ConfigSpace) -> bool {
        space.u16(self.at + CONTROL) & ENABLE != 0
    }

    /// The message of `vector`. With fewer messages granted than asked for, vectors share them from the start.
    pub(crate) fn message(&self, space: &ConfigSpace, vector: u16) -> Option<MsiMessage> {
        if !self.enabled(space) {
            return None;
        }
        let granted = ((space.u16(self.at + CONTROL) & GRANTED) >> 4).min(self.log2_messages);
        let mask = (1u16 << granted) - 1;
        let low = u64::from(space.u32(self.at + ADDRESS));
        let high = u64::from(space.u32(self.at + ADDRESS + 4));
        let data = space.u16(self.at + DATA) & !mask | vector & mask;
        Some(MsiMessage { address: high << 32 | low, data: u32::from(data) })
    }
}

#[cfg(test)]
mod tests {
    use platform::AccessSize;

    use super::*;

    #[test]
    fn vectors_share_the_messages_granted() {
        let mut space = ConfigSpace::new();
        let msi = Msi::add(&mut space, 3);
        assert_eq!(space.u16(msi.at + CONTROL), ADDRESS_64 | 2 << 1, "asks for four");
        space.write(msi.at + ADDRESS, AccessSize::Dword, 0xfee0_1003);
        space.write(msi.at + DATA, AccessSize::Word, 0x4031);
        assert_eq!(msi.message(&space, 1), None, "not enabled");

        space.write(msi.at + CONTROL, AccessSize::Word, u32::from(ENABLE));
        assert_eq!(msi.message(&space, 3), Some(MsiMessage { address: 0xfee0_1000, data: 0x4031 }));
        space.write(msi.at + CONTROL, AccessSize::Word, u32::from(ENABLE | 2 << 4));
        assert_eq!(msi.message(&space, 2).unwrap().data, 0x4032);
        space.write(msi.at + CONTROL, AccessSize::Word, u32::from(ENABLE | GRANTED));
        assert_eq!(msi.message(&space, 7).unwrap().data, 0x4033, "a grant beyond what was asked for counts as that");
    }
}
