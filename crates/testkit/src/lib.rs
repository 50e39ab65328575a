//! Fakes and drivers for tests: clock, interrupt line, guest memory, the guest's side of virtqueues.
//!
//! | module | what it plays |
//! |---|---|
//! | [`clock`] | a clock that tests move by hand |
//! | [`irq`] | interrupt chips that record what they are told |
//! | [`pci`] | a guest's access to PCI functions |
//! | [`virtqueue`] | a guest's virtio driver |
//! | [`random`] | repeatable random numbers for hostile guests |
//! | [`hostile`] | random drivers of virtio devices |
//! | [`conformance`] | the suite that every PCI device must pass |

pub mod clock;
pub mod conformance;
pub mod hostile;
pub mod irq;
pub mod pci;
pub mod random;
pub mod virtqueue;
