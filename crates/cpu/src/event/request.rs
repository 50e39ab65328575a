//! What other threads ask of a vCPU: an atomic word, looked at before every block, and a condition
//! variable for a vCPU that sleeps.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread;

use crate::jit::quiet::Quiet;

/// Bits of the events word.
pub mod bit {
    /// The local APIC may have something to deliver.
    pub const INTERRUPT: u32 = 1 << 0;
    /// Non-maskable interrupt.
    pub const NMI: u32 = 1 << 1;
    /// INIT.
    pub const INIT: u32 = 1 << 2;
    /// Start-up IPI; the vector is beside the word.
    pub const STARTUP: u32 = 1 << 3;
    /// Leave [`crate::Vcpu::run`].
    pub const STOP: u32 = 1 << 4;
    /// Drop write permissions of pages that hold code now; somebody waits for it.
    pub const SYNC_CODE: u32 = 1 << 5;
    /// Code was written: look again whether what runs is current.
    pub const CODE: u32 = 1 << 6;
}

/// The mailbox of one vCPU.
pub struct Events {
    word: AtomicU32,
    /// Zero while bits are pending; may be zero without, until [`Events::settle`]. There is one once there is a translator.
    quiet: OnceLock<Quiet>,
    startup_vector: AtomicU8,
    /// The vCPU executes guest instructions, so it must acknowledge [`bit::SYNC_CODE`].
    in_guest: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            word: AtomicU32::new(0),
            quiet: OnceLock::new(),
            startup_vector: AtomicU8::new(0),
            in_guest: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }
}

impl Events {
    /// Sets bits and wakes the vCPU if it sleeps.
    pub fn raise(&self, bits: u32) {
        self.word.fetch_or(bits, Ordering::SeqCst);
        self.interrupt_emitted();
        // Taking the lock orders this with a vCPU between its check and its wait.
        drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }

    /// Sets bits for a vCPU that runs; one that sleeps will see them when it wakes.
    fn nudge(&self, bits: u32) {
        self.word.fetch_or(bits, Ordering::SeqCst);
        self.interrupt_emitted();
    }

    fn interrupt_emitted(&self) {
        if let Some(quiet) = self.quiet.get() {
            quiet.set(false);
        }
    }

    /// Sends a start-up IPI.
    pub fn raise_startup(&self, vector: u8) {
        self.startup_vector.store(vector, Ordering::SeqCst);
        self.raise(bit::STARTUP);
    }

