//! [`Disk`]: asynchronous requests, done by a few threads per disk.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use memory::{GuestMemory, MemoryError};
use platform::GuestRange;

use super::BlockError;
use super::buffers::HostBuffers;
use super::image::{Geometry, Image};
use super::options::BlockOptions;
use super::raw::RawImage;

/// Threads of a disk, at most. They start as they are needed.
const MAX_THREADS: usize = 8;

/// What a disk is asked to do. Offsets and lengths are in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Read into guest memory.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where in guest memory.
        to: Vec<GuestRange>,
    },
    /// Write from guest memory.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where in guest memory.
        from: Vec<GuestRange>,
    },
    /// Make all writes that were done before durable.
    Flush,
    /// Give a range back; its contents are undefined afterwards.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make a range read zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// Dropped by [`Disk::cancel_queued`] before it began.
    #[error("the request was cancelled")]
    Cancelled,
    /// A change to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Outside the disk.
    #[error("{len} bytes at {offset} are outside a disk of {size} bytes")]
    OutOfRange {
        /// Where the request begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// How large the disk is.
        size: u64,
    },
    /// The buffers are not in guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What the host says.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Called once when a request is over, on a thread of the disk (or on the one that cancels it). Must not wait for other
/// requests of the disk.
pub type Done = Box<dyn FnOnce(Result<(), IoError>) + Send>;

/// A request to a disk.
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Whom to tell.
    pub done: Done,
}

enum Job {
    Request(Request),
    Call(Box<dyn FnOnce() + Send>),
}

/// An open disk with its threads. Dropping it forgets what has not begun and waits for the rest.
pub struct Disk {
    shared: Arc<Shared>,
    geometry: Geometry,
}

struct Shared {
    image: Box<dyn Image>,
    memory: GuestMemory,
    /// Thread names are this and a number.
    name: String,
    path: String,
    warned: AtomicBool,
    pool: Mutex<Pool>,
    work: Condvar,
    idle: Condvar,
}

#[derive(Default)]
struct Pool {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job.
    waiting: usize,
    /// Jobs being done.
    running: usize,
    threads: Vec<JoinHandle<()>>,
    stop: bool,
}

impl Disk {
    /// Opens a disk whose requests use `memory`; its threads are called `name-N`.
    ///
    /// # Errors
    /// The image cannot be opened or no thread be started.
    pub fn open(options: &BlockOptions, memory: GuestMemory, name: &str) -> Result<Self, BlockError> {
        let image = Box::new(RawImage::open(options)?);
        let path = options.path.display().to_string();
        Self::with_image(image, memory, name, path.clone())
            .map_err(|source| BlockError::Thread { path: options.path.clone(), source })
    }

