//! The guest's time-stamp counter: the host's, counted from the start of the VM.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use irqchip::TscSource;

/// The counter that all vCPUs share.
pub(super) struct HostTsc {
    base: u64,
}

/// How long the frequency is measured, once per process.
const MEASURE: Duration = Duration::from_millis(4);

impl HostTsc {
    pub(super) fn start() -> Self {
        frequency();
        Self { base: counter() }
    }
}

impl TscSource for HostTsc {
    fn tsc(&self) -> u64 {
        counter().wrapping_sub(self.base)
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
        // SAFETY: every x86-64 processor has RDTSC, and it has no side effects.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
}

/// Its frequency in Hz, measured against the monotonic clock.
fn frequency() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let (start, first) = (Instant::now(), counter());
        while start.elapsed() < MEASURE {
            std::hint::spin_loop();
        }
        let (ns, ticks) = (start.elapsed().as_nanos(), u128::from(counter().wrapping_sub(first)));
        u64::try_from(ticks * 1_000_000_000 / ns.max(1)).unwrap_or(1_000_000_000).max(1_000_000)
    })
}
