//! `virtio-9p`: a shared folder (the 9P transport over virtio), served by [`backend::share`].

use std::path::PathBuf;
use std::sync::Arc;

use backend::share::{HEADER, Message, Share, ShareOptions, ShareState};
use config::NodeRef;
use platform::state::{decode, encode};
use platform::{Persist, StateError};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::worker::Worker;
use super::{Chain, VirtioDevice, read_structure};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};

/// How to make a shared folder.
pub const FACTORY: PciFactory =
    PciFactory { name: "virtio-9p", help: "shared folder; NAME=PATH[,ro], PATH absolute", build };

const QUEUE_SIZE: u16 = 256;
/// Longest name of a share, in bytes.
const MAX_TAG: usize = 256;
/// The device says by which name the share is to be mounted.
const MOUNT_TAG: u64 = 1;

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let tag = node.get_str("sharename").ok_or_else(|| DeviceError::Other("virtio-9p: share name required".into()))?;
    let path =
        node.get_str("path").ok_or_else(|| DeviceError::Other("virtio-9p: path of the share required".into()))?;
    if tag.is_empty() || tag.len() > MAX_TAG {
        return Err(DeviceError::Other(format!("virtio-9p: the share name must have 1 to {MAX_TAG} bytes")));
    }
    let options = ShareOptions { path: PathBuf::from(path), read_only: node.bool_or("ro", false)? };
    let name = format!("9p-{}:{}", context.address.slot, context.address.func);
    let share = Share::open(&options, &name)?;
    let mut structure = (tag.len() as u16).to_le_bytes().to_vec();
    structure.extend_from_slice(tag.as_bytes());
    let spec = VirtioSpec {
        name: "virtio-9p",
        device: 0x1009,
        device_type: 9,
        class: regs::class::STORAGE_SCSI,
        config_size: structure.len() as u32,
        queues: vec![QUEUE_SIZE],
    };
    transport::build(context, spec, |virtio| P9::new(virtio, share, structure, name))
}

struct P9 {
    share: Arc<Share>,
    structure: Vec<u8>,
    worker: Worker,
}

impl P9 {
    fn new(
        context: Arc<VirtioContext>,
        share: Share,
        structure: Vec<u8>,
        name: String,
    ) -> Result<Arc<Self>, DeviceError> {
        let share = Arc::new(share);
        let theirs = share.clone();
        let worker = Worker::spawn(name, move |_| take_messages(&context, &theirs))
            .map_err(|source| DeviceError::Host { what: "start the thread of virtio-9p".into(), source })?;
        Ok(Arc::new(Self { share, structure, worker }))
    }
}

/// Hands all messages that wait to the share.
fn take_messages(context: &Arc<VirtioContext>, share: &Share) {
    let Some(queue) = context.queue(0) else { return };
    context.drain(queue, |chain| share.submit(Box::new(Exchange { context: context.clone(), chain })));
}

/// A message in the guest's buffers.
struct Exchange {
    context: Arc<VirtioContext>,
    chain: Chain,
}

impl Message for Exchange {
    fn start(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.read(HEADER, &mut bytes);
        bytes
    }

    fn read(&self, limit: usize, into: &mut Vec<u8>) {
        let len = usize::try_from(self.chain.readable.len()).map_or(limit, |len| len.min(limit));
        into.resize(len, 0);
        // The chain's buffers were checked to be in RAM.
        let read = self.chain.readable.read(self.context.memory(), into).unwrap_or(0);
        into.truncate(read);
    }

    fn room(&self) -> usize {
        usize::try_from(self.chain.writable.len()).unwrap_or(usize::MAX)
    }

    fn reply(self: Box<Self>, bytes: &[u8]) {
        let fits = bytes.len() <= self.room();
        if !fits {
            self.context.warn_once("a request leaves no room for its answer");
        }
        let written = if fits { self.chain.writable.write(self.context.memory(), bytes).unwrap_or(0) } else { 0 };
        self.context.complete(self.chain, written as u32);
    }
}

impl VirtioDevice for P9 {
    fn features(&self) -> u64 {
        MOUNT_TAG
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        read_structure(&self.structure, offset, bytes);
    }

    fn notify(&self, index: u16) {
        self.worker.wake(index);
    }
}

impl Persist for P9 {
    fn kind(&self) -> &'static str {
        "virtio-9p"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.worker.wait_idle();
        encode(self.kind(), &self.share.state())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: ShareState = decode(self.kind(), self.version(), version, bytes)?;
        self.share.restore(state).map_err(|why| StateError::Invalid { kind: self.kind(), why })
    }

    fn reset(&self) {
        // The thread may hold a message that was taken before the queue was closed.
        self.worker.wait_idle();
        self.share.reset();
    }
}

#[cfg(test)]
mod tests;
