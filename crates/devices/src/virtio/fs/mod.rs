//! `virtio-fs`: a shared folder by FUSE (virtio 1.2, 5.11), served by another process (virtiofsd) over vhost-user.
//! Not one of bhyve's devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use backend::vhost_user::{Frontend, VhostError, Virtiofsd};
use config::NodeRef;
use memory::GuestMemory;
use platform::{Persist, StateError};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::vhost::VhostQueues;
use super::{VirtioDevice, feature, read_structure};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};

/// How to make a folder that virtiofsd shares.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-fs",
    help: "shared folder by virtiofsd; TAG,path=FOLDER[,virtiofsd=PROGRAM]|TAG,socket=PATH[,queues=N]",
    build,
};

const QUEUE_SIZE: u16 = 1024;
/// Bytes of the tag in the configuration.
const TAG: usize = 36;
const MAX_QUEUES: u16 = 16;

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let tag = node.get_str("tag").unwrap_or_default();
    if tag.is_empty() || tag.len() > TAG {
        return Err(DeviceError::Other(format!(
            "virtio-fs: the tag must have 1 to {TAG} bytes, as in virtio-fs,TAG,socket=PATH"
        )));
    }
    let requests = node.int_or("queues", 1..=MAX_QUEUES, 1)?;
    let queues = usize::from(requests) + 1;
    let (daemon, frontend) = match (node.get_str("socket"), node.get_str("path")) {
        (Some(socket), None) => (None, Frontend::connect(Path::new(&socket), queues, context.memory.clone())?),
        (None, Some(folder)) => {
            let program = node.get_str("virtiofsd").map(PathBuf::from);
            let (daemon, frontend) = serve(program.as_deref(), Path::new(&folder), queues, context.memory)?;
            (Some(daemon), frontend)
        }
        _ => {
            return Err(DeviceError::Other(
                "virtio-fs: name a folder or the socket of a virtiofsd, as in virtio-fs,TAG,path=FOLDER or \
                 virtio-fs,TAG,socket=PATH"
                    .into(),
            ));
        }
    };
    let mut structure = [0; TAG + 4];
    structure[..tag.len()].copy_from_slice(tag.as_bytes());
    structure[TAG..].copy_from_slice(&u32::from(requests).to_le_bytes());
    let spec = VirtioSpec {
        name: "virtio-fs",
        device: 0x105a,
        device_type: 26,
        class: regs::class::STORAGE_OTHER,
        config_size: structure.len() as u32,
        queues: vec![QUEUE_SIZE; queues],
    };
    transport::build(context, spec, |virtio| Fs::new(virtio, frontend, structure, daemon))
}

/// Starts a virtiofsd for the device.
fn serve(
    program: Option<&Path>,
    folder: &Path,
    queues: usize,
    memory: &GuestMemory,
) -> Result<(Virtiofsd, Frontend), VhostError> {
    let (mut daemon, stream) = Virtiofsd::start(program, folder)?;
    let frontend = Frontend::over(stream, daemon.program(), queues, memory.clone());
    match frontend {
        Ok(frontend) => Ok((daemon, frontend)),
        Err(why) => match daemon.ended() {
            // It has said why.
            Some(status) => Err(VhostError::Ended { program: daemon.program().to_owned(), status }),
            None => Err(why),
        },
    }
}

struct Fs {
    queues: VhostQueues,
    structure: [u8; TAG + 4],
    /// Started for this device; ends after the queues are out of its hands.
    _daemon: Option<Virtiofsd>,
}

impl Fs {
    fn new(
        context: Arc<VirtioContext>,
        frontend: Frontend,
        structure: [u8; TAG + 4],
        daemon: Option<Virtiofsd>,
    ) -> Result<Arc<Self>, DeviceError> {
        let address = context.address();
        let name = format!("fs-{}:{}", address.slot, address.func);
        let theirs = context.clone();
        let gone = move |_| theirs.warn_once("the virtiofsd has gone; the guest's file system hangs");
        Ok(Arc::new(Self {
            queues: VhostQueues::new(context, frontend, name, false, gone)?,
            structure,
            _daemon: daemon,
        }))
    }
}

impl VirtioDevice for Fs {
    fn features(&self) -> u64 {
        0
    }

    fn transport_features(&self) -> u64 {
        self.queues.features() & !feature::RING_RESET
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        read_structure(&self.structure, offset, bytes);
    }

    fn notify(&self, index: u16) {
        self.queues.notify(index);
    }
}

impl Persist for Fs {
    fn kind(&self) -> &'static str {
        "virtio-fs"
    }

    fn version(&self) -> u32 {
        1
    }

    /// What the guest has open is known to the other process alone, so only a device out of use can be saved.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        if !self.queues.is_running() {
            return Ok(Vec::new());
        }
        Err(StateError::Invalid { kind: self.kind(), why: "the state of the mounted folder is in virtiofsd".into() })
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        platform::state::decode(self.kind(), self.version(), version, bytes)
    }

    fn reset(&self) {
        self.queues.reset();
    }
}

#[cfg(test)]
mod tests;
