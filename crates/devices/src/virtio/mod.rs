//! virtio devices (Virtual I/O Device 1.2, and the legacy interface of 0.9.5) on PCI.
//!
//! | module | what it does |
//! |---|---|
//! | [`queue`], [`chain`] | the split virtqueue, and the validation of what a guest puts on it |
//! | [`buffers`] | scatter lists of guest memory, and copies in and out of them |
//! | `completions` | requests that are done, given back many at a time |
//! | [`context`] | what a device works with: its queues, the negotiated features, interrupts |
//! | [`transport`] | the registers in the PCI function's BARs, legacy and modern |
//! | `vhost` | queues that another process serves |
//! | [`worker`] | a thread that sleeps until a queue has work |
//! | [`balloon`], [`blk`], [`console`], [`fs`], [`input`], [`net`], [`p9`], [`rnd`], [`scsi`], [`vsock`] | the devices |
//!
//! Threads. A doorbell write calls [`VirtioDevice::notify`] on the vCPU thread and returns at once; the work is done on
//! a [`worker::Worker`] or on the back end's threads. A reset first closes the queues, so that late completions go
//! nowhere, then waits until every chain that was popped has been given back: after that no thread touches guest memory.
//!
//! Lock order: transport registers → queue; transport registers → interrupt state → PCI endpoint. Device threads never
//! take the transport's registers.

use platform::Persist;

pub mod balloon;
pub mod blk;
pub mod buffers;
pub mod chain;
mod completions;
pub mod console;
pub mod context;
pub mod fs;
pub mod input;
pub mod net;
pub mod p9;
pub mod queue;
pub mod rnd;
pub mod scsi;
pub mod transport;
mod vhost;
pub mod vsock;
pub mod worker;

pub use buffers::Buffers;
pub use context::VirtioContext;
pub use queue::{Chain, QueueError, VirtQueue};
pub use transport::VirtioSpec;

/// Feature bits of the transport (virtio 1.2, chapter 6).
pub mod feature {
    /// The device interrupts when it has used all buffers, even if interrupts are suppressed (legacy only).
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// Descriptor layout is free (legacy only; always so in the modern interface).
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// Descriptors may refer to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index instead of by flag.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The modern interface.
    pub const VERSION_1: u64 = 1 << 32;
    /// Single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;
}

/// What distinguishes one kind of virtio device from another.
///
/// Methods are called on vCPU threads. `reset` (of [`Persist`]) is called with all queues closed; it abandons what is
/// queued up inside the device, while work that is under way may finish. `save` first waits until nothing is under way.
pub trait VirtioDevice: Persist {
    /// Features of the device in the modern interface.
    fn features(&self) -> u64;

    /// Features of the device in the legacy interface; those from bit 32 do not exist there.
    fn legacy_features(&self) -> u64 {
        self.features()
    }

    /// Features of the transport ([`feature`]) that the device can live with: all, unless others serve its queues.
    fn transport_features(&self) -> u64 {
        u64::MAX
    }

    /// Reads configuration at `offset`; what lies beyond the end stays as it is.
    fn config_read(&self, offset: u32, bytes: &mut [u8]);

    /// Writes configuration at `offset`.
    fn config_write(&self, offset: u32, bytes: &[u8]) {
        let _ = (offset, bytes);
    }

    /// The driver is ready: the features are settled. Also called when a saved device goes on.
    fn start(&self) {}

    /// The guest has put buffers on queue `index` (or may have). Returns at once.
    fn notify(&self, index: u16);
}

/// Copies the part of a device's configuration structure that a read asks for.
pub fn read_structure(structure: &[u8], offset: u32, bytes: &mut [u8]) {
    let from = structure.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
    for (to, from) in bytes.iter_mut().zip(from) {
        *to = *from;
    }
}
