//! The register map of the local APIC, common to both of its modes (SDM vol. 3, tables 11-1 and 11-6).
//!
//! A register's index is its offset in the xAPIC page divided by 16, and its x2APIC MSR minus 0x800.

/// A register, named as in the SDM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Register {
    Id,
    Version,
    TaskPriority,
    ArbitrationPriority,
    ProcessorPriority,
    Eoi,
    RemoteRead,
    LogicalDestination,
    DestinationFormat,
    SpuriousVector,
    /// One word of the in-service register, 0 to 7.
    InService(u8),
    /// One word of the trigger-mode register.
    TriggerMode(u8),
    /// One word of the interrupt-request register.
    InterruptRequest(u8),
    ErrorStatus,
    IcrLow,
    IcrHigh,
    Lvt(LocalSource),
    InitialCount,
    CurrentCount,
    DivideConfiguration,
    SelfIpi,
}

impl Register {
    /// The register with an index; `None` where there is none.
    pub(super) fn from_index(index: u32) -> Option<Self> {
        Some(match index {
            0x02 => Self::Id,
            0x03 => Self::Version,
            0x08 => Self::TaskPriority,
            0x09 => Self::ArbitrationPriority,
            0x0a => Self::ProcessorPriority,
            0x0b => Self::Eoi,
            0x0c => Self::RemoteRead,
            0x0d => Self::LogicalDestination,
            0x0e => Self::DestinationFormat,
            0x0f => Self::SpuriousVector,
            0x10..=0x17 => Self::InService((index & 7) as u8),
            0x18..=0x1f => Self::TriggerMode((index & 7) as u8),
            0x20..=0x27 => Self::InterruptRequest((index & 7) as u8),
            0x28 => Self::ErrorStatus,
            0x2f => Self::Lvt(LocalSource::Cmci),
            0x30 => Self::IcrLow,
            0x31 => Self::IcrHigh,
            0x32 => Self::Lvt(LocalSource::Timer),
            0x33 => Self::Lvt(LocalSource::Thermal),
            0x34 => Self::Lvt(LocalSource::Performance),
            0x35 => Self::Lvt(LocalSource::Lint0),
            0x36 => Self::Lvt(LocalSource::Lint1),
            0x37 => Self::Lvt(LocalSource::Error),
            0x38 => Self::InitialCount,
            0x39 => Self::CurrentCount,
            0x3e => Self::DivideConfiguration,
            0x3f => Self::SelfIpi,
            _ => return None,
        })
    }

    /// Whether the register exists in xAPIC mode.
    pub(super) fn in_xapic(self) -> bool {
        self != Self::SelfIpi
    }

    /// Whether RDMSR may read the register in x2APIC mode.
    pub(super) fn x2apic_readable(self) -> bool {
        !matches!(
            self,
            Self::ArbitrationPriority
                | Self::RemoteRead
                | Self::DestinationFormat
                | Self::IcrHigh
                | Self::Eoi
                | Self::SelfIpi
        )
    }

    /// The bits that WRMSR may set in x2APIC mode; `None` if the register cannot be written.
    pub(super) fn x2apic_writable(self, features: &Features) -> Option<u64> {
        Some(match self {
            Self::TaskPriority | Self::SelfIpi => 0xff,
            Self::Eoi | Self::ErrorStatus => 0,
            Self::SpuriousVector => u64::from(features.svr_mask()),
            Self::Lvt(source) => u64::from(source.writable(features)),
            Self::InitialCount => 0xffff_ffff,
            Self::DivideConfiguration => 0xb,
            Self::IcrLow => 0xffff_ffff_0000_0000 | u64::from(icr::WRITABLE | icr::DELIVERY_STATUS),
            _ => return None,
        })
    }
}

/// What an interrupt from inside the processor comes from: the entries of the local vector table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum LocalSource {
    /// The APIC timer.
    Timer = 0,
    /// The thermal sensor.
    Thermal = 1,
    /// Overflow of a performance counter.
    Performance = 2,
    /// Pin LINT0: the 8259 pair.
    Lint0 = 3,
    /// Pin LINT1: NMI.
    Lint1 = 4,
    /// An error the APIC itself has found.
    Error = 5,
    /// Corrected machine-check errors.
    Cmci = 6,
}

