//! `virtio-console`: serial ports (virtio 1.2, 5.3), as terminals (`/dev/hvc0`) and as named channels between programs
//! of the guest and of the host (`/dev/virtio-ports/NAME`).
//!
//! | module | what it does |
//! |---|---|
//! | `control` | messages about ports |
//! | `port` | one port: queues on one side, a host end on the other |
//! | `device` | the device: all ports, configuration, state |

mod control;
mod device;
mod port;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use backend::tty::{TtyError, TtySpec};
use config::NodeRef;

use super::transport::{self, VirtioSpec};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};
use device::Console;
use port::PortSpec;

/// How to make a console.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-console",
    help: "serial ports; NAME=SOCKET[,NAME=SOCKET...], or stdio, pty, a tty, tcp=[ADDR:]PORT, file:PATH as SOCKET",
    build,
};

/// Ports, at most.
const MAX_PORTS: usize = 16;
const QUEUE_SIZE: u16 = 64;
/// Two for each port, and two for control.
const QUEUES: usize = 2 * MAX_PORTS + 2;
/// Queues of control messages to and from the driver.
const CONTROL_IN: u16 = 2;
const CONTROL_OUT: u16 = 3;

/// The queue with room for input of a port; the one with output is the next.
fn input_queue(port: usize) -> u16 {
    (if port == 0 { 0 } else { 2 * port + 2 }) as u16
}

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let mut ports = Vec::new();
    for number in 0..MAX_PORTS {
        let key = |name: &str| format!("port.{number}.{name}");
        let (name, path) = (node.get_str(&key("name")), node.get_str(&key("path")));
        let Some(path) = path else {
            if let Some(name) = name {
                return Err(DeviceError::Other(format!("virtio-console: port {name} requires a path")));
            }
            ports.push(None);
            continue;
        };
        let failed = |source: TtyError| DeviceError::Port { port: name.clone().unwrap_or_default(), source };
        let spec = TtySpec::parse_port(&path).map_err(failed)?;
        let terminal = node.bool_or(&key("console"), spec.is_terminal())?;
        let tty = spec.open().map_err(failed)?;
        if let Some(peer) = tty.peer() {
            eprintln!("bhyve: virtio-console port {}: {}", name.as_deref().unwrap_or("0"), peer.display());
        }
        ports.push(Some(PortSpec { name: name.unwrap_or_default(), terminal, tty: Arc::new(tty) }));
    }
    let spec = VirtioSpec {
        name: "virtio-console",
        device: 0x1003,
        device_type: 3,
        class: regs::class::COMMUNICATION_OTHER,
        config_size: device::CONFIG_SIZE as u32,
        queues: vec![QUEUE_SIZE; QUEUES],
    };
    transport::build(context, spec, |virtio| Console::new(virtio, ports))
}
