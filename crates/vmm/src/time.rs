//! The host's clocks, and one thread that runs all timers of a VM. The thread sleeps until the next deadline.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use platform::{Clock, TimeSource, Timer, TimerCallback};

/// The host's time.
pub struct HostTime {
    start: Instant,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// By deadline and timer id.
    armed: BTreeMap<(u64, u64), Arc<TimerCallback>>,
    next_id: u64,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostTime {
    /// Starts the timer thread.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let time = Arc::new(Self { start: Instant::now(), shared: Arc::default() });
        let (start, shared) = (time.start, time.shared.clone());
        std::thread::Builder::new().name("timers".into()).spawn(move || serve(start, &shared))?;
        Ok(time)
    }
}

impl Drop for HostTime {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
    }
}

fn elapsed_ns(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Runs callbacks as they fall due, without the lock held.
fn serve(start: Instant, shared: &Shared) {
    let mut queue = shared.lock();
    while !queue.stop {
        let now = elapsed_ns(start);
        match queue.armed.first_key_value().map(|(&key, _)| key) {
            None => queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            Some((deadline, _)) if deadline > now => {
                let wait = Duration::from_nanos(deadline - now);
                queue = shared.changed.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
            Some(key) => {
                if let Some(callback) = queue.armed.remove(&key) {
                    drop(queue);
                    callback();
                    queue = shared.lock();
                }
            }
        }
    }
}

impl Clock for HostTime {
    fn now_ns(&self) -> u64 {
        elapsed_ns(self.start)
    }

    fn wall_ns(&self) -> u64 {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
    }

    fn local_offset_s(&self) -> i64 {
        local::offset_s()
    }
}

impl TimeSource for HostTime {
    fn timer(&self, callback: TimerCallback) -> Box<dyn Timer> {
        let id = {
            let mut queue = self.shared.lock();
            queue.next_id += 1;
            queue.next_id
        };
        let shared = Arc::downgrade(&self.shared);
        Box::new(HostTimer { shared, callback: Arc::new(callback), id, armed: Mutex::new(None) })
    }
}

struct HostTimer {
    shared: Weak<Shared>,
    callback: Arc<TimerCallback>,
    id: u64,
    armed: Mutex<Option<u64>>,
}

impl HostTimer {
    fn set(&self, deadline: Option<u64>) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut queue = shared.lock();
        let earliest = queue.armed.first_key_value().map(|(key, _)| key.0);
        if let Some(old) = armed.take() {
            queue.armed.remove(&(old, self.id));
        }
        *armed = deadline;
        if let Some(new) = deadline {
            queue.armed.insert((new, self.id), self.callback.clone());
            if earliest.is_none_or(|earliest| new < earliest) {
                shared.changed.notify_all();
            }
        }
    }
}

impl Timer for HostTimer {
    fn arm(&self, deadline_ns: u64) {
        self.set(Some(deadline_ns));
    }

    fn disarm(&self) {
        self.set(None);
    }
}

impl Drop for HostTimer {
    fn drop(&mut self) {
        self.set(None);
    }
}

/// The offset of local time, which only the C library knows.
mod local {
    #![allow(unsafe_code)]

    pub(super) fn offset_s() -> i64 {
        // SAFETY: both calls only write to what they are given; localtime_r takes any time value.
        unsafe {
            let now = libc::time(std::ptr::null_mut());
            let mut broken_down = std::mem::zeroed::<libc::tm>();
            if libc::localtime_r(&now, &mut broken_down).is_null() { 0 } else { broken_down.tm_gmtoff }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn timers_run_in_order_and_disarmed_ones_do_not() {
        let time = HostTime::start().unwrap();
        let (sender, receiver) = channel();
        let make = |name: &'static str| {
            let sender = sender.clone();
            time.timer(Box::new(move || sender.send(name).unwrap()))
        };
        let (late, early, never) = (make("late"), make("early"), make("never"));
        let now = time.now_ns();
        late.arm(now + 3_000_000);
        never.arm(now + 2_000_000);
        early.arm(now + 1_000_000);
        never.disarm();
        assert_eq!(receiver.recv().unwrap(), "early");
        assert_eq!(receiver.recv().unwrap(), "late");
        late.arm(0);
        assert_eq!(receiver.recv().unwrap(), "late", "a deadline already past runs out at once");
        assert!(receiver.try_recv().is_err());
    }
}
