//! Queues of a device that another process serves, over vhost-user.
//!
//! The queues belong to the back end while the driver uses them. What it writes into the guest's memory has to be noted all
//! the same, for the CPU may have code of these pages: we look at the buffers that the driver offers before we ring the back
//! end's bell, and before an interrupt at those that were offered without a bell.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use backend::vhost_user::{Frontend, Ring};

use super::context::VirtioContext;
use super::worker::Worker;
use crate::factory::DeviceError;

/// The queues in the hands of the back end.
struct Running {
    /// For each queue that runs, how far its buffers have been looked at.
    seen: Vec<(u16, u16)>,
    /// The queues that the back end shall use, as bits.
    enabled: u64,
    /// The driver has rung and the back end could not take the queues.
    missed: bool,
}

/// Seconds between attempts to find a back end that has gone.
const PAUSE: u32 = 1;

struct Shared {
    context: Arc<VirtioContext>,
    frontend: Frontend,
    running: Mutex<Running>,
    stop: AtomicBool,
    /// A back end that comes back gets the queues again.
    again: bool,
    /// Called when the back end has gone, and when it is there again.
    here: Box<dyn Fn(bool) + Send + Sync>,
}

/// The queues, a thread that passes doorbells on, and one that passes interrupts on.
pub(super) struct VhostQueues {
    shared: Arc<Shared>,
    worker: Worker,
    calls: Option<JoinHandle<()>>,
}

impl VhostQueues {
    /// Gives all queues of `context` that `frontend` has been made for to the back end, as soon as the driver uses one.
    /// The threads are called `name`; when the back end goes, one of them calls `here` with `false`. If `again`, it tries
    /// to connect anew until it can, gives the new one the queues from where the old one was, and calls with `true`.
    ///
    /// # Errors
    /// The host gives no threads.
    pub(super) fn new(
        context: Arc<VirtioContext>,
        frontend: Frontend,
        name: String,
        again: bool,
        here: impl Fn(bool) + Send + Sync + 'static,
    ) -> Result<Self, DeviceError> {
        let failed = |source| DeviceError::Host { what: format!("start the threads of {name}"), source };
        // The back end writes memory without telling anybody beforehand.
        context.memory().pages().has_other_writers();
        let running = Running { seen: Vec::new(), enabled: u64::MAX, missed: false }.into();
        let stop = AtomicBool::new(false);
        let shared = Arc::new(Shared { context, frontend, running, stop, again, here: Box::new(here) });
        let (kicker, caller) = (shared.clone(), shared.clone());
        let worker = Worker::spawn(name.clone(), move |queues| kicker.kick(queues)).map_err(failed)?;
        let calls =
            std::thread::Builder::new().name(name.clone()).spawn(move || caller.interrupts()).map_err(failed)?;
        Ok(Self { shared, worker, calls: Some(calls) })
    }

    /// Features that the back end offers.
    pub(super) fn features(&self) -> u64 {
        self.shared.frontend.features()
    }

    /// The driver has rung the bell of queue `index`.
    pub(super) fn notify(&self, index: u16) {
        self.worker.wake(index);
    }

    /// Whether the back end has queues.
    pub(super) fn is_running(&self) -> bool {
        self.worker.wait_idle();
        !self.shared.running().seen.is_empty()
    }

    /// The back end shall use the queues whose bits are set, and no others.
    pub(super) fn enable(&self, queues: u64) {
        let mut running = self.shared.running();
        let changed = std::mem::replace(&mut running.enabled, queues) ^ queues;
        for (index, _) in running.seen.iter().filter(|(index, _)| changed & 1 << (index % 64) != 0) {
            let on = queues & 1 << (index % 64) != 0;
            if let Err(why) = self.shared.frontend.enable(usize::from(*index), on) {
                self.shared.context.warn_once(&why.to_string());
            }
        }
    }

    /// Takes the queues back.
    pub(super) fn reset(&self) {
        self.worker.wait_idle();
        let mut running = self.shared.running();
        running.missed = false;
        let queues = std::mem::take(&mut running.seen);
        if let Err(why) = self.shared.frontend.stop(queues.iter().map(|(index, _)| usize::from(*index))) {
            self.shared.context.warn_once(&why.to_string());
        }
    }
}