    /// The pending bits.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.word.load(Ordering::Relaxed)
    }

    /// The word that emitted code looks at: zero while bits are pending.
    ///
    /// # Errors
    /// The kernel's, from making it.
    pub(crate) fn quiet(&self) -> Result<&Quiet, rustix::io::Errno> {
        if self.quiet.get().is_none() {
            // Of two that were made at once one is used.
            let _ = self.quiet.set(Quiet::new()?);
        }
        self.settle();
        self.quiet.get().ok_or(rustix::io::Errno::NOMEM)
    }

    /// Clears bits; returns which of them were set.
    pub fn take(&self, bits: u32) -> u32 {
        let before = self.word.fetch_and(!bits, Ordering::SeqCst);
        if before & !bits == 0 {
            self.settle();
        }
        before & bits
    }

    /// Brings the word that emitted code looks at in line with the pending bits. A bit raised meanwhile is not missed.
    pub(crate) fn settle(&self) {
        let Some(quiet) = self.quiet.get() else { return };
        if !quiet.get() && self.word.load(Ordering::SeqCst) == 0 {
            quiet.set(true);
            if self.word.load(Ordering::SeqCst) != 0 {
                quiet.set(false);
            }
        }
    }

    pub(crate) fn startup_vector(&self) -> u8 {
        self.startup_vector.load(Ordering::SeqCst)
    }

    /// Sleeps until one of `bits` is pending.
    pub fn wait(&self, bits: u32) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        while self.word.load(Ordering::SeqCst) & bits == 0 {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn enter_guest(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    pub(crate) fn leave_guest(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    fn must_acknowledge(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst) && self.word.load(Ordering::SeqCst) & bit::SYNC_CODE != 0
    }
}

/// What the vCPUs of one VM share.
#[derive(Default)]
pub struct SharedCpus {
    vcpus: Mutex<Vec<Arc<Events>>>,
    bus_lock: Mutex<()>,
    code_lock: Mutex<()>,
    /// A page was marked as code, and vCPUs may still write to it unnoticed.
    claiming: AtomicBool,
}

/// Looks at a vCPU that is to answer before the waiting one lets the host run others: there may be more vCPUs than host CPUs.
const LOOKS: u32 = 100;

impl SharedCpus {
    /// Adds a vCPU.
    pub(crate) fn join(&self, events: Arc<Events>) {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).push(events);
    }

    /// Holds off other vCPUs' split locks and locked MMIO.
    pub(crate) fn bus_lock(&self) -> MutexGuard<'_, ()> {
        self.bus_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every other vCPU look for code that is no longer current, even if it would go round in a loop for ever.
    pub(crate) fn code_written(&self, own: &Arc<Events>) {
        let all = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|events| !Arc::ptr_eq(events, own)).for_each(|events| events.nudge(bit::CODE));
    }

    /// Lets one vCPU at a time turn pages into code. The caller, whose mailbox is `own`, counts as outside the guest while it
    /// waits, so that the holder need not wait for it; then `serve` answers what the holder has asked for.
    pub(crate) fn code_lock(&self, own: &Events, serve: impl FnOnce()) -> MutexGuard<'_, ()> {
        match self.code_lock.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                own.leave_guest();
                let guard = self.code_lock.lock().unwrap_or_else(PoisonError::into_inner);
                own.enter_guest();
                serve();
                guard
            }
        }
    }

    /// Says that a page will be marked as code, until [`SharedCpus::sync_code`] has ended. Only for the holder of the code lock.
    pub(crate) fn begin_claim(&self) {
        self.claiming.store(true, Ordering::SeqCst);
    }

    /// Whether no vCPU can write unnoticed to any page that was marked as code before this call.
    pub(crate) fn is_settled(&self) -> bool {
        !self.claiming.load(Ordering::SeqCst)
    }

    /// Makes every other vCPU drop write permissions of code pages and waits until each has, or is outside the guest
    /// (it will look before it enters). Only for the holder of the code lock.
    pub(crate) fn sync_code(&self, own: &Arc<Events>) {
        let others: Vec<_> = {
            let all = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter().filter(|events| !Arc::ptr_eq(events, own)).cloned().collect()
        };
        for events in &others {
            events.nudge(bit::SYNC_CODE);
        }
        for events in &others {
            let mut looks = 0;
            while events.must_acknowledge() {
                if looks < LOOKS {
                    looks += 1;
                    std::hint::spin_loop();
                } else {
                    thread::yield_now();
                }
            }
        }
        self.claiming.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_the_code_lock_holds_nobody_up() {
        let shared = Arc::new(SharedCpus::default());
        let [own, other] = [(); 2].map(|()| Arc::new(Events::default()));
        for events in [&own, &other] {
            shared.join(events.clone());
            events.enter_guest();
        }
        let guard = shared.code_lock(&own, || panic!("nobody has asked"));
        shared.begin_claim();
        assert!(!shared.is_settled());
        let waiter = {
            let (shared, other) = (shared.clone(), other.clone());
            thread::spawn(move || {
                let mut served = false;
                drop(shared.code_lock(&other, || served = other.take(bit::SYNC_CODE) != 0));
                served
            })
        };
        // Ends as soon as the other one waits.
        shared.sync_code(&own);
        assert!(shared.is_settled());
        drop(guard);
        assert!(waiter.join().unwrap(), "it answers before it goes on");
        assert!(own.in_guest.load(Ordering::SeqCst) && other.in_guest.load(Ordering::SeqCst));
    }
}
