//! `virtio-scsi`: a SCSI host adapter with one target (virtio 1.2, 5.6), whose logical units are disks, or SCSI devices
//! of the host (`/dev/sgN`) to which commands are passed on.
//!
//! bhyve hands commands to FreeBSD's CAM target layer, which no other system has; here the target is in this process.
//!
//! | module | what it does |
//! |---|---|
//! | `layout` | configuration, addresses, response codes |
//! | `target` | the units and their tasks |
//! | `request` | a command: parsed, given to its unit, answered |
//! | `control` | task management |
//! | `device` | the device: queues, configuration, events |

mod control;
mod device;
mod layout;
mod request;
mod target;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use backend::block::{BlockOptions, Disk};
use backend::scsi_generic::ScsiGeneric;
use config::NodeRef;
use md5::{Digest, Md5};

use super::transport::{self, VirtioSpec};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};
use crate::scsi::LogicalUnit;
use crate::scsi::inquiry::Identity;
use device::{OTHER_QUEUES, Scsi};
use target::Backing;

/// How to make a SCSI host adapter.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-scsi",
    help: "SCSI disks; PATH[,PATH...][,queues=N] and the options of virtio-blk's disks but ser=, for all of them",
    build,
};

const QUEUE_SIZE: u16 = 64;
const MAX_QUEUES: u16 = 16;
/// Disks of one adapter, at most.
const MAX_UNITS: usize = 256;

/// Keys beside those of a disk; `dev` is the first disk, `iid` the initiator of bhyve's target layer.
const KEYS: &[&str] = &["dev", "iid", "lun", "queues"];

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let paths = paths(node)?;
    let queues = node.int_or("queues", 1..=MAX_QUEUES, 1)?;
    let mut units = Vec::new();
    for (lun, path) in paths.into_iter().enumerate() {
        let name = format!("scsi-{}:{}.{lun}", context.address.slot, context.address.func);
        if ScsiGeneric::is_one(&path) {
            units.push(pass_through(context, path, &name)?);
            continue;
        }
        let options = BlockOptions::from_node_for(path, node, KEYS)?;
        let disk = Disk::open(&options, context.memory.clone(), &name)?;
        let identity = identity(&options.path.to_string_lossy());
        units.push(Backing::Disk(LogicalUnit::new(disk, &options, identity)));
    }
    transport::build(context, spec(queues), |virtio| Scsi::new(virtio, units, queues))
}

/// A SCSI device of the host as a unit.
fn pass_through(context: &BuildContext<'_>, path: PathBuf, name: &str) -> Result<Backing, DeviceError> {
    let device = Arc::new(ScsiGeneric::open(&path)?);
    let text = path.display().to_string();
    let executor = Disk::with_image(device.clone(), context.memory.clone(), name, text)
        .map_err(|source| DeviceError::Host { what: format!("start a thread for {}", path.display()), source })?;
    Ok(Backing::Host(device, executor))
}

/// The disks: `dev`, then `lun.1.path` and so on.
fn paths(node: &NodeRef<'_>) -> Result<Vec<PathBuf>, DeviceError> {
    let first = node.get_str("dev").filter(|path| !path.is_empty()).unwrap_or_else(|| "/dev/cam/ctl".into());
    if first.starts_with("/dev/cam/") {
        return Err(DeviceError::Other(format!(
            "{first} is FreeBSD's CAM target layer, which this system does not have; name image files, as in virtio-scsi,/vm/disk.img"
        )));
    }
    let mut paths = vec![PathBuf::from(first)];
    if let Some(luns) = node.node("lun") {
        for number in 1..=luns.nodes().count() {
            let path = luns.node(&number.to_string()).and_then(|lun| lun.get_str("path"));
            let path = path.filter(|path| !path.is_empty());
            paths.push(path.ok_or_else(|| DeviceError::Other(format!("lun.{number}.path is missing")))?.into());
        }
    }
    if paths.len() > MAX_UNITS {
        return Err(DeviceError::Other(format!("{} disks are more than the {MAX_UNITS} possible", paths.len())));
    }
    Ok(paths)
}

fn spec(queues: u16) -> VirtioSpec {
    VirtioSpec {
        name: "virtio-scsi",
        device: 0x1008,
        device_type: 8,
        class: regs::class::STORAGE_SCSI,
        config_size: layout::CONFIG_SIZE as u32,
        queues: vec![QUEUE_SIZE; usize::from(OTHER_QUEUES + queues)],
    }
}

/// Serial number and identifier that follow from the path, so that a guest finds its disks again.
fn identity(path: &str) -> Identity {
    let hash = Md5::digest(path.as_bytes());
    let serial = super::blk::derived_serial(path);
    let mut unique = [0; 8];
    unique.copy_from_slice(&hash[8..16]);
    Identity { serial, unique: u64::from_be_bytes(unique) }
}
