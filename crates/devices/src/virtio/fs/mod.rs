//! `virtio-fs`: a shared folder by FUSE (virtio 1.2, 5.11), served by another process (virtiofsd) over vhost-user.
//! Not one of bhyve's devices.
//!
//! The queues belong to the back end while the driver uses them. What it writes into the guest's memory has to be noted all
//! the same, for the CPU may have code of these pages: the device looks at the buffers that the driver offers before it rings
//! the back end's bell, and before an interrupt at those that were offered without a bell.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use backend::vhost_user::{Frontend, Ring};
use config::NodeRef;
use platform::{Persist, StateError};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::worker::Worker;
use super::{VirtioDevice, feature, read_structure};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};

/// How to make a folder that virtiofsd shares.
pub const FACTORY: PciFactory =
    PciFactory { name: "virtio-fs", help: "shared folder of a virtiofsd; TAG,socket=PATH[,queues=N]", build };

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
    let Some(socket) = node.get_str("socket") else {
        return Err(DeviceError::Other(
            "virtio-fs: name the socket of a virtiofsd, as in virtio-fs,TAG,socket=PATH".into(),
        ));
    };
    let requests = node.int_or("queues", 1..=MAX_QUEUES, 1)?;
    let queues = usize::from(requests) + 1;
    let frontend = Frontend::connect(&PathBuf::from(socket), queues, context.memory.clone())?;
    // The back end writes memory without telling anybody beforehand.
    context.memory.pages().has_other_writers();
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
    transport::build(context, spec, |virtio| Fs::new(virtio, frontend, structure))
}

/// The queues in the hands of the back end.
#[derive(Default)]
struct Running {
    /// For each queue that runs, how far its buffers have been looked at.
    seen: Vec<(u16, u16)>,
}

struct Shared {
    context: Arc<VirtioContext>,
    frontend: Frontend,
    running: Mutex<Running>,
    stop: AtomicBool,
}

struct Fs {
    shared: Arc<Shared>,
    structure: [u8; TAG + 4],
    worker: OnceLock<Worker>,
    calls: Mutex<Option<JoinHandle<()>>>,
}

impl Fs {
    fn new(
        context: Arc<VirtioContext>,
        frontend: Frontend,
        structure: [u8; TAG + 4],
    ) -> Result<Arc<Self>, DeviceError> {
        let address = context.address();
        let name = format!("fs-{}:{}", address.slot, address.func);
        let failed = |source| DeviceError::Host { what: "start the threads of virtio-fs".into(), source };
        let shared = Arc::new(Shared { context, frontend, running: Mutex::default(), stop: AtomicBool::new(false) });
        let (kicker, caller) = (shared.clone(), shared.clone());
        let worker = Worker::spawn(name.clone(), move |queues| kicker.kick(queues)).map_err(failed)?;
        let calls = std::thread::Builder::new().name(name).spawn(move || caller.interrupts()).map_err(failed)?;
        Ok(Arc::new(Self { shared, structure, worker: worker.into(), calls: Mutex::new(Some(calls)) }))
    }

    fn settle(&self) {
        if let Some(worker) = self.worker.get() {
            worker.wait_idle();
        }
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.frontend.wake();
        let calls = self.calls.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = calls {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver has rung: hands the queues over the first time, and rings on.
    fn kick(&self, queues: u64) {
        let mut running = self.running();
        if running.seen.is_empty() && !self.start(&mut running) {
            return;
        }
        self.note_writes(&mut running, queues);
        for (index, _) in &running.seen {
            if queues & 1 << (index % 64) != 0 {
                self.frontend.kick(usize::from(*index));
            }
        }
        if self.frontend.is_gone() {
            self.context.warn_once("the virtiofsd has gone; the guest's file system hangs");
        }
    }

    fn start(&self, running: &mut Running) -> bool {
        let ready = self.context.queues().iter().filter(|queue| queue.is_ready());
        let rings: Vec<_> = ready.map(|queue| (usize::from(queue.index()), queue.place())).collect();
        let inside = |ring: &Ring| {
            let entries = u64::from(ring.size);
            let memory = self.context.memory();
            memory.is_ram(ring.descriptors, 16 * entries)
                && memory.is_ram(ring.available, 6 + 2 * entries)
                && memory.is_ram(ring.used, 6 + 8 * entries)
        };
        if rings.is_empty() || !rings.iter().all(|(_, ring)| inside(ring)) {
            self.context.warn_once("the driver's rings are not in memory");
            return false;
        }
        if let Err(why) = self.frontend.start(self.context.features(), &rings) {
            self.context.warn_once(&why.to_string());
            return false;
        }
        running.seen = rings.iter().map(|(index, ring)| (*index as u16, ring.base)).collect();
        true
    }

    /// Notes what the back end is going to write, or has written: writable buffers offered since the last look.
    fn note_writes(&self, running: &mut Running, queues: u64) {
        let pages = self.context.memory().pages();
        for (index, seen) in &mut running.seen {
            if queues & 1 << (*index % 64) == 0 {
                continue;
            }
            let Some(queue) = self.context.queue(*index) else { continue };
            let (next, offered) = queue.look_ahead(*seen);
            *seen = next;
            for buffers in offered {
                for range in buffers.ranges() {
                    pages.note_write(range.start.0, range.size);
                }
            }
        }
    }

    /// The thread that passes on the back end's interrupts.
    fn interrupts(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let queues = self.frontend.wait_calls();
            let mut running = self.running();
            self.note_writes(&mut running, queues);
            for (index, _) in &running.seen {
                if queues & 1 << (index % 64) != 0
                    && let Some(queue) = self.context.queue(*index)
                {
                    self.context.interrupt_queue(queue);
                }
            }
        }
    }
}

impl VirtioDevice for Fs {
    fn features(&self) -> u64 {
        0
    }

    fn transport_features(&self) -> u64 {
        self.shared.frontend.features() & !feature::RING_RESET
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        read_structure(&self.structure, offset, bytes);
    }

    fn notify(&self, index: u16) {
        if let Some(worker) = self.worker.get() {
            worker.wake(index);
        }
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
        self.settle();
        if self.shared.running().seen.is_empty() {
            return Ok(Vec::new());
        }
        Err(StateError::Invalid { kind: self.kind(), why: "the state of the mounted folder is in virtiofsd".into() })
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        platform::state::decode(self.kind(), self.version(), version, bytes)
    }

    fn reset(&self) {
        self.settle();
        let mut running = self.shared.running();
        let queues = std::mem::take(&mut running.seen);
        if let Err(why) = self.shared.frontend.stop(queues.iter().map(|(index, _)| usize::from(*index))) {
            self.shared.context.warn_once(&why.to_string());
        }
    }
}
