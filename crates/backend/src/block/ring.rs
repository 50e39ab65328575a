//! The engine for raw images where the kernel has io_uring: one thread that makes requests and takes their results,
//! many with one system call. What the host's page cache has or takes is copied at once; where that is much it is done by
//! a few ordinary threads, several at a time, and so is what the ring cannot do well.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};

use super::pool::Pool;
use super::raw::RawImage;
use super::request::{Batch, Call, Command, Engine, Job, Work, take_work};
use super::sys::MAX_PIECES;

/// Entries of the ring, and requests in the kernel at a time.
const ENTRIES: u32 = 512;
/// `user_data` of the request that waits for other threads' wake-ups.
const WAKE: u64 = u64::MAX;
/// A write into the page cache that takes longer than this was held up by the host.
const SLOW_WRITE: Duration = Duration::from_millis(4);
/// Writes that go through the ring after a slow one, so that reads need not wait for them.
const SLOW_WRITES: u32 = 64;

/// The engine.
pub(super) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    image: Arc<RawImage>,
    inbox: Mutex<Inbox>,
    idle: Condvar,
    /// Ends the thread's rest while the kernel has no request of it.
    work: Condvar,
    /// An eventfd that ends its sleep in the kernel otherwise.
    wake: OwnedFd,
    /// For what the ring cannot do.
    pool: Pool,
}

#[derive(Default)]
struct Inbox {
    jobs: VecDeque<Job>,
    /// The thread has jobs in hand or in the kernel.
    active: bool,
    /// How to wake the thread.
    rest: Rest,
    stop: bool,
}

/// What the thread does, or is about to do.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Rest {
    /// It will look at the inbox before it rests.
    #[default]
    Awake,
    /// It waits for the condition variable.
    Idle,
    /// It waits in the kernel for results.
    Kernel,
}

/// What the thread does next.
enum Step {
    /// Hand the kernel what was queued, and wait for so many results.
    Enter(usize),
    /// Look at the inbox, after a rest.
    Look,
    /// End.
    End,
}

