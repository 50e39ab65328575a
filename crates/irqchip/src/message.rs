//! Interrupt messages: what I/O APICs, devices (MSI) and local APICs send to local APICs.

use platform::MsiMessage;

/// What a message does to the processor that takes it (SDM vol. 3, 11.6.1, ICR bits 10:8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliveryMode {
    /// An interrupt with the message's vector.
    Fixed,
    /// Like `Fixed`, to whichever of the addressed processors runs at the lowest priority.
    LowestPriority,
    /// System management interrupt; accepted and ignored.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is the page of the entry point.
    Startup,
    /// An interrupt whose vector the 8259 pair supplies.
    ExtInt,
}

impl DeliveryMode {
    /// Decodes the three bits of an ICR, LVT, redirection-table or MSI data register; `None` for the reserved value 3.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// How an interrupt was signalled; level-triggered ones are acknowledged to the I/O APIC at EOI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TriggerMode {
    /// One event.
    Edge,
    /// A state that lasts until it is served.
    Level,
}

impl TriggerMode {
    pub(crate) fn from_bit(level: bool) -> Self {
        if level { Self::Level } else { Self::Edge }
    }
}

/// Which local APICs a message is for (SDM vol. 3, 11.6.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// The one with this APIC ID.
    Physical(u32),
    /// Those whose logical destination register matches.
    Logical(u32),
    /// All.
    Broadcast,
}

impl Destination {
    /// From an I/O APIC or MSI: 8 bits, of which all ones is a broadcast, or up to 15 bits with the extension.
    pub(crate) fn from_device(id: u32, logical: bool) -> Self {
        Self::decode(id, logical, 0xff)
    }

    pub(crate) fn decode(id: u32, logical: bool, broadcast: u32) -> Self {
        match logical {
            _ if id == broadcast => Self::Broadcast,
            true => Self::Logical(id),
            false => Self::Physical(id),
        }
    }
}

/// One interrupt message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// What it does.
    pub mode: DeliveryMode,
    /// Vector; without meaning for NMI, INIT, SMI and ExtINT.
    pub vector: u8,
    /// How it was signalled.
    pub trigger: TriggerMode,
}

impl Message {
    /// Decodes an MSI (SDM vol. 3, 11.11): `None` if the address is not in 0xFEExxxxx or the delivery mode is reserved.
    ///
    /// With `extended_ids`, address bits 11:5 are bits 14:8 of the destination, as CPUID leaf 0x40000001 (EAX bit 0 of
    /// bhyve's) promises to the guest. A redirection hint makes a fixed interrupt a lowest-priority one.
    pub fn from_msi(msi: MsiMessage, extended_ids: bool) -> Option<Self> {
        const DESTINATION_LOGICAL: u64 = 1 << 2;
        const REDIRECTION_HINT: u64 = 1 << 3;
        if msi.address >> 20 != 0xfee {
            return None;
        }
        let mut id = (msi.address >> 12) as u32 & 0xff;
        if extended_ids {
            id |= ((msi.address >> 5) as u32 & 0x7f) << 8;
        }
        let mode = match DeliveryMode::from_bits(msi.data >> 8)? {
            DeliveryMode::Fixed if msi.address & REDIRECTION_HINT != 0 => DeliveryMode::LowestPriority,
            DeliveryMode::Startup => return None,
            mode => mode,
        };
        Some(Self {
            destination: Destination::from_device(id, msi.address & DESTINATION_LOGICAL != 0),
            mode,
            vector: msi.data as u8,
            trigger: TriggerMode::from_bit(msi.data & 1 << 15 != 0),
        })
    }
}

/// Whoever takes messages to local APICs.
pub trait MessageSink: Send + Sync {
    /// Delivers a message; returns whether any local APIC took it.
    fn deliver(&self, message: &Message) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(address: u64, data: u32, extended: bool) -> Option<Message> {
        Message::from_msi(MsiMessage { address, data }, extended)
    }

    #[test]
    fn msi_addresses_and_data() {
        let plain = Message {
            destination: Destination::Physical(3),
            mode: DeliveryMode::Fixed,
            vector: 0x41,
            trigger: TriggerMode::Edge,
        };
        assert_eq!(decode(0xfee0_3000, 0x41, false), Some(plain));
        let logical = decode(0xfee0_300c, 0xc141, false).unwrap();
        assert_eq!(logical.destination, Destination::Logical(3));
        assert_eq!((logical.mode, logical.trigger), (DeliveryMode::LowestPriority, TriggerMode::Level));
        assert_eq!(decode(0xfee0_3008, 0x41, false).unwrap().mode, DeliveryMode::LowestPriority);
        assert_eq!(decode(0xfeef_f000, 0x41, false).unwrap().destination, Destination::Broadcast);
        assert_eq!(decode(0xfee0_3000, 0x400, false).unwrap().mode, DeliveryMode::Nmi);
        assert_eq!(decode(0xfee0_3000, 0x341, false), None, "reserved delivery mode");
        assert_eq!(decode(0xfed0_3000, 0x41, false), None);
        assert_eq!(decode(0x1_fee0_3000, 0x41, false), None);
    }

    #[test]
    fn extended_destination_ids() {
        assert_eq!(decode(0xfee0_3fe0, 0x41, true).unwrap().destination, Destination::Physical(0x7f03));
        assert_eq!(decode(0xfee0_3fe0, 0x41, false).unwrap().destination, Destination::Physical(3));
        assert_eq!(decode(0xfeef_f020, 0x41, true).unwrap().destination, Destination::Physical(0x1ff));
    }
}
