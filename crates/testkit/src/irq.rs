//! Interrupt sinks that remember what they were told.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use platform::{IrqSink, MsiMessage, MsiSink};

/// How long a test waits for something that another thread does, before it fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A list that grows as events arrive, to wait on.
struct Events<T> {
    list: Mutex<Vec<T>>,
    grown: Condvar,
}

impl<T> Default for Events<T> {
    fn default() -> Self {
        Self { list: Mutex::default(), grown: Condvar::new() }
    }
}

impl<T> Events<T> {
    fn push(&self, event: T) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        self.grown.notify_all();
    }

    fn take(&self) -> Vec<T> {
        std::mem::take(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until at least one event is there, and takes all.
    fn wait(&self, what: &str) -> Vec<T> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.grown.wait_timeout_while(list, PATIENCE, |list| list.is_empty());
        let (mut list, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "no {what} within {PATIENCE:?}");
        std::mem::take(&mut *list)
    }
}

/// An [`IrqSink`] that records every call and the level of each line.
#[derive(Default)]
pub struct RecordingIrq {
    events: Events<(u32, bool)>,
    asserted: Mutex<BTreeSet<u32>>,
}

impl RecordingIrq {
    /// The calls since the last time, as (line, level).
    pub fn take(&self) -> Vec<(u32, bool)> {
        self.events.take()
    }

    /// Waits for a call and takes all there are.
    ///
    /// # Panics
    /// None comes within [`PATIENCE`].
    pub fn wait(&self) -> Vec<(u32, bool)> {
        self.events.wait("interrupt line change")
    }

    /// The present level of a line.
    pub fn level(&self, line: u32) -> bool {
        self.asserted.lock().unwrap_or_else(PoisonError::into_inner).contains(&line)
    }

    /// Whether any line is asserted.
    pub fn any(&self) -> bool {
        !self.asserted.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

impl IrqSink for RecordingIrq {
    fn set_level(&self, line: u32, asserted: bool) {
        let mut lines = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        if asserted {
            lines.insert(line)
        } else {
            lines.remove(&line)
        };
        drop(lines);
        self.events.push((line, asserted));
    }
}

/// An [`MsiSink`] that records every message.
#[derive(Default)]
pub struct RecordingMsi(Events<MsiMessage>);

impl RecordingMsi {
    /// The messages since the last time.
    pub fn take(&self) -> Vec<MsiMessage> {
        self.0.take()
    }

    /// Waits for a message and takes all there are.
    ///
    /// # Panics
    /// None comes within [`PATIENCE`].
    pub fn wait(&self) -> Vec<MsiMessage> {
        self.0.wait("message-signalled interrupt")
    }
}

impl MsiSink for RecordingMsi {
    fn send(&self, message: MsiMessage) {
        self.0.push(message);
    }
}
