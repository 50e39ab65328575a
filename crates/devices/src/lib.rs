//! What the guest sees: PCI, chipset, SCSI, virtio.

pub mod chipset;
pub mod factory;
pub mod firmware;
pub mod pci;
pub mod scsi;
#[cfg(test)]
mod testboard;
pub mod virtio;

pub use factory::{BuildContext, DeviceError, PciFactory, factories};
