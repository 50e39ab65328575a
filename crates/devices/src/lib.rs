//! What the guest sees: PCI, chipset, virtio, storage.

pub mod chipset;
