//! `-s [[bus:]slot[:func]],EMULATION[,conf]`: PCI functions.

use super::{CommandLine, asks_for_help, legacy};
use crate::error::ConfigError;
use crate::exit::{self, Exit};
use crate::pci::PciAddress;

pub(super) fn function(line: &mut CommandLine<'_>, argument: &str) -> Result<(), Exit> {
    if asks_for_help(argument) {
        return Err(Exit::with_stdout(exit::OK, legacy::help(line.devices)));
    }
    let bad_field = || failure(format_args!("Invalid PCI slot info field \"{argument}\""));
    let (address, rest) = argument.split_once(',').ok_or_else(bad_field)?;
    let address = PciAddress::parse(address).ok_or_else(bad_field)?;
    let (name, conf) = match rest.split_once(',') {
        Some((name, conf)) => (name, Some(conf)),
        None => (rest, None),
    };
    let device = legacy::find(line.devices, name)
        .ok_or_else(|| failure(format_args!("pci slot {address}: unknown device \"{name}\"")))?;
    let path = address.path();
    let root = line.config.root_mut();
    if root.node(&path).is_some() {
        return Err(failure(format_args!("pci slot {address} already occupied!")));
    }
    let node = root.create(&path).map_err(ConfigError::from)?;
    node.set("device", device.device()).map_err(ConfigError::from)?;
    (device.parse)(node, conf).map_err(|error| error.into_exit(&path))
}

fn failure(text: std::fmt::Arguments<'_>) -> Exit {
    Exit::with_stderr(exit::ERROR, format!("{text}\n"))
}
