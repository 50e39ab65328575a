//! Rate limits: requests and bytes per second, in front of any engine.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::request::{Call, Engine, Work};

/// Unused allowance is kept for this long, so that short bursts pass unhindered.
const BURST: Duration = Duration::from_millis(100);

/// What a disk may do in a second; 0: no limit.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Requests.
    pub iops: u64,
    /// Bytes read and written.
    pub bps: u64,
}

impl Limits {
    /// Whether there is a limit.
    pub(super) fn is_some(self) -> bool {
        self.iops > 0 || self.bps > 0
    }

    /// How long a request of so many bytes uses the disk up.
    fn cost(self, bytes: u64) -> Duration {
        let share = |amount: u64, rate: u64| if rate == 0 { 0.0 } else { amount as f64 / rate as f64 };
        Duration::from_secs_f64(share(1, self.iops).max(share(bytes, self.bps)).min(3600.0))
    }
}

/// An engine that passes requests on to another, no faster than it may.
pub(super) struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    inner: Arc<dyn Engine>,
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: VecDeque<Work>,
    /// When everything that was passed on is paid for.
    paid: Instant,
    stop: bool,
}

impl Throttle {
    /// Starts the thread that passes delayed requests on.
    ///
    /// # Errors
    /// The host gives none.
    pub(super) fn start(inner: Arc<dyn Engine>, limits: Limits, name: &str) -> io::Result<Self> {
        let state = Mutex::new(State { waiting: VecDeque::new(), paid: Instant::now(), stop: false });
        let shared = Arc::new(Shared { inner, limits, state, changed: Condvar::new() });
        let theirs = shared.clone();
        let thread = thread::Builder::new().name(format!("{name}-limit")).spawn(move || theirs.serve())?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.state();
        while !state.stop {
            let now = Instant::now();
            state = if state.waiting.is_empty() {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else if let Some(early) = state.paid.checked_duration_since(now).filter(|early| !early.is_zero()) {
                self.changed.wait_timeout(state, early).unwrap_or_else(PoisonError::into_inner).0
            } else {
                let next = state.pass(self.limits, now);
                if let Some(work) = next {
                    drop(state);
                    self.inner.submit(work);
                    state = self.state();
                }
                if state.waiting.is_empty() {
                    self.changed.notify_all();
                }
                state
            };
        }
    }
}

impl State {
    /// Takes the next request and has it paid for.
    fn pass(&mut self, limits: Limits, now: Instant) -> Option<Work> {
        let work = self.waiting.pop_front()?;
        self.pay(limits, now, &work);
        Some(work)
    }

    fn pay(&mut self, limits: Limits, now: Instant, work: &Work) {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.paid = self.paid.max(earliest) + limits.cost(work.command.bytes());
    }
}

impl Engine for Throttle {
    fn submit(&self, work: Work) {
        let mut state = self.shared.state();
        let now = Instant::now();
        if state.waiting.is_empty() && state.paid <= now {
            state.pay(self.shared.limits, now, &work);
            drop(state);
            return self.shared.inner.submit(work);
        }
        state.waiting.push_back(work);
        drop(state);
        self.shared.changed.notify_all();
    }

    fn defer(&self, call: Call) {
        self.shared.inner.defer(call);
    }

    fn cancel_queued(&self) {
        let waiting = std::mem::take(&mut self.shared.state().waiting);
        waiting.into_iter().for_each(Work::cancel);
        self.shared.changed.notify_all();
        self.shared.inner.cancel_queued();
    }

    fn wait_idle(&self) {
        loop {
            // A deferred call may submit more.
            self.shared.inner.wait_idle();
            let state = self.shared.state();
            if state.waiting.is_empty() {
                drop(state);
                return self.shared.inner.wait_idle();
            }
            drop(self.shared.changed.wait_while(state, |state| !state.waiting.is_empty()));
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.stop = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.shared.changed.notify_all();
        drop(waiting);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}
