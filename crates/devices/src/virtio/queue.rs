//! The split virtqueue (virtio 1.2, 2.7), device side. The guest owns the rings and may write anything into them at any
//! time; nothing here trusts an index, a length or an address before it is checked.

use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memory::{GuestMemory, MemoryError};
use serde::{Deserialize, Serialize};

use super::buffers::Buffers;
use super::chain::{ChainError, Table, walk};
use super::feature;

/// Vector number that means "no interrupt".
pub const NO_VECTOR: u16 = 0xffff;

/// Largest size of a queue.
pub const MAX_QUEUE_SIZE: u16 = 32768;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// What is wrong with a queue. It stops until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// More buffers are announced than the queue has.
    #[error("the driver announced {0} new buffers on a queue of {1}")]
    Index(u16, u16),
    /// The rings are not in RAM, or misaligned.
    #[error("the rings cannot be accessed")]
    Ring(#[from] MemoryError),
    /// A chain breaks the rules.
    #[error("the driver made a bad descriptor chain")]
    Chain(#[from] ChainError),
}

/// Where the driver put the rings, and how far both sides have come: what of a queue survives a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct QueueState {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) ready: bool,
    /// The driver broke the rules: nothing more until a reset.
    pub(crate) broken: bool,
    pub(crate) next_available: u16,
    pub(crate) next_used: u16,
    /// Used index at the last decision about an interrupt, for EVENT_IDX.
    pub(crate) signalled: Option<u16>,
    pub(crate) vector: u16,
}

impl QueueState {
    /// Not set up yet, with the largest size that the device offers.
    fn closed(max_size: u16) -> Self {
        Self {
            size: max_size,
            descriptors: 0,
            available: 0,
            used: 0,
            ready: false,
            broken: false,
            next_available: 0,
            next_used: 0,
            signalled: None,
            vector: NO_VECTOR,
        }
    }
}

/// One virtqueue of a device. It exists as long as the device; the driver sets it up, closes and reopens it.
pub struct VirtQueue {
    memory: GuestMemory,
    index: u16,
    max_size: u16,
    vector: AtomicU16,
    ring: Mutex<Ring>,
    idle: Condvar,
}

struct Ring {
    state: QueueState,
    features: u64,
    /// Counts closings: a chain popped before the last one is stale.
    epoch: u64,
    /// Chains popped and not yet given back.
    in_flight: u32,
}

/// A request from the driver. It is given back with [`VirtioContext::complete`](super::VirtioContext::complete); one
/// that is dropped instead is lost to the driver, which is right only after a reset.
pub struct Chain {
    queue: Arc<VirtQueue>,
    head: u16,
    epoch: u64,
    /// Buffers for the device to read.
    pub readable: Buffers,
    /// Buffers for the device to write.
    pub writable: Buffers,
}

