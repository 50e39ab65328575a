//! Time comes from a handle, so that tests can move it.

use std::sync::Arc;

/// Reads clocks.
pub trait Clock: Send + Sync {
    /// Nanoseconds since an arbitrary start; never goes back.
    fn now_ns(&self) -> u64;
    /// Nanoseconds since 1970-01-01 00:00:00 UTC.
    fn wall_ns(&self) -> u64;
    /// Offset of local time from UTC, in seconds (for a real-time clock that keeps local time).
    fn local_offset_s(&self) -> i64;
}

/// Called when a timer runs out; must be quick and must not block.
pub type TimerCallback = Box<dyn Fn() + Send + Sync>;

/// A one-shot timer. Dropping it disarms it.
pub trait Timer: Send + Sync {
    /// (Re-)arms the timer for the moment [`Clock::now_ns`] reaches `deadline_ns`; a moment already past runs out at once.
    /// The callback runs on another thread, never inside this call, so it is safe to arm while holding a lock that
    /// the callback takes.
    fn arm(&self, deadline_ns: u64);
    /// Disarms the timer. A callback that has already begun may still be running.
    fn disarm(&self);
}

/// A clock that also makes timers.
pub trait TimeSource: Clock {
    /// A disarmed timer that will call `callback`.
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer>;
}

/// `now` in ticks of a clock of `hz`, without overflow for any `u64` time and frequency up to 2^40 Hz.
pub fn ns_to_ticks(ns: u64, hz: u64) -> u64 {
    (u128::from(ns) * u128::from(hz) / 1_000_000_000) as u64
}

/// Nanoseconds that `ticks` of a clock of `hz` take, rounded up; saturates.
pub fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(hz.max(1)));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// A shared time source, as devices hold it.
pub type SharedTime = Arc<dyn TimeSource>;
