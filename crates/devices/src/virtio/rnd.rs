//! `virtio-rnd`: an entropy source (virtio 1.2, 5.4), filled from the host's random number generator.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use config::NodeRef;
use platform::{Persist, StateError};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::worker::Worker;
use super::{Chain, VirtioDevice};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};

/// How to make an entropy source.
pub const FACTORY: PciFactory =
    PciFactory { name: "virtio-rnd", help: "random numbers from the host; no options", build };

const QUEUE_SIZE: u16 = 64;
/// Bytes for one request, at most: a guest that asks for gigabytes gets a used length that says less.
const MAX_BYTES: usize = 64 << 10;
/// Bytes taken from the host at a time.
const CHUNK: usize = 4096;
/// The generator of bhyve's /dev/random, under the name that never blocks on any kernel.
const SOURCE: &str = "/dev/urandom";

fn build(context: &BuildContext<'_>, _: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let source = File::open(SOURCE)
        .map_err(|source| DeviceError::Host { what: format!("open {SOURCE} for virtio-rnd"), source })?;
    transport::build(context, spec(), |virtio| Rnd::new(virtio, Box::new(source)))
}

fn spec() -> VirtioSpec {
    VirtioSpec {
        name: "virtio-rnd",
        device: 0x1005,
        device_type: 4,
        class: regs::class::ENCRYPTION,
        config_size: 0,
        queues: vec![QUEUE_SIZE],
    }
}

struct Rnd {
    worker: Worker,
}

impl Rnd {
    fn new(context: Arc<VirtioContext>, mut source: Box<dyn Read + Send>) -> Result<Arc<Self>, DeviceError> {
        let address = context.address();
        let name = format!("rnd-{}:{}", address.slot, address.func);
        let worker = Worker::spawn(name, move |_| serve(&context, &mut source))
            .map_err(|source| DeviceError::Host { what: "start the thread of virtio-rnd".into(), source })?;
        Ok(Arc::new(Self { worker }))
    }
}

/// Fills all buffers that wait.
fn serve(context: &VirtioContext, source: &mut dyn Read) {
    let Some(queue) = context.queue(0) else { return };
    context.drain(queue, |chain| {
        let written = fill(context, &chain, source);
        context.complete(chain, written);
    });
}

/// Fills one request; returns how many bytes it got.
fn fill(context: &VirtioContext, chain: &Chain, source: &mut dyn Read) -> u32 {
    let mut rest = chain.writable.clone();
    let mut done = 0;
    let mut bytes = [0; CHUNK];
    while !rest.is_empty() && done < MAX_BYTES {
        let want = CHUNK.min(MAX_BYTES - done);
        let (now, later) = rest.split(want as u64);
        let here = &mut bytes[..now.len() as usize];
        if let Err(why) = source.read_exact(here) {
            context.warn_once(&format!("the host's {SOURCE} gives nothing: {why}"));
            break;
        }
        // The chain's buffers were checked to be in RAM.
        if now.write(context.memory(), here).is_err() {
            break;
        }
        done += here.len();
        rest = later;
    }
    done as u32
}

impl VirtioDevice for Rnd {
    fn features(&self) -> u64 {
        0
    }

    fn config_read(&self, _: u32, _: &mut [u8]) {}

    fn notify(&self, index: u16) {
        self.worker.wake(index);
    }
}

impl Persist for Rnd {
    fn kind(&self) -> &'static str {
        "virtio-rnd"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.worker.wait_idle();
        Ok(Vec::new())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        platform::state::decode(self.kind(), self.version(), version, bytes)
    }

    fn reset(&self) {}
}

#[cfg(test)]
mod tests;
