//! `hostbridge`: the function at 0:0.0. It does nothing; its PCI Express capability makes guests use memory-mapped
//! configuration, its ids tell firmware what board it runs on. `amd_hostbridge` is the same device with other ids.

use std::sync::Arc;

use config::NodeRef;
use platform::{AccessSize, Persist, StateError};

use super::{Capability, Chipset, FunctionSpec, Identity, PciDevice, PciFunction, PcieKind, regs};
use crate::factory::{BuildContext, DeviceError, PciFactory};

/// How to make a host bridge.
pub const FACTORY: PciFactory =
    PciFactory { name: "hostbridge", help: "host bridge; vendor=ID, devid=ID, compat=bhyve|i440fx|q35", build };

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    if let Some(number) = node.get_word("compat", &Chipset::NAMES)? {
        context.pci.set_chipset(Chipset::from_number(number));
    }
    let (vendor, device) = context.pci.chipset().host_bridge();
    // The newer keys and the older ones mean the same; where both are given the newer win.
    let id = |new: &str, old: &str, default| -> Result<u16, DeviceError> {
        Ok(match node.get_int(new, 0..=u16::MAX)? {
            Some(id) => id,
            None => node.int_or(old, 0..=u16::MAX, default)?,
        })
    };
    let identity = Identity {
        vendor: id("pcireg.vendor", "vendor", vendor)?,
        device: id("pcireg.device", "devid", device)?,
        class: regs::class::HOST_BRIDGE,
        ..Identity::default()
    };
    let spec = FunctionSpec::new(identity).with_capability(Capability::Pcie(PcieKind::RootPort));
    Ok(PciFunction::new(context.pci.endpoint(context.address, spec), Arc::new(HostBridge)))
}

/// The bridge: no registers of its own.
struct HostBridge;

impl Persist for HostBridge {
    fn kind(&self) -> &'static str {
        "hostbridge"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        platform::state::decode(self.kind(), self.version(), version, bytes)
    }

    fn reset(&self) {}
}

impl PciDevice for HostBridge {
    fn bar_read(&self, _: usize, _: u64, _: AccessSize) -> u64 {
        u64::MAX
    }

    fn bar_write(&self, _: usize, _: u64, _: AccessSize, _: u64) {}
}
