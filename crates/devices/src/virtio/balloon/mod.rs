//! `virtio-balloon`: takes memory from the guest and gives it back (virtio 1.2, 5.5). Not one of bhyve's devices.
//!
//! The guest gives pages up when the balloon grows, and tells of pages that it does not use (free page reporting); the host's
//! memory behind both is freed. A guest that uses such a page again finds zeroes in it.
//!
//! `control` is a socket on which programs of the host ask for statistics and change the balloon's size.

mod control;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use backend::tty::TtySpec;
use config::NodeRef;
use memory::GuestMemory;
use platform::state::{decode, encode};
use platform::{GuestRange, Persist, StateError};
use serde::{Deserialize, Serialize};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::worker::Worker;
use super::{Buffers, Chain, VirtioDevice, read_structure};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};
use control::Control;

/// How to make a balloon.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-balloon",
    help: "memory of the guest's that the host gets back; [size=SIZE][,control=PATH][,reporting=off][,deflate_on_oom]",
    build,
};

const QUEUE_SIZE: u16 = 128;
/// Queues: pages given up, pages taken back. Then statistics, if the driver has taken that feature, and pages that are free:
/// Linux numbers the queues that it uses, and so do others, whatever 5.5.2 says.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;

/// Feature bits (5.5.3).
mod feature {
    pub(super) const STATS: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const REPORTING: u64 = 1 << 5;
}

/// Bytes of the configuration: pages wanted, pages there, and two words for features that are not offered.
const CONFIG_SIZE: usize = 16;
const ACTUAL: u32 = 4;
/// The balloon counts in pages of this size, whatever the guest's pages are.
const PAGE: u64 = 4096;
/// Page numbers of one buffer, at most; Linux sends 256.
const MAX_PAGES: usize = 64 << 10;

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let size = node.get_size("size")?.unwrap_or(0);
    let (ram, pages) = (context.memory.size(), u32::try_from(size / PAGE).unwrap_or(u32::MAX));
    if size >= ram {
        return Err(DeviceError::Other(format!(
            "virtio-balloon: size={size}: a balloon of that size leaves nothing of {ram} bytes of memory"
        )));
    }
    let mut features = 0;
    for (key, usual, feature) in
        [("reporting", true, feature::REPORTING), ("deflate_on_oom", false, feature::DEFLATE_ON_OOM)]
    {
        if node.bool_or(key, usual)? {
            features |= feature;
        }
    }
    let control = node.get_str("control").map(|path| {
        let failed = |source| DeviceError::Port { port: "control".into(), source };
        Ok::<_, DeviceError>(Control::new(TtySpec::Unix(path.into()).open().map_err(failed)?))
    });
    let control = control.transpose()?;
    if control.is_some() {
        features |= feature::STATS;
    }
    let spec = VirtioSpec {
        name: "virtio-balloon",
        device: 0x1002,
        device_type: 5,
        class: regs::class::MEMORY_OTHER,
        config_size: CONFIG_SIZE as u32,
        queues: vec![QUEUE_SIZE; 4],
    };
    transport::build(context, spec, |virtio| Balloon::new(virtio, features, pages, control))
}

struct Balloon {
    context: Arc<VirtioContext>,
    features: u64,
    /// Pages that the guest shall give up.
    wanted: AtomicU32,
    /// Pages that it says it has given up.
    actual: AtomicU32,
    worker: OnceLock<Worker>,
    control: Option<Control>,
}

#[derive(Serialize, Deserialize)]
struct BalloonState {
    wanted: u32,
    actual: u32,
}

impl Balloon {
    fn new(
        context: Arc<VirtioContext>,
        features: u64,
        wanted: u32,
        control: Option<Control>,
    ) -> Result<Arc<Self>, DeviceError> {
        let address = context.address();
        let name = format!("balloon-{}:{}", address.slot, address.func);
        let (wanted, actual, worker) = (wanted.into(), 0.into(), OnceLock::new());
        let balloon = Arc::new(Self { context, features, wanted, actual, worker, control });
        let weak = Arc::downgrade(&balloon);
        let serve = move |queues| {
            if let Some(balloon) = Weak::upgrade(&weak) {
                balloon.serve(queues);
            }
        };
        let worker = Worker::spawn(name, serve)
            .map_err(|source| DeviceError::Host { what: "start the thread of virtio-balloon".into(), source })?;
        // Set here and nowhere else.
        let _ = balloon.worker.set(worker);
        Control::attach(&balloon);
        Ok(balloon)
    }

