//! A clock that moves only when a test says so.
//!
//! Callbacks run on the thread that moves the clock, one after another, in the order of their deadlines and, for equal
//! deadlines, in the order they were armed. Arming never runs a callback, as [`Timer::arm`] promises: a deadline already
//! past runs out at the next [`FakeClock::advance`], be it by 0 ns.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use platform::{Clock, TimeSource, Timer, TimerCallback};

/// Callbacks that one [`FakeClock::advance`] may run before the test is taken for stuck.
const STORM: u64 = 1_000_000;

/// The clock. Starts at 0 ns, at 2001-09-09 01:46:40 UTC, in a place that keeps UTC.
#[derive(Clone)]
pub struct FakeClock {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
}

struct State {
    now_ns: u64,
    wall_start_ns: u64,
    local_offset_s: i64,
    next_id: u64,
    next_order: u64,
    armed: BTreeMap<(u64, u64), (u64, Arc<TimerCallback>)>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn disarm(&mut self, id: u64) {
        self.armed.retain(|_, (other, _)| *other != id);
    }

    fn take_due(&mut self, until_ns: u64) -> Option<Arc<TimerCallback>> {
        let first = self.armed.first_entry()?;
        let deadline = first.key().0;
        if deadline > until_ns {
            return None;
        }
        let (_, callback) = first.remove();
        self.now_ns = self.now_ns.max(deadline);
        Some(callback)
    }
}

impl FakeClock {
    /// A clock at 0 ns.
    #[must_use]
    pub fn new() -> Self {
        let state = State {
            now_ns: 0,
            wall_start_ns: 1_000_000_000_000_000_000,
            local_offset_s: 0,
            next_id: 0,
            next_order: 0,
            armed: BTreeMap::new(),
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state) }) }
    }

    /// Moves the clock by `ns`, running every timer that comes due on the way at the moment it is due.
    ///
    /// # Panics
    /// A million timers ran out: something re-arms itself for the same moment for ever.
    pub fn advance(&self, ns: u64) {
        let until = self.shared.lock().now_ns.saturating_add(ns);
        let mut fired = 0;
        loop {
            let due = self.shared.lock().take_due(until);
            let Some(callback) = due else { break };
            callback();
            fired += 1;
            assert!(fired < STORM, "timer storm: {STORM} timers ran out before {until} ns");
        }
        let mut state = self.shared.lock();
        state.now_ns = state.now_ns.max(until);
    }

    /// Moves the clock to the next deadline and runs what is due there; `false` if no timer is armed.
    pub fn advance_to_next(&self) -> bool {
        let Some(deadline) = self.next_deadline_ns() else { return false };
        let now = self.now_ns();
        self.advance(deadline.saturating_sub(now));
        true
    }

    /// The earliest armed deadline.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.shared.lock().armed.keys().next().map(|(deadline, _)| *deadline)
    }

    /// Number of armed timers.
    pub fn armed(&self) -> usize {
        self.shared.lock().armed.len()
    }

    /// Sets the wall clock: nanoseconds since 1970 as of now.
    pub fn set_wall_ns(&self, wall_ns: u64) {
        let mut state = self.shared.lock();
        state.wall_start_ns = wall_ns.wrapping_sub(state.now_ns);
    }

    /// Sets the offset of local time from UTC, in seconds.
    pub fn set_local_offset_s(&self, seconds: i64) {
        self.shared.lock().local_offset_s = seconds;
    }
}

impl Default for FakeClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.shared.lock().now_ns
    }

    fn wall_ns(&self) -> u64 {
        let state = self.shared.lock();
        state.wall_start_ns.wrapping_add(state.now_ns)
    }

    fn local_offset_s(&self) -> i64 {
        self.shared.lock().local_offset_s
    }
}

impl TimeSource for FakeClock {
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer> {
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        Box::new(FakeTimer { clock: Arc::downgrade(&self.shared), id, callback: Arc::new(callback) })
    }
}

struct FakeTimer {
    clock: Weak<Shared>,
    id: u64,
    callback: Arc<TimerCallback>,
}

impl Timer for FakeTimer {
    fn arm(&self, deadline_ns: u64) {
        let Some(clock) = self.clock.upgrade() else { return };
        let mut state = clock.lock();
        state.disarm(self.id);
        let order = state.next_order;
        state.next_order += 1;
        state.armed.insert((deadline_ns, order), (self.id, self.callback.clone()));
    }

    fn disarm(&self) {
        if let Some(clock) = self.clock.upgrade() {
            clock.lock().disarm(self.id);
        }
    }
}

impl Drop for FakeTimer {
    fn drop(&mut self) {
        self.disarm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::OnceLock;

    type Log = Arc<Mutex<Vec<(&'static str, u64)>>>;

    fn logger(clock: &FakeClock, log: &Log, name: &'static str) -> Box<dyn Timer> {
        let (log, reader) = (log.clone(), clock.clone());
        clock.timer(Box::new(move || log.lock().unwrap().push((name, reader.now_ns()))))
    }

    #[test]
    fn timers_run_out_in_order_at_their_moment() {
        let (clock, log) = (FakeClock::new(), Log::default());
        let (a, b, c) = (logger(&clock, &log, "a"), logger(&clock, &log, "b"), logger(&clock, &log, "c"));
        a.arm(30);
        b.arm(10);
        c.arm(10);
        clock.advance(9);
        assert!(log.lock().unwrap().is_empty());
        clock.advance(100);
        assert_eq!(*log.lock().unwrap(), [("b", 10), ("c", 10), ("a", 30)]);
        assert_eq!(clock.now_ns(), 109);
        assert_eq!(clock.armed(), 0, "timers are one-shot");
    }

    #[test]
    fn rearming_replaces_and_dropping_disarms() {
        let (clock, log) = (FakeClock::new(), Log::default());
        let (a, b) = (logger(&clock, &log, "a"), logger(&clock, &log, "b"));
        a.arm(10);
        a.arm(20);
        b.arm(5);
        drop(b);
        assert_eq!(clock.next_deadline_ns(), Some(20));
        a.disarm();
        assert!(!clock.advance_to_next());
        a.arm(0);
        assert!(log.lock().unwrap().is_empty(), "arming never runs a callback");
        clock.advance(0);
        assert_eq!(*log.lock().unwrap(), [("a", 0)]);
    }

    #[test]
    fn a_callback_may_rearm_its_own_timer() {
        let (clock, log) = (FakeClock::new(), Log::default());
        let timer: Arc<OnceLock<Box<dyn Timer>>> = Arc::default();
        let (weak, reader, sink) = (Arc::downgrade(&timer), clock.clone(), log.clone());
        let periodic = clock.timer(Box::new(move || {
            sink.lock().unwrap().push(("tick", reader.now_ns()));
            weak.upgrade().unwrap().get().unwrap().arm(reader.now_ns() + 10);
        }));
        periodic.arm(10);
        assert!(timer.set(periodic).is_ok());
        clock.advance(35);
        assert_eq!(*log.lock().unwrap(), [("tick", 10), ("tick", 20), ("tick", 30)]);
    }

    #[test]
    fn the_wall_clock_follows() {
        let clock = FakeClock::new();
        clock.advance(7);
        clock.set_wall_ns(1_000);
        clock.set_local_offset_s(-3600);
        clock.advance(5);
        assert_eq!((clock.wall_ns(), clock.local_offset_s()), (1_005, -3600));
    }
}
