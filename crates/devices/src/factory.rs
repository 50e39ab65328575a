//! The table of PCI device emulations: what `-s` can name, and how each is made.

use std::error::Error;
use std::sync::Arc;

use backend::block::BlockError;
use backend::net::NetError;
use backend::scsi_generic::ScsiGenericError;
use backend::share::ShareError;
use backend::tty::TtyError;
use backend::vhost_user::VhostError;
use config::{Config, ConfigError, NodeRef};
use memory::GuestMemory;

use crate::pci::{PciAddress, PciError, PciFunction, PciHost, hostbridge, lpc};
use crate::virtio::{balloon, blk, console, fs, input, net, p9, rnd, scsi, vsock};

/// What a device is built with.
pub struct BuildContext<'a> {
    /// Where the function will sit.
    pub address: PciAddress,
    /// The host it will sit on.
    pub pci: &'a PciHost,
    /// The guest's RAM.
    pub memory: &'a GuestMemory,
    /// The whole configuration, for keys that concern all devices.
    pub config: &'a Config,
    /// Number of vCPUs.
    pub cpus: u32,
}

/// One kind of device: its name in the configuration, help, and how to make it.
#[derive(Clone, Copy)]
pub struct PciFactory {
    /// The value of `device`.
    pub name: &'static str,
    /// One line of help: what it is and its options.
    pub help: &'static str,
    /// Makes the device from its node of the configuration.
    pub build: fn(&BuildContext<'_>, &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError>,
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such emulation.
    #[error("unknown device \"{0}\"")]
    Unknown(String),
    /// bhyve has it, this build does not.
    #[error("{0}: not available in this build yet")]
    NotAvailable(&'static str),
    /// A key is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The PCI host refused the function.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The disk's backing file cannot be used.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The host's SCSI device cannot be used.
    #[error(transparent)]
    ScsiGeneric(#[from] ScsiGenericError),
    /// A port's host end cannot be had.
    #[error("virtio-console port {port}")]
    Port {
        /// Its name.
        port: String,
        /// Why.
        source: TtyError,
    },
    /// The process that serves the device cannot be used.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// The folder cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The network cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The host refused something.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// A rule of the device itself.
    #[error("{0}")]
    Other(String),
}

impl DeviceError {
    /// The whole chain of causes as one line.
    pub fn line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            line = format!("{line}: {error}");
            cause = error.source();
        }
        line
    }
}

const FACTORIES: &[PciFactory] = &[
    hostbridge::FACTORY,
    lpc::FACTORY,
    balloon::FACTORY,
    blk::FACTORY,
    console::FACTORY,
    fs::FACTORY,
    input::FACTORY,
    net::FACTORY,
    p9::FACTORY,
    rnd::FACTORY,
    scsi::FACTORY,
    vsock::FACTORY,
];

/// Emulations of bhyve that are still to come.
const NOT_AVAILABLE: &[&str] = &["ahci", "e1000", "fbuf", "hda", "nvme", "passthru", "uart", "xhci"];

/// All emulations this build has.
pub fn factories() -> &'static [PciFactory] {
    FACTORIES
}

/// The emulation called `name`.
///
/// # Errors
/// There is none of that name, or not in this build.
pub fn find(name: &str) -> Result<&'static PciFactory, DeviceError> {
    if let Some(factory) = FACTORIES.iter().find(|factory| factory.name == name) {
        return Ok(factory);
    }
    match NOT_AVAILABLE.iter().find(|known| **known == name) {
        Some(known) => Err(DeviceError::NotAvailable(known)),
        None => Err(DeviceError::Unknown(name.into())),
    }
}

/// Makes the device that `node` describes and adds it to the host.
///
/// # Errors
/// The name is unknown or not available, an option is wrong, the back end cannot be used, or the slot is taken.
pub fn build(context: &BuildContext<'_>, name: &str, node: &NodeRef<'_>) -> Result<(), DeviceError> {
    let function = (find(name)?.build)(context, node)?;
    Ok(context.pci.add(function)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_emulation_the_command_line_knows_is_built_or_said_to_be_missing() {
        for device in config::legacy::DEVICES.iter().filter(|device| device.alias_of.is_none()) {
            match find(device.name) {
                Ok(factory) => assert_eq!(factory.name, device.name),
                Err(DeviceError::NotAvailable(name)) => {
                    assert_eq!(name, device.name);
                }
                Err(other) => panic!("{}: {other}", device.name),
            }
        }
        let error = find("nvme").err().unwrap();
        assert_eq!(error.to_string(), "nvme: not available in this build yet");
        assert_eq!(find("ne2k").err().unwrap().to_string(), "unknown device \"ne2k\"");
    }
}
