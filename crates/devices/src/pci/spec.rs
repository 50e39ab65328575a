//! The description from which a function's configuration space is built.

use super::bar::{BARS, Bar};
use super::regs;

/// Who a function says it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: (u8, u8, u8),
}

/// What a PCI Express capability says a function is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PcieKind {
    /// Root port; on a host bridge it is what makes guests use memory-mapped configuration.
    RootPort,
    /// Endpoint integrated into the root complex, as every endpoint on bus 0 is.
    IntegratedEndpoint,
}

/// A capability, in the order in which they are chained from 0x40.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Capability {
    /// PCI Express.
    Pcie(PcieKind),
    /// MSI with up to so many messages.
    Msi(u8),
    /// MSI-X with so many vectors; the table fills a 32-bit memory BAR of its own, which this makes.
    Msix {
        /// Entries of the table, 1 to 2048.
        vectors: u16,
        /// The BAR.
        bar: usize,
    },
    /// A capability of the device's own.
    Own {
        /// Capability id.
        id: u8,
        /// What follows id and link.
        body: Vec<u8>,
        /// Which bits of it the guest can write.
        writable: Vec<u8>,
    },
}

/// A function to be: identity, BARs, capabilities, whether it uses an interrupt pin.
#[derive(Clone, Debug)]
pub struct FunctionSpec {
    /// Who it is.
    pub identity: Identity,
    /// Its base address registers. A 64-bit BAR takes its register and the next, which stays `None`.
    pub bars: [Option<Bar>; BARS],
    /// Its capabilities.
    pub capabilities: Vec<Capability>,
    /// Whether it is connected to an interrupt pin of its slot.
    pub intx: bool,
}

impl FunctionSpec {
    /// A function without BARs, capabilities and interrupt pin.
    pub fn new(identity: Identity) -> Self {
        Self { identity, bars: [None; BARS], capabilities: Vec::new(), intx: false }
    }

    /// With BAR `index`.
    #[must_use]
    pub fn with_bar(mut self, index: usize, bar: Bar) -> Self {
        self.bars[index] = Some(bar);
        self
    }

    /// With one more capability.
    #[must_use]
    pub fn with_capability(mut self, capability: Capability) -> Self {
        self.capabilities.push(capability);
        self
    }

    /// With an interrupt pin.
    #[must_use]
    pub fn with_intx(mut self) -> Self {
        self.intx = true;
        self
    }
}

/// The body of a PCI Express capability, version 2 (PCI Express 3.0, 7.8): a 2.5 GT/s x1 link unless the function is
/// integrated.
pub(crate) fn pcie_body(kind: PcieKind) -> [u8; 58] {
    const LINK_CAPABILITIES: usize = 0x0c;
    const LINK_STATUS: usize = 0x12;
    let kind_bits: u16 = match kind {
        PcieKind::RootPort => 4,
        PcieKind::IntegratedEndpoint => 9,
    };
    let mut whole = [0; 60];
    whole[2..4].copy_from_slice(&(2 | kind_bits << 4).to_le_bytes());
    if kind == PcieKind::RootPort {
        whole[LINK_CAPABILITIES..LINK_CAPABILITIES + 4].copy_from_slice(&0x411u32.to_le_bytes());
        whole[LINK_STATUS..LINK_STATUS + 2].copy_from_slice(&0x11u16.to_le_bytes());
    }
    let mut body = [0; 58];
    body.copy_from_slice(&whole[2..]);
    body
}

impl Identity {
    pub(crate) fn install(&self, space: &mut super::config_space::ConfigSpace) {
        let (class, subclass, prog_if) = self.class;
        space.set(regs::VENDOR_ID, &self.vendor.to_le_bytes());
        space.set(regs::DEVICE_ID, &self.device.to_le_bytes());
        space.set(regs::REVISION, &[self.revision, prog_if, subclass, class]);
        space.set(regs::SUBSYSTEM_VENDOR, &self.subsystem_vendor.to_le_bytes());
        space.set(regs::SUBSYSTEM, &self.subsystem.to_le_bytes());
    }
}