impl Drop for VhostQueues {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.frontend.wake();
        if let Some(thread) = self.calls.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver has rung: hands the queues over the first time, and rings on.
    fn kick(&self, queues: u64) {
        let mut running = self.running();
        if running.seen.is_empty() && !self.start(&mut running, false) {
            running.missed = true;
            return;
        }
        self.note_writes(&mut running, queues);
        for (index, _) in &running.seen {
            if queues & 1 << (index % 64) != 0 {
                self.frontend.kick(usize::from(*index));
            }
        }
    }

    /// Hands the queues over; with `resume` from where the last back end was, as the used rings tell.
    fn start(&self, running: &mut Running, resume: bool) -> bool {
        let ready = self.context.queues().iter().take(self.frontend.queues()).filter(|queue| queue.is_ready());
        let mut rings: Vec<_> = ready
            .map(|queue| {
                let enabled = running.enabled & 1 << (queue.index() % 64) != 0;
                (usize::from(queue.index()), Ring { enabled, ..queue.place() })
            })
            .collect();
        let inside = |ring: &Ring| {
            let entries = u64::from(ring.size);
            let memory = self.context.memory();
            memory.is_ram(ring.descriptors, 16 * entries)
                && memory.is_ram(ring.available, 6 + 2 * entries)
                && memory.is_ram(ring.used, 6 + 8 * entries)
        };
        if rings.is_empty() || !rings.iter().all(|(_, ring)| inside(ring)) {
            self.context.warn_once("the driver's rings are not in memory");
            return false;
        }
        if resume {
            for (_, ring) in &mut rings {
                // What it had taken and not given back is for the new one. The rings are in memory.
                ring.base = self.context.memory().read_u16(ring.used + 2).unwrap_or(ring.base);
            }
        }
        // The other features are between the driver and us.
        if let Err(why) = self.frontend.start(self.context.features() & self.frontend.features(), &rings) {
            self.context.warn_once(&why.to_string());
            return false;
        }
        running.seen = rings.iter().map(|(index, ring)| (*index as u16, ring.base)).collect();
        true
    }

    /// Notes what the back end is going to write, or has written: writable buffers offered since the last look.
    fn note_writes(&self, running: &mut Running, queues: u64) {
        let pages = self.context.memory().pages();
        for (index, seen) in &mut running.seen {
            if queues & 1 << (*index % 64) == 0 {
                continue;
            }
            let Some(queue) = self.context.queue(*index) else { continue };
            let (next, offered) = queue.look_ahead(*seen);
            *seen = next;
            for buffers in offered {
                for range in buffers.ranges() {
                    pages.note_write(range.start.0, range.size);
                }
            }
        }
    }

    /// The thread that passes on the back end's interrupts.
    fn interrupts(&self) {
        let mut here = true;
        while !self.stop.load(Ordering::Acquire) {
            let queues = self.frontend.wait_calls((self.again && !here).then_some(PAUSE));
            let mut running = self.running();
            self.note_writes(&mut running, queues);
            for (index, _) in &running.seen {
                if queues & 1 << (index % 64) != 0
                    && let Some(queue) = self.context.queue(*index)
                {
                    self.context.interrupt_queue(queue);
                }
            }
            drop(running);
            if here && self.frontend.is_gone() {
                here = false;
                (self.here)(false);
            } else if self.again && !here && !self.stop.load(Ordering::Acquire) && self.reconnect() {
                here = true;
                (self.here)(true);
            }
        }
    }

    /// Tries to find a back end again; returns whether there is one, which has the queues if the driver uses them.
    fn reconnect(&self) -> bool {
        let Ok(connection) = self.frontend.dial() else { return false };
        let mut running = self.running();
        self.frontend.adopt(connection);
        if running.seen.is_empty() && !running.missed {
            return true;
        }
        if !self.start(&mut running, true) {
            return false;
        }
        running.missed = false;
        for (index, _) in &running.seen {
            self.frontend.kick(usize::from(*index));
        }
        true
    }
}

#[cfg(test)]
pub(crate) mod testing;
