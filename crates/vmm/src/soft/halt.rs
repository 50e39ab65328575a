//! Notices when no vCPU can ever run again: all are halted with interrupts disabled or wait for a start-up IPI.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use platform::{PowerEvent, PowerSink};

/// Counts vCPUs that only another vCPU could wake.
pub(super) struct HaltWatch {
    cpus: u32,
    dead: AtomicU32,
    power: Arc<dyn PowerSink>,
}

/// One vCPU's part of the count, until dropped.
pub(super) struct Dead<'a>(&'a HaltWatch);

impl HaltWatch {
    pub(super) fn new(cpus: u32, power: Arc<dyn PowerSink>) -> Self {
        Self { cpus, dead: AtomicU32::new(0), power }
    }

    /// Counts the caller in; if it was the last one alive, the VM has halted.
    pub(super) fn enter(&self) -> Dead<'_> {
        if self.dead.fetch_add(1, Ordering::SeqCst) + 1 == self.cpus {
            self.power.request(PowerEvent::Halt);
        }
        Dead(self)
    }
}

impl Drop for Dead<'_> {
    fn drop(&mut self) {
        self.0.dead.fetch_sub(1, Ordering::SeqCst);
    }
}