/// Number of entries in the local vector table.
pub const LVT_ENTRIES: usize = 7;

impl LocalSource {
    /// The bits of the entry that software may write.
    pub(super) fn writable(self, features: &Features) -> u32 {
        let specific = match self {
            Self::Timer if features.tsc_deadline => 3 << 17,
            Self::Timer => 1 << 17,
            Self::Lint0 | Self::Lint1 => lvt::DELIVERY_MODE | lvt::POLARITY | lvt::LEVEL,
            Self::Thermal | Self::Performance | Self::Cmci => lvt::DELIVERY_MODE,
            Self::Error => 0,
        };
        specific | lvt::MASKED | lvt::VECTOR
    }
}

/// Optional features, which change what registers hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// x2APIC mode (CPUID.1:ECX bit 21).
    pub x2apic: bool,
    /// TSC-deadline mode of the timer (CPUID.1:ECX bit 24).
    pub tsc_deadline: bool,
    /// EOIs of level-triggered interrupts need not be broadcast (version register bit 24); I/O APICs must then have an
    /// EOI register.
    pub eoi_suppression: bool,
}

impl Features {
    pub(super) fn svr_mask(&self) -> u32 {
        if self.eoi_suppression { svr::WRITABLE | svr::SUPPRESS_EOI_BROADCAST } else { svr::WRITABLE }
    }

    /// The version register: an integrated APIC with seven LVT entries.
    pub(super) fn version(&self) -> u32 {
        const INTEGRATED: u32 = 0x14;
        INTEGRATED | ((LVT_ENTRIES as u32 - 1) << 16) | u32::from(self.eoi_suppression) << 24
    }
}

/// Bits of the spurious-interrupt vector register.
pub(super) mod svr {
    pub(crate) const ENABLED: u32 = 1 << 8;
    pub(crate) const SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
    /// Vector, enable and focus-processor checking.
    pub(crate) const WRITABLE: u32 = 0x3ff;
    pub(crate) const RESET: u32 = 0xff;
}

/// Bits of local vector table entries.
pub(super) mod lvt {
    pub(crate) const VECTOR: u32 = 0xff;
    pub(crate) const DELIVERY_MODE: u32 = 7 << 8;
    pub(crate) const POLARITY: u32 = 1 << 13;
    pub(crate) const REMOTE_IRR: u32 = 1 << 14;
    pub(crate) const LEVEL: u32 = 1 << 15;
    pub(crate) const MASKED: u32 = 1 << 16;
    pub(crate) const TIMER_MODE_SHIFT: u32 = 17;
    /// Delivery mode ExtINT, unmasked.
    pub(crate) const EXT_INT: u32 = 7 << 8;
}

/// Bits of the interrupt command register's low half.
pub(super) mod icr {
    pub(crate) const DESTINATION_LOGICAL: u32 = 1 << 11;
    pub(crate) const DELIVERY_STATUS: u32 = 1 << 12;
    pub(crate) const ASSERT: u32 = 1 << 14;
    pub(crate) const LEVEL: u32 = 1 << 15;
    pub(crate) const SHORTHAND_SHIFT: u32 = 18;
    pub(crate) const WRITABLE: u32 = 0xc_cfff;
}

/// Bits of the error status register.
pub(super) mod esr {
    pub(crate) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(crate) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(crate) const ILLEGAL_REGISTER: u32 = 1 << 7;
    pub(crate) const ALL: u32 = 0xff;
}

/// Bits of IA32_APIC_BASE.
pub(super) mod base {
    pub(crate) const BSP: u64 = 1 << 8;
    pub(crate) const X2APIC: u64 = 1 << 10;
    pub(crate) const ENABLED: u64 = 1 << 11;
    pub(crate) const RESET_ADDRESS: u64 = 0xfee0_0000;
    /// The page's address: bits 51:12, less what the processor does not implement.
    pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Vectors below this are reserved for exceptions.
pub(super) const FIRST_VECTOR: u8 = 16;
