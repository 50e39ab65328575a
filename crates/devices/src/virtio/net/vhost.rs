//! A NIC whose packets another process handles: a switch that speaks vhost-user.
//!
//! The queues for packets are the switch's; the control queue, which there is with several pairs of queues only, is ours.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};

use backend::net::NicOptions;
use backend::vhost_user::Frontend;
use platform::state::{decode, encode};
use platform::{Persist, StateError};

use super::{bit, device, spec};
use crate::factory::{BuildContext, DeviceError};
use crate::pci::PciFunction;
use crate::virtio::vhost::VhostQueues;
use crate::virtio::worker::Worker;
use crate::virtio::{Chain, VirtioContext, VirtioDevice, feature, read_structure, transport};

/// Features that are between the driver and the switch.
const THEIRS: u64 = bit::CSUM
    | bit::GUEST_CSUM
    | bit::GUEST_TSO4
    | bit::GUEST_TSO6
    | bit::GUEST_ECN
    | bit::GUEST_UFO
    | bit::HOST_TSO4
    | bit::HOST_TSO6
    | bit::HOST_ECN
    | bit::HOST_UFO
    | bit::MRG_RXBUF;

/// The command that sets the number of pairs in use (virtio 1.2, 5.1.6.5.6).
const SET_PAIRS: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERROR: u8 = 1;

/// Makes a NIC on the switch that listens at `path`.
pub(super) fn build(
    context: &BuildContext<'_>,
    options: &NicOptions,
    path: &Path,
) -> Result<Arc<PciFunction>, DeviceError> {
    let frontend = Frontend::connect(path, 2 * usize::from(options.queues), context.memory.clone())?;
    // One that does not say has one pair.
    let limit = frontend.queue_limit().unwrap_or(1);
    if u64::from(options.queues) > limit.max(1) {
        let (queues, path) = (options.queues, path.display());
        return Err(DeviceError::Other(format!(
            "queues={queues}: the vhost-user back end at {path} serves no more than {limit} pairs of queues"
        )));
    }
    transport::build(context, spec(options.queues), |virtio| VhostNet::new(virtio, frontend, options))
}

struct VhostNet {
    context: Arc<VirtioContext>,
    queues: VhostQueues,
    options: NicOptions,
    /// Pairs in use.
    pairs: AtomicU16,
    /// The switch is there.
    link: Arc<AtomicBool>,
    /// Serves the control queue.
    worker: OnceLock<Worker>,
}

impl VhostNet {
    fn new(context: Arc<VirtioContext>, frontend: Frontend, options: &NicOptions) -> Result<Arc<Self>, DeviceError> {
        let link = Arc::new(AtomicBool::new(true));
        let (theirs, their_link) = (context.clone(), link.clone());
        let here = move |here: bool| {
            their_link.store(here, Ordering::Relaxed);
            let what = if here { "is there again" } else { "has gone" };
            log::warn!("virtio-net in pci slot {}: the vhost-user back end {what}", theirs.address());
            theirs.config_changed();
        };
        let net = Arc::new(Self {
            queues: VhostQueues::new(context.clone(), frontend, options.name.clone(), true, here)?,
            context,
            options: options.clone(),
            pairs: AtomicU16::new(1),
            link,
            worker: OnceLock::new(),
        });
        net.set_pairs(1);
        let weak = Arc::downgrade(&net);
        let name = format!("{}-control", options.name);
        let serve = move |_| {
            if let Some(net) = weak.upgrade() {
                net.serve_control();
            }
        };
        let worker = Worker::spawn(name, serve)
            .map_err(|source| DeviceError::Host { what: "start a thread of virtio-net".into(), source })?;
        // The cell was empty: it was made a moment ago.
        let _ = net.worker.set(worker);
        Ok(net)
    }

    fn has_control(&self) -> bool {
        self.options.queues > 1 && self.context.has(bit::CTRL_VQ)
    }

    /// Without multi-queue, the control queue comes right after the first pair (5.1.2).
    fn control_index(&self) -> u16 {
        if self.context.has(bit::MQ) { 2 * self.options.queues } else { 2 }
    }

    fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Relaxed);
        self.queues.enable((1 << (2 * pairs)) - 1);
    }

    fn serve_control(&self) {
        let Some(queue) = self.context.queue(self.control_index()).filter(|_| self.has_control()) else { return };
        self.context.drain(queue, |chain| {
            let answer = if self.command(&chain) { OK } else { ERROR };
            // The chain's buffers were checked to be in RAM.
            let written = chain.writable.write(self.context.memory(), &[answer]).unwrap_or(0);
            self.context.complete(chain, written as u32);
        });
    }

    fn command(&self, chain: &Chain) -> bool {
        let mut bytes = [0; 4];
        let count = chain.readable.read(self.context.memory(), &mut bytes).unwrap_or(0);
        let [class, code, low, high] = bytes;
        let pairs = u16::from_le_bytes([low, high]);
        let good = count == bytes.len() && [class, code] == SET_PAIRS && self.context.has(bit::MQ);
        if good && (1..=self.options.queues).contains(&pairs) {
            self.set_pairs(pairs);
            return true;
        }
        false
    }
}

impl VirtioDevice for VhostNet {
    fn features(&self) -> u64 {
        let several = if self.options.queues > 1 { bit::MQ | bit::CTRL_VQ } else { 0 };
        self.legacy_features() | several
    }

    fn legacy_features(&self) -> u64 {
        let mtu = if self.options.mtu.is_some() { bit::MTU } else { 0 };
        self.queues.features() & THEIRS | bit::MAC | bit::STATUS | mtu
    }

    fn transport_features(&self) -> u64 {
        self.queues.features() & !feature::RING_RESET
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let link = self.link.load(Ordering::Relaxed);
        let structure = device::structure(self.options.mac.0, link, self.options.queues, self.options.mtu);
        read_structure(&structure, offset, bytes);
    }

    fn notify(&self, index: u16) {
        if !self.has_control() || index != self.control_index() {
            self.queues.notify(index);
        } else if let Some(worker) = self.worker.get() {
            worker.wake(index);
        }
    }
}

impl Persist for VhostNet {
    fn kind(&self) -> &'static str {
        "virtio-net-vhost"
    }

    fn version(&self) -> u32 {
        1
    }

    /// How far the switch is in the queues is known to it alone, so only a NIC out of use can be saved.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.worker.get().into_iter().for_each(Worker::wait_idle);
        if self.queues.is_running() {
            let why = "its queues are in the hands of the vhost-user back end".into();
            return Err(StateError::Invalid { kind: self.kind(), why });
        }
        encode(self.kind(), &self.pairs.load(Ordering::Relaxed))
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let pairs: u16 = decode(self.kind(), self.version(), version, bytes)?;
        if !(1..=self.options.queues).contains(&pairs) {
            return Err(StateError::Invalid { kind: self.kind(), why: "more queues than there are".into() });
        }
        self.set_pairs(pairs);
        Ok(())
    }

    fn reset(&self) {
        self.worker.get().into_iter().for_each(Worker::wait_idle);
        self.queues.reset();
        self.set_pairs(1);
    }
}

#[cfg(test)]
mod tests;