impl Ring {
    /// Starts the thread, called `name-0`.
    ///
    /// # Errors
    /// The kernel has no io_uring for this process, or no thread.
    pub(super) fn start(image: Arc<RawImage>, name: &str) -> io::Result<Self> {
        let ring = IoUring::builder().setup_coop_taskrun().build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))?;
        let shared = Arc::new(Shared {
            pool: Pool::lazy(image.clone(), name),
            image,
            inbox: Mutex::default(),
            idle: Condvar::new(),
            work: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let theirs = shared.clone();
        let driver = move || Driver::new(ring, theirs).run();
        let thread = thread::Builder::new().name(format!("{name}-0")).spawn(driver)?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Engine for Ring {
    fn submit(&self, work: Work) {
        self.shared.enqueue(Job::Work(work));
    }

    fn defer(&self, call: Call) {
        self.shared.enqueue(Job::Call(call));
    }

    fn cancel_queued(&self) {
        let work = take_work(&mut self.shared.inbox().jobs);
        work.into_iter().for_each(Work::cancel);
        self.shared.pool.cancel_queued();
    }

    fn wait_idle(&self) {
        let inbox = self.shared.inbox();
        drop(self.shared.idle.wait_while(inbox, |inbox| inbox.active || !inbox.jobs.is_empty()));
        self.shared.pool.wait_idle();
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut inbox = self.shared.inbox();
        inbox.stop = true;
        let jobs = std::mem::take(&mut inbox.jobs);
        drop(inbox);
        drop(jobs);
        self.shared.work.notify_one();
        self.shared.wake_up();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(&self, job: Job) {
        let mut inbox = self.inbox();
        if inbox.stop {
            return;
        }
        inbox.jobs.push_back(job);
        let rest = std::mem::take(&mut inbox.rest);
        drop(inbox);
        match rest {
            Rest::Awake => {}
            Rest::Idle => self.work.notify_one(),
            Rest::Kernel => self.wake_up(),
        }
    }

    fn wake_up(&self) {
        // It fails only when the counter is full, and then the thread is woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// What the thread works with.
struct Driver {
    ring: IoUring,
    shared: Arc<Shared>,
    /// Requests in the kernel, by their `user_data`. Their buffers must stay until they are over.
    slots: Vec<Option<Work>>,
    free: Vec<usize>,
    in_flight: usize,
    /// Jobs for which there was no room in the ring.
    backlog: VecDeque<Job>,
    /// The request for wake-ups is in the kernel.
    armed: bool,
    slow_writes: u32,
    /// No other request waits for the thread.
    alone: bool,
    /// The file system can say whether the page cache has what is to be read.
    reads_cached: bool,
    batch: Batch,
}

impl Driver {
    fn new(ring: IoUring, shared: Arc<Shared>) -> Self {
        let count = ENTRIES as usize - 1;
        let reads_cached = shared.image.uses_cache();
        Self {
            ring,
            shared,
            slots: (0..count).map(|_| None).collect(),
            free: (0..count).collect(),
            in_flight: 0,
            backlog: VecDeque::new(),
            armed: false,
            slow_writes: 0,
            alone: true,
            reads_cached,
            batch: Batch::default(),
        }
    }

    /// The life of the thread.
    fn run(mut self) {
        loop {
            let mut jobs = self.take_jobs();
            while let Some(job) = jobs.pop_front() {
                self.alone = jobs.is_empty() && self.in_flight == 0;
                match job {
                    Job::Call(call) => call(),
                    Job::Work(work) if self.free.is_empty() => {
                        self.backlog.push_back(Job::Work(work));
                        self.backlog.append(&mut jobs);
                    }
                    Job::Work(work) => self.begin(work),
                }
            }
            self.batch.settle();
            match self.decide() {
                Step::Enter(wait) => self.enter(wait),
                Step::Look => continue,
                Step::End => return,
            }
            self.reap();
            self.batch.settle();
        }
    }

    fn take_jobs(&mut self) -> VecDeque<Job> {
        let mut jobs = std::mem::take(&mut self.backlog);
        let mut inbox = self.shared.inbox();
        jobs.append(&mut inbox.jobs);
        inbox.active = !jobs.is_empty() || self.in_flight > 0;
        jobs
    }

    /// Finds out what to do next, and rests if that is nothing.
    fn decide(&mut self) -> Step {
        let mut inbox = self.shared.inbox();
        if inbox.stop && self.in_flight == 0 {
            return Step::End;
        }
        if !inbox.jobs.is_empty() || (!self.backlog.is_empty() && !self.free.is_empty()) {
            return Step::Enter(0);
        }
        if self.in_flight == 0 && self.backlog.is_empty() {
            inbox.active = false;
            self.shared.idle.notify_all();
            while inbox.jobs.is_empty() && !inbox.stop {
                // Each time: who woke it may have taken the job back.
                inbox.rest = Rest::Idle;
                inbox = self.shared.work.wait(inbox).unwrap_or_else(PoisonError::into_inner);
            }
            inbox.rest = Rest::Awake;
            return Step::Look;
        }
        inbox.rest = Rest::Kernel;
        drop(inbox);
        if !self.armed {
            let poll = opcode::PollAdd::new(types::Fd(self.shared.wake.as_raw_fd()), libc::POLLIN as u32);
            self.armed = true;
            self.push(poll.build().user_data(WAKE));
        }
        Step::Enter(1)
    }

    /// Hands the kernel what was queued, and waits for `wait` results.
    fn enter(&mut self, wait: usize) {
        if wait == 0 && self.ring.submission().is_empty() {
            return;
        }
        match self.ring.submit_and_wait(wait) {
            Ok(_) => {}
            // A signal, or a kernel that is short of memory or wants results taken first: the loop comes here again.
            Err(_) => thread::yield_now(),
        }
        if wait > 0 {
            self.shared.inbox().rest = Rest::Awake;
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: what the entry refers to lives in `slots` (or is a descriptor of `shared`) until its result has
            // been taken; `run` does not end before that.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            self.enter(0);
        }
    }

    /// Starts a request, or does it if that is quick.
    fn begin(&mut self, work: Work) {
        let Some(work) = self.try_cache(work) else { return };
        let suits = match &work.command {
            Command::Read { .. } | Command::Write { fua: false, .. }
                if work.is_large() && self.shared.image.uses_cache() =>
            {
                false
            }
            Command::Read { to: buffers, .. } | Command::Write { from: buffers, .. } => {
                buffers.pieces().len() <= MAX_PIECES
            }
            Command::Flush => true,
            Command::Discard { .. } | Command::WriteZeroes { .. } => false,
        };
        self.slow_writes = self.slow_writes.saturating_sub(1);
        let Some(slot) = self.free.pop_if(|_| suits) else {
            return self.shared.pool.submit(work);
        };
        let entry = entry(&self.shared.image, &work.command).user_data(slot as u64);
        self.slots[slot] = Some(work);
        self.in_flight += 1;
        self.push(entry);
    }

    /// Copies from or to the host's page cache if that is all there is to do; returns the work otherwise.
    fn try_cache(&mut self, work: Work) -> Option<Work> {
        let image = &self.shared.image;
        if work.is_large() {
            return Some(work);
        }
        let result = match &work.command {
            Command::Write { offset, from, fua: false }
                if (self.slow_writes == 0 || self.alone) && image.writes_to_cache() =>
            {
                let start = Instant::now();
                let result = from.write_to(image.file().as_fd(), *offset, false);
                if start.elapsed() > SLOW_WRITE {
                    self.slow_writes = SLOW_WRITES;
                }
                result
            }
            Command::Read { offset, to } if self.reads_cached => {
                match to.read_cached(image.file().as_fd(), *offset) {
                    Ok(true) => Ok(()),
                    Ok(false) => return Some(work),
                    Err(_) => {
                        // Not this file system; or an error that will come again.
                        self.reads_cached = false;
                        return Some(work);
                    }
                }
            }
            _ => return Some(work),
        };
        self.batch.end(work, result);
        None
    }

    /// Takes the results there are.
    fn reap(&mut self) {
        loop {
            // Bound first: the queue must not be borrowed while a result is dealt with.
            let next = self.ring.completion().next();
            let Some(result) = next else { return };
            if result.user_data() == WAKE {
                self.armed = false;
                let mut count = [0; 8];
                // Nothing to read is what is wanted.
                let _ = rustix::io::read(&self.shared.wake, &mut count);
                continue;
            }
            let slot = result.user_data() as usize;
            let Some(work) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot);
            self.in_flight -= 1;
            self.end(work, result.result());
        }
    }

    fn end(&mut self, work: Work, result: i32) {
        if let Command::Read { to, .. } = &work.command {
            to.note_written();
        }
        match u64::try_from(result) {
            Ok(moved) if moved == work.command.bytes() => self.batch.end(work, Ok(())),
            // Less than all, alignment that direct I/O refuses, a signal: an ordinary thread does it properly.
            Ok(_) => self.shared.pool.submit(work),
            Err(_) if [libc::EINVAL, libc::EINTR, libc::EAGAIN].contains(&-result) => self.shared.pool.submit(work),
            Err(_) => self.batch.end(work, Err(io::Error::from_raw_os_error(-result))),
        }
    }
}

/// The ring's form of a command.
fn entry(image: &RawImage, command: &Command) -> squeue::Entry {
    let fd = types::Fd(image.file().as_raw_fd());
    match command {
        Command::Read { offset, to } => {
            opcode::Readv::new(fd, to.pieces().as_ptr(), to.pieces().len() as u32).offset(*offset).build()
        }
        Command::Write { offset, from, fua } => {
            let flags = if *fua { libc::RWF_DSYNC } else { 0 };
            let write = opcode::Writev::new(fd, from.pieces().as_ptr(), from.pieces().len() as u32);
            write.offset(*offset).rw_flags(flags).build()
        }
        Command::Flush | Command::Discard { .. } | Command::WriteZeroes { .. } => {
            opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
        }
    }
}
