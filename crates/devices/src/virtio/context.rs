//! What a virtio device works with: queues, negotiated features, guest memory, interrupts.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use config::pci::PciAddress;
use memory::GuestMemory;

use super::feature;
use super::queue::{Chain, NO_VECTOR, QueueError, VirtQueue};
use crate::pci::PciEndpoint;

/// Bits of the device status (virtio 1.2, 2.1).
pub(crate) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 0x40;
}

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Shared between the transport and the device behind it.
pub struct VirtioContext {
    name: &'static str,
    memory: GuestMemory,
    endpoint: Arc<PciEndpoint>,
    queues: Vec<Arc<VirtQueue>>,
    features: AtomicU64,
    status: AtomicU8,
    config_vector: AtomicU16,
    config_generation: AtomicU8,
    /// Interrupt status. The lock also covers the interrupt pin, so that a read that clears it cannot overtake a
    /// completion that sets it.
    isr: Mutex<u8>,
    warned: AtomicBool,
}

impl VirtioContext {
    pub(crate) fn new(name: &'static str, memory: GuestMemory, endpoint: Arc<PciEndpoint>, sizes: &[u16]) -> Arc<Self> {
        let queues = (0..).zip(sizes).map(|(index, size)| VirtQueue::new(memory.clone(), index, *size)).collect();
        Arc::new(Self {
            name,
            memory,
            endpoint,
            queues,
            features: AtomicU64::new(0),
            status: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            config_generation: AtomicU8::new(0),
            isr: Mutex::new(0),
            warned: AtomicBool::new(false),
        })
    }

    /// Where the device sits.
    pub fn address(&self) -> PciAddress {
        self.endpoint.address()
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Queue `index`.
    pub fn queue(&self, index: u16) -> Option<&Arc<VirtQueue>> {
        self.queues.get(usize::from(index))
    }

    /// All queues.
    pub fn queues(&self) -> &[Arc<VirtQueue>] {
        &self.queues
    }

    /// The features the driver accepted.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// Whether the driver accepted all of `features`.
    pub fn has(&self, features: u64) -> bool {
        self.features() & features == features
    }

    /// Whether the driver has said that it is ready.
    pub fn is_driver_ok(&self) -> bool {
        self.status() & status::DRIVER_OK != 0
    }

    /// Gives a chain back with `written` bytes in its writable buffers, and interrupts if the driver wants that.
    pub fn complete(&self, chain: Chain, written: u32) {
        self.told(chain.queue(), chain.queue().publish([(&chain, written)]));
        // Only now is the chain no longer in flight: a snapshot that waits for that finds the interrupt raised.
        drop(chain);
    }

    /// Gives back chains of one queue, each with the number of bytes written to it, and empties the list. The driver sees
    /// all of them at once, with at most one interrupt.
    pub fn complete_all(&self, queue: &VirtQueue, chains: &mut Vec<(Chain, u32)>) {
        self.told(queue, queue.publish(chains.iter().map(|(chain, written)| (chain, *written))));
        chains.clear();
    }

    fn told(&self, queue: &VirtQueue, wants_interrupt: Result<bool, QueueError>) {
        match wants_interrupt {
            Ok(true) => self.interrupt_queue(queue),
            Ok(false) => {}
            Err(why) => self.fail(queue, &why),
        }
    }

    /// Takes the next chain of a queue. After a breach of the protocol the queue stops and there is none.
    pub fn pop(&self, queue: &Arc<VirtQueue>) -> Option<Chain> {
        queue.pop().unwrap_or_else(|why| {
            self.fail(queue, &why);
            None
        })
    }

    /// Gives every chain of a queue to `take`, then lets the driver notify of the next one; ends when there is none.
    pub fn drain(&self, queue: &Arc<VirtQueue>, mut take: impl FnMut(Chain)) {
        loop {
            queue.suppress_notifications();
            while let Some(chain) = self.pop(queue) {
                take(chain);
            }
            if !queue.enable_notifications() {
                return;
            }
        }
    }

    /// Stops a queue whose driver broke the protocol, and tells a modern driver that the device needs a reset.
    pub fn fail(&self, queue: &VirtQueue, why: &QueueError) {
        queue.set_broken();
        self.warn_once(&format!("queue {} stops until the guest resets the device: {}", queue.index(), chain_of(why)));
        if self.has(feature::VERSION_1) {
            let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
            if before & status::NEEDS_RESET == 0 && before & status::DRIVER_OK != 0 {
                self.interrupt_config();
            }
        }
    }

    /// Says something about what the guest does, once per device.
    pub fn warn_once(&self, what: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!("{} in pci slot {}: {what} (further cases are not reported)", self.name, self.address());
        }
    }

    /// Tells the driver that the device's configuration changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        if self.status() & status::DRIVER_OK != 0 {
            self.interrupt_config();
        }
    }

    /// Tells the driver that buffers of a queue have been used, by whoever serves it.
    pub(crate) fn interrupt_queue(&self, queue: &VirtQueue) {
        self.interrupt(queue.vector(), ISR_QUEUE);
    }

    fn interrupt_config(&self) {
        self.interrupt(self.config_vector.load(Ordering::Relaxed), ISR_CONFIG);
    }

    fn interrupt(&self, vector: u16, isr_bit: u8) {
        if self.endpoint.msix_enabled() {
            if vector != NO_VECTOR {
                self.endpoint.send_msix(vector);
            }
            return;
        }
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr |= isr_bit;
        self.endpoint.send_msi(0);
        self.endpoint.set_intx(true);
    }

    /// Reads the interrupt status, which clears it and the pin.
    pub(crate) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        self.endpoint.set_intx(false);
        std::mem::take(&mut *isr)
    }

    pub(crate) fn isr(&self) -> u8 {
        *self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over a restored interrupt status; the pin is restored with the PCI function.
    pub(crate) fn restore_isr(&self, value: u8) {
        *self.isr.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }

    pub(crate) fn endpoint(&self) -> &PciEndpoint {
        &self.endpoint
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
        for queue in &self.queues {
            queue.set_features(features);
        }
    }

    pub(crate) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Writes the status; that the device needs a reset stays visible.
    pub(crate) fn set_status(&self, value: u8) {
        let update = |old: u8| Some(value | old & status::NEEDS_RESET);
        // The closure never declines.
        let _ = self.status.fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
    }

    pub(crate) fn config_generation(&self) -> u8 {
        self.config_generation.load(Ordering::Acquire)
    }

    pub(crate) fn set_config_generation(&self, generation: u8) {
        self.config_generation.store(generation, Ordering::Release);
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::Relaxed);
    }

    /// The vector a driver may use: one the table has, or none.
    pub(crate) fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.endpoint.msix_vectors() { vector } else { NO_VECTOR }
    }

    /// Everything the transport keeps here, back to power-on. All queues are closed.
    pub(crate) fn clear(&self) {
        self.set_features(0);
        self.set_config_vector(NO_VECTOR);
        self.set_config_generation(0);
        self.take_isr();
        self.status.store(0, Ordering::Release);
    }
}

/// An error with its causes, as one line.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}
