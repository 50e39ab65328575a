//! `virtio-balloon`: takes memory from the guest and gives it back (virtio 1.2, 5.5). Not one of bhyve's devices.
//!
//! The guest gives pages up when the balloon grows, and tells of pages that it does not use (free page reporting); the host's
//! memory behind both is freed. A guest that uses such a page again finds zeroes in it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

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

/// How to make a balloon.
pub const FACTORY: PciFactory = PciFactory {
    name: "virtio-balloon",
    help: "memory of the guest's that the host gets back; [size=SIZE][,reporting=off][,deflate_on_oom]",
    build,
};

const QUEUE_SIZE: u16 = 128;
/// Queues: pages given up, pages taken back, pages that are free.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORT: u16 = 2;

/// Feature bits (5.5.3).
mod feature {
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
    let spec = VirtioSpec {
        name: "virtio-balloon",
        device: 0x1002,
        device_type: 5,
        class: regs::class::MEMORY_OTHER,
        config_size: CONFIG_SIZE as u32,
        queues: vec![QUEUE_SIZE; 3],
    };
    transport::build(context, spec, |virtio| Balloon::new(virtio, features, pages))
}

struct Balloon {
    features: u64,
    /// Pages that the guest shall give up.
    wanted: AtomicU32,
    /// Pages that it says it has given up.
    actual: AtomicU32,
    worker: OnceLock<Worker>,
}

#[derive(Serialize, Deserialize)]
struct BalloonState {
    wanted: u32,
    actual: u32,
}

impl Balloon {
    fn new(context: Arc<VirtioContext>, features: u64, wanted: u32) -> Result<Arc<Self>, DeviceError> {
        let address = context.address();
        let name = format!("balloon-{}:{}", address.slot, address.func);
        let balloon = Self { features, wanted: wanted.into(), actual: 0.into(), worker: OnceLock::new() };
        let worker = Worker::spawn(name, move |queues| serve(&context, queues))
            .map_err(|source| DeviceError::Host { what: "start the thread of virtio-balloon".into(), source })?;
        // Set here and nowhere else.
        let _ = balloon.worker.set(worker);
        Ok(Arc::new(balloon))
    }

    fn settle(&self) {
        if let Some(worker) = self.worker.get() {
            worker.wait_idle();
        }
    }
}

/// Takes what the guest has put on the queues.
fn serve(context: &VirtioContext, queues: u64) {
    for index in [INFLATE, DEFLATE, REPORT] {
        if queues & 1 << index == 0 {
            continue;
        }
        let Some(queue) = context.queue(index) else { continue };
        context.drain(queue, |chain| {
            match index {
                INFLATE => give_up(context, &chain),
                REPORT => free(context.memory(), &chain.writable),
                // A page that is taken back is there again as soon as it is used.
                _ => {}
            }
            context.complete(chain, 0);
        });
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
        self.features & feature::DEFLATE_ON_OOM
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let mut structure = [0; CONFIG_SIZE];
        structure[..4].copy_from_slice(&self.wanted.load(Ordering::Relaxed).to_le_bytes());
        structure[4..8].copy_from_slice(&self.actual.load(Ordering::Relaxed).to_le_bytes());
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
        let (wanted, actual) = (self.wanted.load(Ordering::Relaxed), self.actual.load(Ordering::Relaxed));
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
    }
}

#[cfg(test)]
mod tests;
