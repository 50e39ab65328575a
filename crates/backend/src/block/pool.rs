//! The engine for images whose calls block: a few threads, started as they are needed.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::image::Image;
use super::request::{Batch, Call, Engine, Job, Work, take_work};

/// Threads of a disk, at most.
const MAX_THREADS: usize = 8;
/// A call that takes longer than this waited for the host; quicker ones are not worth waking another thread for.
const SLOW: Duration = Duration::from_micros(100);
/// After so long without progress another thread takes over what waits behind a call that was expected to be quick.
const TAKE_OVER: Duration = Duration::from_micros(500);

/// A pool of threads on one image.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    image: Arc<dyn Image>,
    /// Thread names are this and a number.
    name: String,
    /// Number of the first thread.
    first: usize,
    queue: Mutex<Queue>,
    work: Condvar,
    idle: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job.
    waiting: usize,
    /// Of these, those that have been woken and are on their way.
    called: usize,
    /// The last call was slow: so will others be, and they had better be at the same time.
    slow: bool,
    /// A thread watches whether the others make progress.
    standby: bool,
    /// Counts jobs that were begun.
    begun: u64,
    /// Jobs being done.
    running: usize,
    threads: Vec<JoinHandle<()>>,
    stop: bool,
}

impl Pool {
    /// A pool whose threads are called `name-0` and so on. The first is started now, so that there will be one.
    ///
    /// # Errors
    /// The host gives no thread.
    pub(super) fn start(image: Arc<dyn Image>, name: &str) -> io::Result<Self> {
        let pool = Self::new(image, name, 0);
        pool.shared.start_thread(&mut pool.shared.queue())?;
        Ok(pool)
    }

    /// A pool for rare work, without threads until there is some; they are called `name-1` and so on.
    pub(super) fn lazy(image: Arc<dyn Image>, name: &str) -> Self {
        Self::new(image, name, 1)
    }

    fn new(image: Arc<dyn Image>, name: &str, first: usize) -> Self {
        let shared = Shared {
            image,
            name: name.into(),
            first,
            queue: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }
}

impl Engine for Pool {
    fn submit(&self, work: Work) {
        let urgent = work.is_large();
        self.shared.enqueue(Job::Work(work), urgent);
    }

    fn defer(&self, call: Call) {
        self.shared.enqueue(Job::Call(call), false);
    }

    fn perform(&self, work: Work) {
        let mut queue = self.shared.queue();
        if !queue.stop {
            queue.jobs.push_back(Job::Work(work));
        }
    }

    fn cancel_queued(&self) {
        let work = take_work(&mut self.shared.queue().jobs);
        work.into_iter().for_each(Work::cancel);
    }

    fn wait_idle(&self) {
        let queue = self.shared.queue();
        drop(self.shared.idle.wait_while(queue, |queue| queue.running > 0 || !queue.jobs.is_empty()));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.stop = true;
        let jobs = std::mem::take(&mut queue.jobs);
        let threads = std::mem::take(&mut queue.threads);
        drop(queue);
        self.shared.work.notify_all();
        drop(jobs);
        // A deferred call may hold the last reference to the disk's owner: then this is one of the threads.
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != thread::current().id()) {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a job; an urgent one is not left to a thread that is busy.
    fn enqueue(self: &Arc<Self>, job: Job, urgent: bool) {
        let mut queue = self.queue();
        if queue.stop {
            return;
        }
        queue.jobs.push_back(job);
        let served = if queue.running > 0 { queue.standby || queue.called > 0 } else { queue.called > 0 };
        if !urgent && !queue.slow && served {
            return;
        }
        let started = self.call_help(&mut queue);
        // Failing that, the threads there are will do it; without any, the work is over.
        if let Err(why) = started
            && queue.threads.is_empty()
            && let Some(Job::Work(work)) = queue.jobs.pop_back()
        {
            drop(queue);
            work.finish(Err(why));
        }
    }

    /// Has one more thread look at the queue, if there may be one more.
    fn call_help(self: &Arc<Self>, queue: &mut Queue) -> io::Result<()> {
        if queue.jobs.len() > queue.waiting && queue.threads.len() < MAX_THREADS {
            self.start_thread(queue)?;
        }
        if queue.waiting > 0 {
            queue.called += 1;
            self.work.notify_one();
        }
        Ok(())
    }

    fn start_thread(self: &Arc<Self>, queue: &mut Queue) -> io::Result<()> {
        let shared = self.clone();
        let name = format!("{}-{}", self.name, self.first + queue.threads.len());
        let thread = thread::Builder::new().name(name).spawn(move || shared.serve())?;
        queue.threads.push(thread);
        Ok(())
    }

    /// The life of a thread.
    fn serve(self: &Arc<Self>) {
        let mut batch = Batch::default();
        let mut queue = self.queue();
        loop {
            let job;
            (queue, job) = self.next(queue, &mut batch);
            let Some(job) = job else { return };
            queue.running += 1;
            queue.begun += 1;
            let slow = queue.slow || matches!(&job, Job::Work(work) if !work.command.is_transfer());
            if slow && !queue.jobs.is_empty() {
                // Without help this thread does it all.
                let _ = self.call_help(&mut queue);
            }
            drop(queue);
            if slow {
                batch.settle();
            }
            let now_slow = match job {
                Job::Work(work) => Some(self.perform(work, &mut batch)),
                Job::Call(call) => {
                    call();
                    None
                }
            };
            queue = self.queue();
            if queue.jobs.is_empty() {
                // Before anybody may think that all is over.
                drop(queue);
                batch.settle();
                queue = self.queue();
            }
            queue.slow = now_slow.unwrap_or(queue.slow);
            queue.running -= 1;
            if queue.running == 0 && queue.jobs.is_empty() {
                self.idle.notify_all();
            }
        }
    }

    /// Waits for a job; `None`: the thread shall end.
    fn next<'a>(&'a self, mut queue: MutexGuard<'a, Queue>, batch: &mut Batch) -> (MutexGuard<'a, Queue>, Option<Job>) {
        while !queue.stop {
            let urgent = queue.running == 0 || queue.slow || queue.jobs.iter().any(Job::is_large);
            if urgent && !queue.jobs.is_empty() {
                break;
            } else if !batch.is_empty() {
                drop(queue);
                batch.settle();
                queue = self.queue();
            } else if queue.jobs.is_empty() || queue.standby {
                queue = self.rest(queue);
            } else {
                // Others are quick enough without this thread, unless one of them gets stuck.
                let begun = queue.begun;
                queue.standby = true;
                let waited = self.work.wait_timeout(queue, TAKE_OVER);
                queue = waited.unwrap_or_else(PoisonError::into_inner).0;
                queue.standby = false;
                if queue.begun == begun && !queue.jobs.is_empty() {
                    queue.slow = true;
                    break;
                }
            }
        }
        let job = if queue.stop { None } else { queue.jobs.pop_front() };
        (queue, job)
    }

    /// Waits until it is called.
    fn rest<'a>(&self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        queue.waiting += 1;
        if queue.running == 0 && queue.jobs.is_empty() {
            // Whoever is on its way will find nothing; the next job has to call somebody.
            queue.called = 0;
        }
        queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        queue.waiting -= 1;
        queue.called = queue.called.saturating_sub(1);
        queue
    }

    /// Does work; returns whether that was slow, apart from the copying of much data.
    fn perform(&self, work: Work, batch: &mut Batch) -> bool {
        let start = Instant::now();
        let result = work.command.execute(&*self.image);
        let slow = start.elapsed() > SLOW && !work.is_large();
        batch.end(work, result);
        slow
    }
}
