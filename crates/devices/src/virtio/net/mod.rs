//! `virtio-net`: a NIC (virtio 1.2, 5.1).
//!
//! | module | what it does |
//! |---|---|
//! | `device` | the device: features, configuration, link |
//! | `transmit`, `receive` | packets from and to the guest |
//! | `control` | the control queue |
//! | `vhost` | a NIC whose queues another process serves |
//! | `filter` | what the driver wants to receive, and what else it sets |

mod control;
mod device;
mod filter;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

use std::sync::Arc;

use backend::net::{self, NicOptions};
use config::NodeRef;

use super::transport::{self, VirtioSpec};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};
use device::Net;

/// How to make a NIC.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-net",
    help: "network; [slirp|tapN|valeX:PORT|unix:/PATH|vhost-user:/PATH][,mac=XX:XX:XX:XX:XX:XX][,mtu=N][,queues=N][,OPTIONS]",
    build,
};

const QUEUE_SIZE: u16 = 1024;
const CONTROL_QUEUE_SIZE: u16 = 64;
const MAX_PAIRS: u16 = 8;

/// Feature bits (5.1.3).
mod bit {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_VLAN: u64 = 1 << 19;
    pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
}

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let mut options = NicOptions::from_node(context.config, node, context.address, &["queues"])?;
    options.queues = node.int_or("queues", 1..=MAX_PAIRS, 1)?;
    if let Some(path) = options.vhost_user() {
        return vhost::build(context, &options, path);
    }
    let backend = net::open(&options)?;
    transport::build(context, spec(options.queues), |virtio| Net::new(virtio, backend, &options))
}

/// A receive and a transmit queue for each pair, then the control queue.
fn spec(pairs: u16) -> VirtioSpec {
    let mut queues = vec![QUEUE_SIZE; 2 * usize::from(pairs)];
    queues.push(CONTROL_QUEUE_SIZE);
    VirtioSpec {
        name: "virtio-net",
        device: 0x1000,
        device_type: 1,
        class: regs::class::ETHERNET,
        config_size: device::CONFIG_SIZE as u32,
        queues,
    }
}
