//! `virtio-blk`: a disk (virtio 1.2, 5.2).
//!
//! | module | what it does |
//! |---|---|
//! | `request` | a request of the driver: parsed, checked, answered |
//! | `layout` | the configuration structure |
//! | `device` | the device: features, queues, back end |

mod device;
mod layout;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use backend::block::{BlockOptions, Disk};
use config::NodeRef;
use md5::{Digest, Md5};

use super::transport::{self, VirtioSpec};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};
use device::Blk;

/// How to make a disk.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-blk",
    help: "disk; PATH|nbd://HOST[:PORT]/EXPORT|nbd+unix:///EXPORT?socket=PATH[,nocache][,direct|sync][,ro]\
           [,sectorsize=L[/P]][,nodelete][,ser=SERIAL][,format=raw|qcow2][,lock=off][,queues=N][,iops=N][,bps=SIZE]\
           [,aio=io_uring|threads][,reconnect=SECONDS]",
    build,
};

const QUEUE_SIZE: u16 = 128;
const MAX_QUEUES: u16 = 16;
/// Queues without `queues=`: one per vCPU, but no more than this.
const DEFAULT_QUEUES: u32 = 4;

/// Bytes of the identification string.
const ID_LEN: usize = 20;

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let options = BlockOptions::from_node(node, &["ser", "queues"])?;
    let default =
        if context.config.bool_or("virtio.modern", true)? { context.cpus.clamp(1, DEFAULT_QUEUES) } else { 1 };
    let queues = node.int_or("queues", 1..=MAX_QUEUES, default as u16)?;
    let id = match node.get_str("ser") {
        Some(serial) => identification(serial.as_bytes()),
        None => identification(derived_serial(&options.path.to_string_lossy()).as_bytes()),
    };
    let name = format!("blk-{}:{}", context.address.slot, context.address.func);
    let disk = Disk::open(&options, context.memory.clone(), &name)?;
    transport::build(context, spec(queues), |virtio| Ok(Blk::new(virtio, disk, id, queues)))
}

fn spec(queues: u16) -> VirtioSpec {
    VirtioSpec {
        name: "virtio-blk",
        device: 0x1001,
        device_type: 2,
        class: regs::class::STORAGE_SCSI,
        config_size: layout::SIZE as u32,
        queues: vec![QUEUE_SIZE; usize::from(queues)],
    }
}

/// The serial number of a disk that was given none: it follows from the path, so that a guest finds its disks again.
pub(super) fn derived_serial(path: &str) -> String {
    let hash = Md5::digest(path.as_bytes());
    let [a, b, c, d, e, f] = [0, 1, 2, 3, 4, 5].map(|at| hash[at]);
    format!("BHYVE-{a:02X}{b:02X}-{c:02X}{d:02X}-{e:02X}{f:02X}")
}

/// A serial number as the device reports it: cut or padded with NUL to 20 bytes.
fn identification(serial: &[u8]) -> [u8; ID_LEN] {
    let mut id = [0; ID_LEN];
    for (to, from) in id.iter_mut().zip(serial) {
        *to = *from;
    }
    id
}
