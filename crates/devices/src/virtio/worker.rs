//! A thread that sleeps until a queue has work.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

#[derive(Default)]
struct Pending {
    queues: u64,
    /// The thread is inside the work function.
    busy: bool,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    pending: Mutex<Pending>,
    woken: Condvar,
    settled: Condvar,
}

/// A device's thread. Dropping it ends the thread after the call it may be in.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` that runs `work` with the numbers (as bits) of the queues to look at.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn spawn(name: String, mut work: impl FnMut(u64) + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            while let Some(queues) = theirs.next() {
                work(queues);
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Wakes the thread for queue `index` (below 64).
    pub fn wake(&self, index: u16) {
        self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner).queues |= 1 << (index % 64);
        self.shared.woken.notify_one();
    }

    /// Waits until the thread has seen to every queue it was woken for.
    pub fn wait_idle(&self) {
        let pending = self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.shared.settled.wait_while(pending, |pending| pending.busy || pending.queues != 0));
    }
}

impl Shared {
    /// Sleeps until there is work; `None` when the thread shall end.
    fn next(&self) -> Option<u64> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.busy = false;
        if pending.queues == 0 {
            self.settled.notify_all();
        }
        let mut pending = self
            .woken
            .wait_while(pending, |pending| pending.queues == 0 && !pending.stop)
            .unwrap_or_else(PoisonError::into_inner);
        pending.busy = !pending.stop;
        pending.busy.then(|| std::mem::take(&mut pending.queues))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.shared.woken.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}
