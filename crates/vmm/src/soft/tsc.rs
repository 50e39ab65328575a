//! The guest's time-stamp counter: the host's, counted from the start of the VM.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cpu::HostCounter;
use irqchip::TscSource;

/// The counter that all vCPUs share.
pub(super) struct HostTsc {
    base: u64,
    /// The highest value any vCPU has seen: no vCPU sees an earlier one afterwards, whatever the host's processors do.
    highest: AtomicU64,
}

/// How long the frequency is measured, once per process.
const MEASURE: Duration = Duration::from_millis(4);

impl HostTsc {
    pub(super) fn start() -> Self {
        frequency();
        Self { base: counter(), highest: AtomicU64::new(0) }
    }

    /// For translated code, where the counter is the processor's.
    pub(super) fn host_counter(&self) -> Option<HostCounter<'_>> {
        cfg!(target_arch = "x86_64").then_some(HostCounter { base: self.base, highest: &self.highest })
    }
}

impl TscSource for HostTsc {
    fn tsc(&self) -> u64 {
        let now = counter().wrapping_sub(self.base);
        self.highest.fetch_max(now, Ordering::SeqCst).max(now)
    }

    fn hz(&self) -> u64 {
        frequency()
    }
}

/// The host's counter.
#[inline]
pub(super) fn counter() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        raw::rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

#[cfg(target_arch = "x86_64")]
mod raw {
    #![allow(unsafe_code)]

    #[inline]
    pub(super) fn rdtsc() -> u64 {
        // SAFETY: every x86-64 processor has LFENCE and RDTSC, and they have no side effects. The fence keeps the counter from being
        // read before what the guest did before it.
        unsafe {
            std::arch::x86_64::_mm_lfence();
            std::arch::x86_64::_rdtsc()
        }
    }
}

/// A moment on both clocks: of several attempts the one that took least, so that a preemption in between spoils none.
fn both_clocks() -> (Instant, u64) {
    let attempt = || {
        let (before, now, after) = (counter(), Instant::now(), counter());
        let took = after.wrapping_sub(before);
        (took, now, before.wrapping_add(took / 2))
    };
    let mut best = attempt();
    for _ in 0..15 {
        let next = attempt();
        if next.0 < best.0 {
            best = next;
        }
    }
    (best.1, best.2)
}

/// Its frequency in Hz, measured against the monotonic clock.
fn frequency() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let (start, first) = both_clocks();
        while start.elapsed() < MEASURE {
            std::hint::spin_loop();
        }
        let (end, last) = both_clocks();
        let (ns, ticks) = ((end - start).as_nanos(), u128::from(last.wrapping_sub(first)));
        u64::try_from(ticks * 1_000_000_000 / ns.max(1)).unwrap_or(1_000_000_000).max(1_000_000)
    })
}
