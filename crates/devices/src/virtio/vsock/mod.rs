//! `virtio-vsock`: sockets between the guest and the host (virtio 1.2, 5.10), bridged to UNIX sockets by
//! [`backend::vsock`]. Not one of bhyve's devices.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use backend::vsock::{Bridge, HEADER_LEN, Header, MAX_PAYLOAD};
use config::NodeRef;
use platform::{Persist, StateError};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::worker::Worker;
use super::{Chain, VirtioDevice, read_structure};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};

/// How to make a socket device.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-vsock",
    help: "sockets between guest and host; PATH[,cid=N]: the UNIX socket by which the host's programs reach the guest",
    build,
};

const QUEUE_SIZE: u16 = 128;
/// Queues: packets to the guest, packets from it, events.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
/// The guest's address unless another is given.
const DEFAULT_CID: u32 = 3;
/// The event that ends all connections (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let path: PathBuf = match node.get_str("path") {
        Some(path) if !path.is_empty() => path.into(),
        _ => {
            return Err(DeviceError::Other(
                "virtio-vsock: name a UNIX socket, as in virtio-vsock,/run/vm.vsock".into(),
            ));
        }
    };
    // 0 to 2 are the hypervisor, the own machine and the host; the last is "any".
    let cid = node.int_or("cid", 3..=u32::MAX - 1, DEFAULT_CID)?;
    let name = format!("vsock-{}:{}", context.address.slot, context.address.func);
    let spec = VirtioSpec {
        name: "virtio-vsock",
        device: 0x1053,
        device_type: 19,
        class: regs::class::COMMUNICATION_OTHER,
        config_size: 8,
        queues: vec![QUEUE_SIZE; 3],
    };
    transport::build(context, spec, |virtio| Vsock::new(virtio, cid.into(), &path, &name))
}

struct Vsock {
    context: Arc<VirtioContext>,
    cid: u64,
    bridge: OnceLock<Bridge>,
    worker: OnceLock<Worker>,
    /// The guest has to be told that its connections are gone.
    moved: AtomicBool,
}

impl Vsock {
    fn new(
        context: Arc<VirtioContext>,
        cid: u64,
        path: &std::path::Path,
        name: &str,
    ) -> Result<Arc<Self>, DeviceError> {
        let vsock = Arc::new(Self {
            context,
            cid,
            bridge: OnceLock::new(),
            worker: OnceLock::new(),
            moved: AtomicBool::new(false),
        });
        let (weak, other) = (Arc::downgrade(&vsock), Arc::downgrade(&vsock));
        let work = move |queues| {
            if let Some(vsock) = weak.upgrade() {
                vsock.serve(queues);
            }
        };
        let worker = Worker::spawn(name.into(), work)
            .map_err(|source| DeviceError::Host { what: "start the thread of virtio-vsock".into(), source })?;
        let ready = move || {
            if let Some(vsock) = other.upgrade() {
                vsock.wake(RECEIVE);
            }
        };
        let bridge = Bridge::open(cid, path, name, ready).map_err(|source| DeviceError::Host {
            what: format!("listen on {} for virtio-vsock", path.display()),
            source,
        })?;
        // Set here and nowhere else.
        let _ = (vsock.worker.set(worker), vsock.bridge.set(bridge));
        Ok(vsock)
    }

    fn wake(&self, queue: u16) {
        if let Some(worker) = self.worker.get() {
            worker.wake(queue);
        }
    }

    /// On the device's thread.
    fn serve(&self, queues: u64) {
        let Some(bridge) = self.bridge.get() else { return };
        if queues & 1 << TRANSMIT != 0
            && let Some(queue) = self.context.queue(TRANSMIT)
        {
            self.context.drain(queue, |chain| {
                self.transmit(bridge, &chain);
                self.context.complete(chain, 0);
            });
        }
        self.deliver(bridge);
        self.tell();
    }

    /// A packet of the guest.
    fn transmit(&self, bridge: &Bridge, chain: &Chain) {
        let (head, rest) = chain.readable.clone().split(HEADER_LEN as u64);
        let mut header = [0; HEADER_LEN];
        // The chain's buffers were checked to be in RAM.
        if head.read(self.context.memory(), &mut header).is_ok_and(|len| len == HEADER_LEN) {
            let header = Header::parse(&header);
            let len = rest.len().min(u64::from(header.len())).min(MAX_PAYLOAD as u64);
            let mut payload = vec![0; len as usize];
            let read = rest.read(self.context.memory(), &mut payload).unwrap_or(0);
            payload.truncate(read);
            bridge.receive(&header, &payload);
        } else {
            self.context.warn_once("a packet without a whole header");
        }
    }

    /// Gives the guest the packets for which it has room.
    fn deliver(&self, bridge: &Bridge) {
        let Some(queue) = self.context.queue(RECEIVE) else { return };
        while bridge.has_packets() {
            let Some(chain) = self.context.pop(queue) else {
                if queue.enable_notifications() {
                    continue;
                }
                return;
            };
            let room = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
            let packet = room.checked_sub(HEADER_LEN).and_then(|room| bridge.next(room));
            let written = packet.map_or(0, |(header, payload)| {
                let (head, rest) = chain.writable.clone().split(HEADER_LEN as u64);
                let memory = self.context.memory();
                head.write(memory, &header.bytes()).unwrap_or(0) + rest.write(memory, &payload).unwrap_or(0)
            });
            self.context.complete(chain, written as u32);
        }
    }

    /// Tells a guest that has been restored that its connections are gone.
    fn tell(&self) {
        if self.moved.load(Ordering::Acquire)
            && let Some(queue) = self.context.queue(EVENT)
            && let Some(chain) = self.context.pop(queue)
        {
            let written = chain.writable.write(self.context.memory(), &TRANSPORT_RESET.to_le_bytes()).unwrap_or(0);
            self.context.complete(chain, written as u32);
            self.moved.store(false, Ordering::Release);
        }
    }

    fn settle(&self) {
        if let Some(worker) = self.worker.get() {
            worker.wait_idle();
        }
    }
}

impl VirtioDevice for Vsock {
    fn features(&self) -> u64 {
        0
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        read_structure(&self.cid.to_le_bytes(), offset, bytes);
    }

    fn notify(&self, index: u16) {
        self.wake(index);
    }
}

impl Persist for Vsock {
    fn kind(&self) -> &'static str {
        "virtio-vsock"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.settle();
        Ok(Vec::new())
    }

    /// Connections end: the programs at their other ends are elsewhere.
    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        platform::state::decode::<()>(self.kind(), self.version(), version, bytes)?;
        self.reset();
        self.moved.store(true, Ordering::Release);
        self.wake(EVENT);
        Ok(())
    }

    fn reset(&self) {
        self.settle();
        self.moved.store(false, Ordering::Release);
        if let Some(bridge) = self.bridge.get() {
            bridge.reset();
        }
    }
}

#[cfg(test)]
mod tests;
