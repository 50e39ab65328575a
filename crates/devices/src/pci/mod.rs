//! PCI: configuration space, base address registers, interrupts, and the host that joins functions to the buses.
//!
//! | module | what it does |
//! |---|---|
//! | [`host`] | which functions exist; ports 0xCF8–0xCFF and memory-mapped configuration |
//! | [`spec`] | what a function is: identity, BARs, capabilities |
//! | [`endpoint`] | what all functions share: configuration space, BARs, MSI, MSI-X, interrupt pin |
//! | [`function`] | [`PciDevice`], the trait behind a function |
//! | [`bar`], [`resources`] | base address registers and their start addresses |
//! | [`intx`] | interrupt pins and their routing |
//! | [`hostbridge`], [`lpc`] | the two bridges every board has |
//!
//! A device is made in three steps: [`PciHost::endpoint`] gives the device its endpoint, the device is constructed with
//! it, [`PciFunction::new`] joins the two and [`PciHost::add`] takes the function.

pub mod bar;
mod chipset;
mod config_space;
pub mod endpoint;
pub mod function;
pub mod host;
pub mod hostbridge;
pub mod intx;
pub mod lpc;
mod mapper;
mod msi;
mod msix;
mod pciexbar;
pub mod regs;
pub mod resources;
pub mod spec;
#[cfg(test)]
mod tests;

pub use bar::{Bar, BarKind};
pub use chipset::Chipset;
pub use config::pci::PciAddress;
pub use endpoint::PciEndpoint;
pub use function::{PciDevice, PciFunction};
pub use host::{PciError, PciHost, PciHostOptions};
pub use intx::{IntxRouter, PinRoute, Routing};
pub use resources::BusWindows;
pub use spec::{Capability, FunctionSpec, Identity, PcieKind};
