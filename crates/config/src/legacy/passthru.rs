//! Devices of the host.

use super::{SyntaxError, options};
use crate::pci::{PciAddress, decimal};
use crate::tree::Node;

/// `B/S/F`, `pciB:S:F`, `pci0:B:S:F` or `pptN`, then options.
pub(super) fn parse(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    let Some(conf) = conf else { return Ok(()) };
    let (device, rest) = match conf.split_once(',') {
        Some((device, rest)) => (device, Some(rest)),
        None => (conf, None),
    };
    if device.starts_with("ppt") {
        node.set("pptdev", device)?;
    } else if let Some(address) = address(device) {
        node.set("bus", address.bus.to_string())?;
        node.set("slot", address.slot.to_string())?;
        node.set("func", address.func.to_string())?;
    } else {
        return Err(SyntaxError::text(format!("passthru: invalid options \"{conf}\"")));
    }
    options(node, rest)
}

fn address(text: &str) -> Option<PciAddress> {
    let (text, separator) = match text.strip_prefix("pci") {
        Some(rest) => (rest, ':'),
        None => (text, '/'),
    };
    let parts: Option<Vec<u8>> = text.split(separator).map(decimal).collect();
    match parts?[..] {
        [bus, slot, func] => PciAddress::new(bus, slot, func),
        // With the PCI domain in front; a guest's configuration can only name devices of domain 0.
        [0, bus, slot, func] if separator == ':' => PciAddress::new(bus, slot, func),
        _ => None,
    }
}
