//! The queue between a device that must not wait and a host file that may make one wait.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::SerialDevice;
use super::wake::Wake;

/// Bytes that wait for the host at most.
pub(super) const QUEUE_BYTES: usize = 64 << 10;
/// Bytes given to the host at once at most. Small, because a write to a blocking terminal waits for all of it.
const CHUNK_BYTES: usize = 1024;

/// What happens to output when the queue is full.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum WhenFull {
    /// The device keeps it: the guest waits, nothing is lost.
    Wait,
    /// It is lost: a VM must not stall because nobody reads its console.
    Drop,
}

/// Where output goes. Used by the writer thread alone.
pub(super) trait ByteSink: Send {
    /// Writes some of `bytes` and returns how many are done with. May wait, but no longer than until `stop` is set:
    /// then it returns [`io::ErrorKind::WouldBlock`]. Any other error means that no output will ever get through again.
    fn write(&mut self, bytes: &[u8], stop: &Wake) -> io::Result<usize>;
}

struct State {
    bytes: VecDeque<u8>,
    /// Bytes taken from the queue that the host does not have yet.
    in_flight: usize,
    /// The device keeps output that waits for room.
    refused: bool,
    /// The writer ends when the queue is empty.
    closing: bool,
    /// The writer has ended; output is dropped.
    ended: bool,
}

pub(super) struct Output {
    state: Mutex<State>,
    /// The queue is no longer empty, or closing.
    filled: Condvar,
    /// The host has everything, or the writer ended.
    drained: Condvar,
    when_full: WhenFull,
    /// Tells a waiting sink to give up.
    stop: Wake,
}

impl Output {
    pub(super) fn new(when_full: WhenFull) -> io::Result<Self> {
        let state = State { bytes: VecDeque::new(), in_flight: 0, refused: false, closing: false, ended: false };
        let (filled, drained) = (Condvar::new(), Condvar::new());
        Ok(Self { state: Mutex::new(state), filled, drained, when_full, stop: Wake::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues output; see [`super::SerialBackend::send`].
    pub(super) fn send(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        if state.ended || state.closing {
            return bytes.len();
        }
        let was_empty = state.bytes.is_empty();
        let taken = bytes.len().min(QUEUE_BYTES - state.bytes.len());
        state.bytes.extend(&bytes[..taken]);
        let refused = taken < bytes.len() && self.when_full == WhenFull::Wait;
        state.refused |= refused;
        drop(state);
        if was_empty {
            self.filled.notify_one();
        }
        if refused { taken } else { bytes.len() }
    }

    /// The writer thread: takes what is queued to `sink` until closed. `device` is asked for at the moment it is needed.
    pub(super) fn run(&self, sink: &mut dyn ByteSink, device: impl Fn() -> Option<Arc<dyn SerialDevice>>) {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        while let Some(was_refused) = self.take(&mut chunk) {
            if was_refused && let Some(device) = device() {
                device.output_ready();
            }
            if !self.write_all(sink, &chunk) {
                break;
            }
        }
        let mut state = self.lock();
        state.ended = true;
        state.in_flight = 0;
        state.bytes.clear();
        let was_refused = std::mem::take(&mut state.refused);
        drop(state);
        self.drained.notify_all();
        // What the device still keeps is to be dropped like everything from now on.
        if was_refused && let Some(device) = device() {
            device.output_ready();
        }
    }

    /// Waits for output and takes a chunk of it; tells whether the device was refused before. `None` when closed and empty.
    fn take(&self, chunk: &mut Vec<u8>) -> Option<bool> {
        let mut state = self.lock();
        state.in_flight = 0;
        while state.bytes.is_empty() {
            self.drained.notify_all();
            if state.closing {
                return None;
            }
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        chunk.clear();
        let count = state.bytes.len().min(CHUNK_BYTES);
        chunk.extend(state.bytes.drain(..count));
        state.in_flight = count;
        Some(std::mem::take(&mut state.refused))
    }

    fn write_all(&self, sink: &mut dyn ByteSink, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match sink.write(bytes, &self.stop) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Waits until the host has all output, at most for `grace`; returns whether it has.
    pub(super) fn drain(&self, grace: Duration) -> bool {
        self.wait_until(grace, |state| state.ended || (state.bytes.is_empty() && state.in_flight == 0))
    }

    /// Ends the writer: at once when the host takes the rest, after `grace` in any case unless the host holds it in a
    /// blocking write. Returns whether it ended.
    pub(super) fn close(&self, grace: Duration) -> bool {
        self.lock().closing = true;
        self.filled.notify_one();
        if self.wait_until(grace, |state| state.ended) {
            return true;
        }
        self.stop.set();
        self.wait_until(Duration::from_millis(100), |state| state.ended)
    }

    /// Tells the writer to end by itself, as soon as it can.
    pub(super) fn abandon(&self) {
        self.lock().closing = true;
        self.filled.notify_one();
        self.stop.set();
    }

    fn wait_until(&self, grace: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + grace;
        let mut state = self.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
