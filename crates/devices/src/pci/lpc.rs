//! `lpc`: the bridge to the ISA devices. In configuration space it holds the PIRQ routing registers; the ISA devices
//! themselves are the chipset's.

use std::path::Path;
use std::sync::Arc;

use config::NodeRef;
use platform::state::{decode, encode};
use platform::{AccessSize, Persist, StateError};

use super::intx::{IntxRouter, LINKS};
use super::{FunctionSpec, Identity, PciDevice, PciFunction, regs};
use crate::factory::{BuildContext, DeviceError, PciFactory};

/// How to make the LPC bridge.
pub const FACTORY: PciFactory =
    PciFactory { name: "lpc", help: "LPC bridge with serial ports and boot ROM (-l); bus 0 only", build };

const VENDOR: u16 = 0x8086;
const DEVICE: u16 = 0x7000;

/// Where the host describes its PCI functions.
const HOST_FUNCTIONS: &str = "/sys/bus/pci/devices";

fn build(context: &BuildContext<'_>, _: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    if context.pci.functions().iter().any(|function| platform::Persist::kind(&**function) == KIND) {
        return Err(DeviceError::Other("Only one LPC bridge is allowed.".into()));
    }
    if context.address.bus != 0 {
        return Err(DeviceError::Other("LPC bridge can be present only on bus 0.".into()));
    }
    let spec = FunctionSpec::new(identity(context.config, Path::new(HOST_FUNCTIONS))?);
    let bridge = Lpc { router: context.pci.router().clone() };
    Ok(PciFunction::new(context.pci.endpoint(context.address, spec), Arc::new(bridge)))
}

/// The ids: `lpc.pcireg.*`, each a number or `host` for that of the host's own ISA bridge.
fn identity(config: &config::Config, host_functions: &Path) -> Result<Identity, DeviceError> {
    let id = |key: &str, file: &str, max: u16, default| -> Result<u16, DeviceError> {
        let path = format!("lpc.pcireg.{key}");
        if config.get_str(&path).as_deref() != Some("host") {
            return Ok(config.int_or(&path, 0..=max, default)?);
        }
        host_bridge_id(host_functions, file).ok_or_else(|| {
            DeviceError::Other(format!(
                "{path}=host: cannot find an ISA bridge of this host in {HOST_FUNCTIONS}: give a number"
            ))
        })
    };
    Ok(Identity {
        vendor: id("vendor", "vendor", u16::MAX, VENDOR)?,
        device: id("device", "device", u16::MAX, DEVICE)?,
        revision: id("revid", "revision", 0xff, 0)? as u8,
        subsystem_vendor: id("subvendor", "subsystem_vendor", u16::MAX, 0)?,
        subsystem: id("subdevice", "subsystem_device", u16::MAX, 0)?,
        class: regs::class::ISA_BRIDGE,
    })
}

/// A number from the host's description of its first ISA bridge.
fn host_bridge_id(host_functions: &Path, file: &str) -> Option<u16> {
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    let mut bridges: Vec<_> = std::fs::read_dir(host_functions)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| read(&path.join("class")).is_some_and(|class| class >> 8 == 0x0601))
        .collect();
    bridges.sort();
    u16::try_from(read(&bridges.first()?.join(file))?).ok()
}

const KIND: &str = "lpc";
const VERSION: u32 = 1;
/// Registers of links A–D and E–H.
const PIRQ_A: u16 = 0x60;
const PIRQ_E: u16 = 0x68;

struct Lpc {
    router: Arc<IntxRouter>,
}

/// The PIRQ link whose register is at `offset`.
fn link_at(offset: u16) -> Option<usize> {
    match offset {
        PIRQ_A..0x64 => Some(usize::from(offset - PIRQ_A)),
        PIRQ_E..0x6c => Some(usize::from(offset - PIRQ_E) + 4),
        _ => None,
    }
}

impl PciDevice for Lpc {
    fn bar_read(&self, _: usize, _: u64, _: AccessSize) -> u64 {
        u64::MAX
    }

    fn bar_write(&self, _: usize, _: u64, _: AccessSize, _: u64) {}

    fn config_read(&self, offset: u16, size: AccessSize) -> Option<u32> {
        // Both groups of registers are whole aligned dwords, so an aligned access is inside one or outside all.
        let first = link_at(offset)?;
        let bytes = (first..first + size.bytes() as usize).rev();
        Some(bytes.fold(0, |value, link| value << 8 | u32::from(self.router.register(link))))
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) -> bool {
        let Some(first) = link_at(offset) else { return false };
        for (link, byte) in (first..).zip(value.to_le_bytes()).take(size.bytes() as usize) {
            self.router.set_register(link, byte);
        }
        true
    }
}

impl Persist for Lpc {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode(KIND, &self.router.registers())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let registers: [u8; LINKS] = decode(KIND, VERSION, version, bytes)?;
        self.router.restore_registers(registers);
        Ok(())
    }

    fn reset(&self) {
        self.router.reset_registers();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_from_keys_or_from_the_host() {
        let mut config = config::Config::new(config::NoWarnings);
        let functions = tempfile::tempdir().unwrap();
        assert_eq!(identity(&config, functions.path()).unwrap().device, DEVICE);

        config.set("lpc.pcireg.device", "host").unwrap();
        config.set("lpc.pcireg.revid", "0x31").unwrap();
        let error = identity(&config, functions.path()).unwrap_err().to_string();
        assert!(error.starts_with("lpc.pcireg.device=host: cannot find an ISA bridge"), "{error}");

        for (name, class, device) in [("0000:00:02.0", "0x030000", "0x1111"), ("0000:00:1f.0", "0x060100", "0xa30e")] {
            let dir = functions.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("class"), class).unwrap();
            std::fs::write(dir.join("device"), format!("{device}\n")).unwrap();
        }
        let found = identity(&config, functions.path()).unwrap();
        assert_eq!((found.vendor, found.device, found.revision), (VENDOR, 0xa30e, 0x31));

        config.set("lpc.pcireg.revid", "0x100").unwrap();
        assert!(identity(&config, functions.path()).is_err());
    }
}