    /// A disk on any image; `path` is what messages call it.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn with_image(image: Box<dyn Image>, memory: GuestMemory, name: &str, path: String) -> io::Result<Self> {
        let geometry = image.geometry();
        let shared = Arc::new(Shared {
            image,
            memory,
            name: name.into(),
            path,
            warned: AtomicBool::new(false),
            pool: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
        });
        // With one thread every request will be done; more are a matter of speed.
        shared.start_thread(&mut shared.pool())?;
        Ok(Self { shared, geometry })
    }

    /// Size and abilities.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Queues a request and returns at once.
    pub fn submit(&self, request: Request) {
        self.shared.enqueue(Job::Request(request));
    }

    /// Has `call` run on a thread of the disk, for instance to look at a guest's queue and submit what is there.
    pub fn defer(&self, call: impl FnOnce() + Send + 'static) {
        self.shared.enqueue(Job::Call(Box::new(call)));
    }

    /// Does a request on the calling thread, which saves a switch to another. For use by deferred calls, whose thread
    /// is there to wait for the host; never on a vCPU thread.
    pub fn perform(&self, request: Request) {
        self.shared.perform(request);
    }

    /// Ends requests that have not begun with [`IoError::Cancelled`]. Those under way go on.
    pub fn cancel_queued(&self) {
        let mut pool = self.shared.pool();
        let (requests, calls) =
            std::mem::take(&mut pool.jobs).into_iter().partition(|job| matches!(job, Job::Request(_)));
        pool.jobs = calls;
        drop(pool);
        for job in VecDeque::into_iter(requests) {
            if let Job::Request(request) = job {
                (request.done)(Err(IoError::Cancelled));
            }
        }
    }

    /// Waits until everything queued is done. Not for threads of the disk.
    pub fn wait_idle(&self) {
        let pool = self.shared.pool();
        drop(self.shared.idle.wait_while(pool, |pool| pool.running > 0 || !pool.jobs.is_empty()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mut pool = self.shared.pool();
        pool.stop = true;
        let jobs = std::mem::take(&mut pool.jobs);
        let threads = std::mem::take(&mut pool.threads);
        drop(pool);
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
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(self: &Arc<Self>, job: Job) {
        let mut pool = self.pool();
        if pool.stop {
            return;
        }
        pool.jobs.push_back(job);
        if pool.jobs.len() > pool.waiting && pool.threads.len() < MAX_THREADS {
            // Failing that, the threads there are will do it.
            let _ = self.start_thread(&mut pool);
        }
        drop(pool);
        self.work.notify_one();
    }

    fn start_thread(self: &Arc<Self>, pool: &mut Pool) -> io::Result<()> {
        let shared = self.clone();
        let name = format!("{}-{}", self.name, pool.threads.len());
        let thread = thread::Builder::new().name(name).spawn(move || shared.serve())?;
        pool.threads.push(thread);
        Ok(())
    }

    /// The life of a thread.
    fn serve(&self) {
        let mut pool = self.pool();
        while !pool.stop {
            let Some(job) = pool.jobs.pop_front() else {
                pool.waiting += 1;
                pool = self.work.wait(pool).unwrap_or_else(PoisonError::into_inner);
                pool.waiting -= 1;
                continue;
            };
            pool.running += 1;
            drop(pool);
            match job {
                Job::Request(request) => self.perform(request),
                Job::Call(call) => call(),
            }
            pool = self.pool();
            pool.running -= 1;
            if pool.running == 0 && pool.jobs.is_empty() {
                self.idle.notify_all();
            }
        }
    }

    fn perform(&self, request: Request) {
        let result = self.execute(&request.operation);
        if let Err(IoError::Host(why)) = &result
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            log::warn!(
                "{}: {} failed: {why} (the guest gets an error; further cases are not reported)",
                self.path,
                request.operation
            );
        }
        (request.done)(result);
    }

    fn execute(&self, operation: &Operation) -> Result<(), IoError> {
        let geometry = self.image.geometry();
        let check = |offset: u64, len: u64, writes: bool| {
            if writes && geometry.read_only {
                Err(IoError::ReadOnly)
            } else if offset.checked_add(len).is_none_or(|end| end > geometry.size) {
                Err(IoError::OutOfRange { offset, len, size: geometry.size })
            } else {
                Ok(())
            }
        };
        match operation {
            Operation::Read { offset, to } => {
                let buffers = HostBuffers::new(&self.memory, to)?;
                check(*offset, buffers.len(), false)?;
                self.image.read(*offset, &buffers)?;
            }
            Operation::Write { offset, from } => {
                let buffers = HostBuffers::new(&self.memory, from)?;
                check(*offset, buffers.len(), true)?;
                self.image.write(*offset, &buffers)?;
            }
            Operation::Flush => self.image.flush()?,
            Operation::Discard { offset, len } => {
                check(*offset, *len, true)?;
                if *len > 0 {
                    self.image.discard(*offset, *len)?;
                }
            }
            Operation::WriteZeroes { offset, len, unmap } => {
                check(*offset, *len, true)?;
                if *len > 0 {
                    self.image.write_zeroes(*offset, *len, *unmap)?;
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read { offset, .. } => write!(f, "a read at {offset}"),
            Self::Write { offset, .. } => write!(f, "a write at {offset}"),
            Self::Flush => write!(f, "a flush"),
            Self::Discard { offset, len } => write!(f, "a discard of {len} bytes at {offset}"),
            Self::WriteZeroes { offset, len, .. } => write!(f, "writing {len} zeroes at {offset}"),
        }
    }
}
