//! What the guest sees: PCI, chipset, virtio, storage.

pub mod chipset;
pub mod factory;
pub mod pci;
#[cfg(test)]
mod testboard;
pub mod virtio;

pub use factory::{BuildContext, DeviceError, PciFactory, factories};