    /// Pages wanted and given up.
    fn pages(&self) -> (u32, u32) {
        (self.wanted.load(Ordering::Relaxed), self.actual.load(Ordering::Relaxed))
    }

    /// Changes how many pages the guest shall give up.
    fn set_wanted(&self, pages: u32) {
        if self.wanted.swap(pages, Ordering::Relaxed) != pages {
            self.context.config_changed();
        }
    }

    /// Takes what the guest has put on the queues.
    fn serve(&self, queues: u64) {
        let statistics = self.context.has(feature::STATS);
        for index in (0..4).filter(|index| queues & 1 << index != 0) {
            if index == STATS && statistics {
                self.take_statistics();
                continue;
            }
            let Some(queue) = self.context.queue(index) else { continue };
            self.context.drain(queue, |chain| {
                match index {
                    INFLATE => give_up(&self.context, &chain),
                    // A page that is taken back is there again as soon as it is used.
                    DEFLATE => {}
                    _ => free(self.context.memory(), &chain.writable),
                }
                self.context.complete(chain, 0);
            });
        }
    }

    fn settle(&self) {
        if let Some(worker) = self.worker.get() {
            worker.wait_idle();
        }
    }
}

/// Frees the pages whose numbers the guest has sent.
fn give_up(context: &VirtioContext, chain: &Chain) {
    let len = usize::try_from(chain.readable.len()).map_or(MAX_PAGES * 4, |len| len.min(MAX_PAGES * 4));
    let mut bytes = vec![0; len];
    // The chain's buffers were checked to be in RAM.
    let Ok(read) = chain.readable.read(context.memory(), &mut bytes) else { return };
    let (numbers, _) = bytes[..read].as_chunks::<4>();
    let mut numbers: Vec<_> = numbers.iter().map(|number| u32::from_le_bytes(*number)).collect();
    // Neighbours go together, in whatever order the guest found them.
    numbers.sort_unstable();
    let mut pages = Buffers::new();
    let mut run: Option<GuestRange> = None;
    for number in numbers {
        let start = u64::from(number) * PAGE;
        match &mut run {
            Some(range) if range.start.0 + range.size == start => range.size += PAGE,
            _ => {
                run.into_iter().for_each(|range| pages.push(range));
                run = Some(GuestRange::new(start, PAGE));
            }
        }
    }
    run.into_iter().for_each(|range| pages.push(range));
    free(context.memory(), &pages);
}

/// Frees the host's memory behind whole pages; what is no RAM is left out.
fn free(memory: &GuestMemory, pages: &Buffers) {
    for range in pages.ranges() {
        // Without success the memory stays, which harms nobody.
        let _ = memory.discard(range.start.0, range.size);
    }
}

impl VirtioDevice for Balloon {
    fn features(&self) -> u64 {
        self.features
    }

    fn legacy_features(&self) -> u64 {
        self.features & (feature::DEFLATE_ON_OOM | feature::STATS)
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let mut structure = [0; CONFIG_SIZE];
        let (wanted, actual) = self.pages();
        structure[..4].copy_from_slice(&wanted.to_le_bytes());
        structure[4..8].copy_from_slice(&actual.to_le_bytes());
        read_structure(&structure, offset, bytes);
    }

    fn config_write(&self, offset: u32, bytes: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, bytes.try_into()) {
            self.actual.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn notify(&self, index: u16) {
        if let Some(worker) = self.worker.get() {
            worker.wake(index);
        }
    }
}

impl Persist for Balloon {
    fn kind(&self) -> &'static str {
        "virtio-balloon"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.settle();
        let (wanted, actual) = self.pages();
        encode(self.kind(), &BalloonState { wanted, actual })
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: BalloonState = decode(self.kind(), self.version(), version, bytes)?;
        self.wanted.store(state.wanted, Ordering::Relaxed);
        self.actual.store(state.actual, Ordering::Relaxed);
        Ok(())
    }

    fn reset(&self) {
        self.settle();
        self.actual.store(0, Ordering::Relaxed);
        self.forget_questions();
    }
}

#[cfg(test)]
mod tests;
