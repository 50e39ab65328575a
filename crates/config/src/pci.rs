//! The PCI functions of a configuration: `pci.BUS.SLOT.FUNC`.

use std::fmt;

use crate::error::ConfigError;
use crate::legacy::{self, DeviceSyntax};
use crate::store::{Config, NodeRef};

/// Highest slot number.
pub const MAX_SLOT: u8 = 31;
/// Highest function number.
pub const MAX_FUNC: u8 = 7;

/// Where a PCI function sits. Orders by bus, slot, function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Slot, 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub func: u8,
}

impl PciAddress {
    /// The address, if slot and function are in range.
    #[must_use]
    pub fn new(bus: u8, slot: u8, func: u8) -> Option<Self> {
        (slot <= MAX_SLOT && func <= MAX_FUNC).then_some(Self { bus, slot, func })
    }

    /// Reads `slot`, `slot:func` or `bus:slot:func`, decimal; missing parts are 0.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = [0; 3];
        let mut count = 0;
        for part in text.split(':') {
            *numbers.get_mut(count)? = decimal(part)?;
            count += 1;
        }
        match (count, numbers) {
            (1, [slot, ..]) => Self::new(0, slot, 0),
            (2, [slot, func, _]) => Self::new(0, slot, func),
            (_, [bus, slot, func]) => Self::new(bus, slot, func),
        }
    }

    /// The path of the function's node.
    #[must_use]
    pub fn path(self) -> String {
        format!("pci.{}.{}.{}", self.bus, self.slot, self.func)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.bus, self.slot, self.func)
    }
}

/// A number up to 255 of decimal digits, as they may stand in a PCI address.
pub(crate) fn decimal(text: &str) -> Option<u8> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// One configured PCI function.
#[derive(Debug, Clone)]
pub struct PciFunction<'a> {
    /// Where it sits.
    pub address: PciAddress,
    /// The emulation: the value of `device`.
    pub device: String,
    /// Its part of the tree.
    pub node: NodeRef<'a>,
}

impl PciFunction<'_> {
    /// An error about this function.
    #[must_use]
    pub fn error(&self, reason: impl Into<String>) -> ConfigError {
        error(self.address, reason)
    }
}

fn error(PciAddress { bus, slot, func }: PciAddress, reason: impl Into<String>) -> ConfigError {
    ConfigError::Pci { bus, slot, func, reason: reason.into() }
}

/// All configured PCI functions by rising address.
///
/// Names below `pci` that are no address in plain decimal are no functions: nothing reads them.
///
/// # Errors
/// A function without `device`, a device that `devices` does not know, or a name that only the command line may use.
pub fn pci_functions<'a>(config: &'a Config, devices: &[DeviceSyntax]) -> Result<Vec<PciFunction<'a>>, ConfigError> {
    let mut functions = Vec::new();
    for (address, node) in nodes(config) {
        let device = node.get_str("device").ok_or_else(|| error(address, "missing \"device\" value"))?;
        match legacy::find(devices, &device) {
            None => return Err(error(address, format!("unknown device \"{device}\""))),
            Some(DeviceSyntax { alias_of: Some(name), .. }) => {
                return Err(error(address, format!("legacy device \"{device}\", use \"{name}\" instead")));
            }
            Some(_) => functions.push(PciFunction { address, device, node }),
        }
    }
    functions.sort_by_key(|function| function.address);
    Ok(functions)
}

fn nodes(config: &Config) -> Vec<(PciAddress, NodeRef<'_>)> {
    let Some(pci) = config.node("pci") else { return Vec::new() };
    let mut found = Vec::new();
    for (bus, bus_node) in pci.nodes() {
        for (slot, slot_node) in bus_node.nodes() {
            for (func, node) in slot_node.nodes() {
                let address = match (canonical(bus), canonical(slot), canonical(func)) {
                    (Some(bus), Some(slot), Some(func)) => PciAddress::new(bus, slot, func),
                    _ => None,
                };
                found.extend(address.map(|address| (address, node)));
            }
        }
    }
    found
}

/// A decimal number without leading zeroes.
fn canonical(text: &str) -> Option<u8> {
    decimal(text).filter(|_| text.len() == 1 || !text.starts_with('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::store::NoWarnings;

    fn listed(keys: &[(&str, &str)]) -> Result<Vec<(String, String)>, Exit> {
        let mut config = Config::new(NoWarnings);
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        let functions = pci_functions(&config, legacy::DEVICES)?;
        Ok(functions.into_iter().map(|f| (f.node.path().to_owned(), f.device)).collect())
    }

    #[test]
    fn addresses() {
        let address = |bus, slot, func| Some(PciAddress { bus, slot, func });
        assert_eq!(PciAddress::parse("3"), address(0, 3, 0));
        assert_eq!(PciAddress::parse("3:1"), address(0, 3, 1));
        assert_eq!(PciAddress::parse("255:31:7"), address(255, 31, 7));
        for text in
            ["", "32", "0:8", "256:0:0", "1:2:3:4", "a", "3:", ":3", "-1", "+1", " 1", "0x3", "999999999999", "٣"]
        {
            assert_eq!(PciAddress::parse(text), None, "{text}");
        }
    }

    #[test]
    fn functions_come_sorted() {
        let found = listed(&[
            ("pci.1.0.0.device", "nvme"),
            ("pci.0.31.0.device", "lpc"),
            ("pci.0.4.1.device", "%(disk)"),
            ("pci.0.4.0.device", "virtio-blk"),
            ("disk", "virtio-rnd"),
            ("pci.0.04.0.device", "ignored"),
            ("pci.0.32.0.device", "ignored"),
            ("pci.note", "ignored"),
        ]);
        let text = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        assert_eq!(
            found,
            Ok(text(&[
                ("pci.0.4.0", "virtio-blk"),
                ("pci.0.4.1", "virtio-rnd"),
                ("pci.0.31.0", "lpc"),
                ("pci.1.0.0", "nvme")
            ]))
        );
        assert_eq!(listed(&[]), Ok(vec![]));
    }

    #[test]
    fn devices_must_be_known_by_their_real_name() {
        let failure = |key: &str, value: &str| {
            let exit = listed(&[(key, value)]).unwrap_err();
            assert_eq!(exit.code, 4);
            exit.stderr
        };
        assert_eq!(
            failure("pci.0.3.0.device", "ahci-cd"),
            "pci slot 0:3:0: legacy device \"ahci-cd\", use \"ahci\" instead\n"
        );
        assert_eq!(failure("pci.1.3.2.device", "tulip"), "pci slot 1:3:2: unknown device \"tulip\"\n");
        assert_eq!(failure("pci.0.3.0.path", "/x"), "pci slot 0:3:0: missing \"device\" value\n");
    }
}