impl VirtQueue {
    pub(crate) fn new(memory: GuestMemory, index: u16, max_size: u16) -> Arc<Self> {
        let max_size = max_size.clamp(1, MAX_QUEUE_SIZE);
        let ring = Mutex::new(Ring { state: QueueState::closed(max_size), features: 0, epoch: 0, in_flight: 0 });
        Arc::new(Self { memory, index, max_size, vector: AtomicU16::new(NO_VECTOR), ring, idle: Condvar::new() })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries of the rings.
    pub fn size(&self) -> u16 {
        self.ring().state.size
    }

    pub(crate) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(crate) fn vector(&self) -> u16 {
        self.vector.load(Ordering::Relaxed)
    }

    pub(crate) fn set_vector(&self, vector: u16) {
        self.vector.store(vector, Ordering::Relaxed);
    }

    pub(crate) fn state(&self) -> QueueState {
        QueueState { vector: self.vector(), ..self.ring().state }
    }

    /// Whether the driver has set it up.
    pub fn is_ready(&self) -> bool {
        let ring = self.ring();
        ring.state.ready && !ring.state.broken
    }

    /// Changes size or addresses; ignored while the queue is in use, as the specification forbids it to drivers.
    pub(crate) fn configure(&self, change: impl FnOnce(&mut QueueState)) {
        let mut ring = self.ring();
        if !ring.state.ready {
            change(&mut ring.state);
        }
    }

    /// Opens the queue with the addresses configured, from the start of the rings.
    pub(crate) fn open(&self, features: u64) {
        let mut ring = self.ring();
        if !ring.state.ready {
            ring.features = features;
            ring.state = QueueState {
                ready: true,
                broken: false,
                next_available: 0,
                next_used: 0,
                signalled: None,
                ..ring.state
            };
        }
    }

    /// Features that a legacy driver negotiated after it set up the queue.
    pub(crate) fn set_features(&self, features: u64) {
        self.ring().features = features;
    }

    /// Closes the queue and forgets its set-up: chains that are out become stale. Follow up with
    /// [`wait_idle`](Self::wait_idle).
    pub(crate) fn close(&self) {
        let mut ring = self.ring();
        ring.epoch += 1;
        ring.state = QueueState::closed(self.max_size);
        self.set_vector(NO_VECTOR);
    }

    /// Takes over a saved state, untrusted.
    pub(crate) fn restore(&self, state: QueueState, features: u64) -> Result<(), String> {
        if state.size == 0 || state.size > self.max_size || !state.size.is_power_of_two() {
            return Err(format!("queue {} of {} entries", self.index, state.size));
        }
        self.set_vector(state.vector);
        let mut ring = self.ring();
        ring.state = state;
        ring.features = features;
        Ok(())
    }

    /// Stops the queue after the driver broke the rules.
    pub(crate) fn set_broken(&self) {
        self.ring().state.broken = true;
    }

    /// Waits until every chain has been given back.
    pub(crate) fn wait_idle(&self) {
        let ring = self.ring();
        drop(self.idle.wait_while(ring, |ring| ring.in_flight > 0));
    }

    /// As [`wait_idle`](Self::wait_idle), for `time` at most; returns whether it is idle.
    pub(crate) fn wait_idle_for(&self, time: Duration) -> bool {
        let ring = self.ring();
        let waited = self.idle.wait_timeout_while(ring, time, |ring| ring.in_flight > 0);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The next chain the driver made available.
    ///
    /// # Errors
    /// The driver broke the rules; the caller reports it with [`VirtioContext::fail`](super::VirtioContext::fail).
    pub fn pop(self: &Arc<Self>) -> Result<Option<Chain>, QueueError> {
        let mut ring = self.ring();
        let QueueState { size, available, next_available, ready, broken, .. } = ring.state;
        if !ready || broken {
            return Ok(None);
        }
        let announced = ring.available_index(&self.memory)?.wrapping_sub(next_available);
        if announced == 0 {
            return Ok(None);
        }
        if announced > size {
            return Err(QueueError::Index(announced, size));
        }
        let slot = offset(available, 4, 2, next_available % size)?;
        let head = self.memory.load_u16(slot, Ordering::Relaxed)?;
        let table = Table { address: ring.state.descriptors, entries: u32::from(size) };
        let indirect = ring.features & feature::INDIRECT_DESC != 0;
        let (readable, writable) = walk(&self.memory, table, head, indirect)?;
        ring.state.next_available = next_available.wrapping_add(1);
        ring.in_flight += 1;
        Ok(Some(Chain { queue: self.clone(), head, epoch: ring.epoch, readable, writable }))
    }

    /// Asks the driver not to notify while the device is looking at the queue anyway. A hint: it may notify still.
    pub fn suppress_notifications(&self) {
        let ring = self.ring();
        if ring.state.ready && ring.features & feature::EVENT_IDX == 0 {
            // A ring that is not there is found by the next pop.
            let _ = self.memory.store_u16(ring.state.used, USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify of the next buffer; returns whether there is one already, so that the caller looks again.
    pub fn enable_notifications(&self) -> bool {
        self.enable_notifications_after(0)
    }

    /// The same, for a caller to whom the next `known` chains are not enough: it wants to know of what follows them.
    pub fn enable_notifications_after(&self, known: u16) -> bool {
        let ring = self.ring();
        if !ring.state.ready || ring.state.broken {
            return false;
        }
        let next = ring.state.next_available.wrapping_add(known);
        let told = if ring.features & feature::EVENT_IDX == 0 {
            self.memory.store_u16(ring.state.used, 0, Ordering::Relaxed)
        } else {
            offset(ring.state.used, 4, 8, ring.state.size)
                .and_then(|at| self.memory.store_u16(at, next, Ordering::Relaxed))
        };
        // The driver publishes buffers and then reads what was just stored; one of the two sees the other's store.
        fence(Ordering::SeqCst);
        told.is_ok() && ring.available_index(&self.memory).is_ok_and(|index| index != next)
    }

    /// Gives back to the driver's side the chains that were popped last, as if they had never been popped.
    pub(crate) fn put_back(&self, chains: impl IntoIterator<Item = Chain>) {
        for chain in chains {
            let mut ring = self.ring();
            if chain.epoch == ring.epoch {
                ring.state.next_available = ring.state.next_available.wrapping_sub(1);
            }
            drop(ring);
        }
    }

    /// Puts chains of this queue on the used ring, all at once, each with the number of bytes written; returns whether
    /// the driver wants an interrupt.
    pub(crate) fn publish<'a>(&self, chains: impl IntoIterator<Item = (&'a Chain, u32)>) -> Result<bool, QueueError> {
        let memory = &self.memory;
        let mut ring = self.ring();
        let QueueState { size, used, ready, broken, .. } = ring.state;
        if !ready || broken {
            return Ok(false);
        }
        let (mut next, mut count) = (ring.state.next_used, 0);
        for (chain, written) in chains.into_iter().filter(|(chain, _)| chain.epoch == ring.epoch) {
            let element = offset(used, 4, 8, next % size)?;
            memory.write_u32(element, u32::from(chain.head))?;
            memory.write_u32(element + 4, written)?;
            next = next.wrapping_add(1);
            count += 1;
        }
        if count == 0 {
            return Ok(false);
        }
        ring.state.next_used = next;
        memory.store_u16(offset(used, 2, 0, 0)?, next, Ordering::Release)?;
        Ok(ring.wants_interrupt(memory, count)?)
    }

    /// Where the rings are and where to begin, for somebody else who serves the queue.
    pub(crate) fn place(&self) -> backend::vhost_user::Ring {
        let QueueState { size, descriptors, available, used, next_available, .. } = self.ring().state;
        backend::vhost_user::Ring { size, descriptors, available, used, base: next_available, enabled: true }
    }

    /// For a queue that somebody else serves: the writable buffers that the driver has offered since index `from` of the
    /// available ring, and the index now. Chains that break the rules are left out.
    pub(crate) fn look_ahead(&self, from: u16) -> (u16, Vec<Buffers>) {
        let ring = self.ring();
        let QueueState { size, available, descriptors, ready, .. } = ring.state;
        let Some(now) = ring.available_index(&self.memory).ok().filter(|_| ready) else { return (from, Vec::new()) };
        let table = Table { address: descriptors, entries: u32::from(size) };
        let indirect = ring.features & feature::INDIRECT_DESC != 0;
        let offered = (0..now.wrapping_sub(from).min(size)).filter_map(|back| {
            let index = now.wrapping_sub(back).wrapping_sub(1);
            let slot = offset(available, 4, 2, index % size).ok()?;
            let head = self.memory.load_u16(slot, Ordering::Relaxed).ok()?;
            walk(&self.memory, table, head, indirect).ok().map(|(_, writable)| writable)
        });
        (now, offered.collect())
    }

    fn give_back(&self) {
        let mut ring = self.ring();
        ring.in_flight = ring.in_flight.saturating_sub(1);
        if ring.in_flight == 0 {
            self.idle.notify_all();
        }
    }
}

impl Ring {
    fn available_index(&self, memory: &GuestMemory) -> Result<u16, MemoryError> {
        memory.load_u16(offset(self.state.available, 2, 0, 0)?, Ordering::Acquire)
    }

    /// Whether the driver wants an interrupt for the buffers used since it was last asked (2.7.7), of which `count` still
    /// count as in flight.
    fn wants_interrupt(&mut self, memory: &GuestMemory, count: u32) -> Result<bool, MemoryError> {
        fence(Ordering::SeqCst);
        let QueueState { size, available, next_available, next_used, .. } = self.state;
        if self.features & feature::NOTIFY_ON_EMPTY != 0
            && self.in_flight <= count
            && self.available_index(memory)? == next_available
        {
            return Ok(true);
        }
        if self.features & feature::EVENT_IDX == 0 {
            let flags = memory.load_u16(available, Ordering::Relaxed)?;
            return Ok(flags & AVAIL_NO_INTERRUPT == 0);
        }
        let event = memory.load_u16(offset(available, 4, 2, size)?, Ordering::Relaxed)?;
        let last = self.state.signalled.replace(next_used);
        Ok(last.is_none_or(|last| next_used.wrapping_sub(event).wrapping_sub(1) < next_used.wrapping_sub(last)))
    }
}

impl Chain {
    /// The queue it came from.
    pub fn queue(&self) -> &Arc<VirtQueue> {
        &self.queue
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.queue.give_back();
    }
}

/// `base + fixed + each * index`, or an error instead of wrapping.
fn offset(base: u64, fixed: u64, each: u64, index: u16) -> Result<u64, MemoryError> {
    let distance = fixed + each * u64::from(index);
    base.checked_add(distance).ok_or(MemoryError::OutsideRam { address: base, len: distance })
}

#[cfg(test)]
mod tests;
