//! The engine for images whose calls block: a few threads, started as they are needed.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::image::Image;
use super::request::{Call, Engine, Job, Work, take_work};

/// Threads of a disk, at most.
const MAX_THREADS: usize = 8;

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
        self.shared.enqueue(Job::Work(work));
    }

    fn defer(&self, call: Call) {
        self.shared.enqueue(Job::Call(call));
    }

    fn perform(&self, work: Work) {
        self.shared.perform(work);
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

    fn enqueue(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue();
        if queue.stop {
            return;
        }
        queue.jobs.push_back(job);
        if queue.jobs.len() > queue.waiting && queue.threads.len() < MAX_THREADS {
            let started = self.start_thread(&mut queue);
            // Failing that, the threads there are will do it; without any, the work is over.
            if let Err(why) = started
                && queue.threads.is_empty()
                && let Some(Job::Work(work)) = queue.jobs.pop_back()
            {
                drop(queue);
                return work.finish(Err(why));
            }
        }
        drop(queue);
        self.work.notify_one();
    }

    fn start_thread(self: &Arc<Self>, queue: &mut Queue) -> io::Result<()> {
        let shared = self.clone();
        let name = format!("{}-{}", self.name, self.first + queue.threads.len());
        let thread = thread::Builder::new().name(name).spawn(move || shared.serve())?;
        queue.threads.push(thread);
        Ok(())
    }

    /// The life of a thread.
    fn serve(&self) {
        let mut queue = self.queue();
        while !queue.stop {
            let Some(job) = queue.jobs.pop_front() else {
                queue.waiting += 1;
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.waiting -= 1;
                continue;
            };
            queue.running += 1;
            drop(queue);
            match job {
                Job::Work(work) => self.perform(work),
                Job::Call(call) => call(),
            }
            queue = self.queue();
            queue.running -= 1;
            if queue.running == 0 && queue.jobs.is_empty() {
                self.idle.notify_all();
            }
        }
    }

    fn perform(&self, work: Work) {
        let result = work.command.execute(&*self.image);
        work.finish(result);
    }
}
