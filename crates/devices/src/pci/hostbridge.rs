//! `hostbridge`: the function at 0:0.0. Its PCI Express capability makes guests use memory-mapped configuration, its ids tell
//! firmware what board it runs on. `amd_hostbridge` is the same device with other ids. As a Q35's it has no capability, but the
//! register that says where memory-mapped configuration is.

use std::sync::Arc;

use config::NodeRef;
use platform::state::{decode, encode};
use platform::{AccessSize, Persist, StateError};

use super::pciexbar::PciExBar;
use super::{Capability, Chipset, FunctionSpec, Identity, PciDevice, PciFunction, PcieKind, regs};
use crate::factory::{BuildContext, DeviceError, PciFactory};

/// How to make a host bridge.
pub const FACTORY: PciFactory =
    PciFactory { name: "hostbridge", help: "host bridge; vendor=ID, devid=ID, compat=bhyve|i440fx|q35", build };

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    if let Some(chipset) = Chipset::from_node(node)? {
        context.pci.set_chipset(chipset);
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
    let spec = FunctionSpec::new(identity);
    let (spec, pciexbar) = match context.pci.chipset() {
        Chipset::Q35 => (spec, Some(context.pci.pciexbar(context.address))),
        _ => (spec.with_capability(Capability::Pcie(PcieKind::RootPort)), None),
    };
    Ok(PciFunction::new(context.pci.endpoint(context.address, spec), Arc::new(HostBridge { pciexbar })))
}

const KIND: &str = "hostbridge";
const VERSION: u32 = 2;

struct HostBridge {
    /// Only a Q35's has it.
    pciexbar: Option<PciExBar>,
}

impl Persist for HostBridge {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode(KIND, &self.pciexbar.as_ref().map(PciExBar::value))
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let value: Option<u64> = decode(KIND, VERSION, version, bytes)?;
        if let (Some(register), Some(value)) = (&self.pciexbar, value) {
            register.set_value(value);
        }
        Ok(())
    }

    fn reset(&self) {
        if let Some(register) = &self.pciexbar {
            register.set_value(0);
        }
    }
}

impl PciDevice for HostBridge {
    fn bar_read(&self, _: usize, _: u64, _: AccessSize) -> u64 {
        u64::MAX
    }

    fn bar_write(&self, _: usize, _: u64, _: AccessSize, _: u64) {}

    fn config_read(&self, offset: u16, size: AccessSize) -> Option<u32> {
        self.pciexbar.as_ref()?.config_read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) -> bool {
        self.pciexbar.as_ref().is_some_and(|register| register.config_write(offset, size, value))
    }
}
