//! Requests: what a disk is asked to do, checked, and how the asker hears of the end.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use memory::{GuestMemory, MemoryError};
use platform::GuestRange;

use super::buffers::HostBuffers;
use super::image::{Geometry, Image};

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
        /// Force unit access: done only when the data is on stable storage.
        fua: bool,
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
    /// Dropped by [`Disk::cancel_queued`](super::Disk::cancel_queued) before it began.
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

/// Called once when a request is over: on a thread of the disk, on the one that cancels it, or, if the request makes no
/// sense, on the one that submits it. Must not wait for other requests of the disk.
pub type Done = Box<dyn FnOnce(Result<(), IoError>) + Send>;

/// A request to a disk.
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Whom to tell.
    pub done: Done,
}

/// Called by whoever has told of the ends of some requests, when there are no more to tell for now.
pub type Settled = Box<dyn Fn() + Send + Sync>;

/// Whose requests they are: a disk, as far as those who do the requests know it.
pub(super) struct Owner {
    /// What messages call the disk.
    path: String,
    warned: AtomicBool,
    settled: OnceLock<Settled>,
}

impl Owner {
    pub(super) fn new(path: String) -> Arc<Self> {
        Arc::new(Self { path, warned: AtomicBool::new(false), settled: OnceLock::new() })
    }

    /// Has `tell` called when the ends of some requests have been told. It can be set once.
    pub(super) fn on_settled(&self, tell: Settled) {
        // Whoever set it first keeps it.
        let _ = self.settled.set(tell);
    }

    pub(super) fn settle(&self) {
        if let Some(tell) = self.settled.get() {
            tell();
        }
    }

    /// Reports the first error to the user.
    fn report(&self, what: &Command, why: &io::Error) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!("{}: {what} failed: {why} (the guest gets an error; further cases are not reported)", self.path);
        }
    }
}

/// An operation that was found to be possible: inside the disk, its buffers in guest memory.
pub(super) enum Command {
    Read { offset: u64, to: HostBuffers },
    Write { offset: u64, from: HostBuffers, fua: bool },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

impl Command {
    /// Checks an operation against a disk; `None` if there is nothing to do.
    pub(super) fn check(
        operation: Operation,
        memory: &GuestMemory,
        geometry: &Geometry,
    ) -> Result<Option<Self>, IoError> {
        let inside = |offset: u64, len: u64, writes: bool| {
            if writes && geometry.read_only {
                Err(IoError::ReadOnly)
            } else if offset.checked_add(len).is_none_or(|end| end > geometry.size) {
                Err(IoError::OutOfRange { offset, len, size: geometry.size })
            } else {
                Ok(len > 0)
            }
        };
        let (sensible, command) = match operation {
            Operation::Read { offset, to } => {
                let to = HostBuffers::new(memory, to)?;
                (inside(offset, to.len(), false)?, Self::Read { offset, to })
            }
            Operation::Write { offset, from, fua } => {
                let from = HostBuffers::new(memory, from)?;
                (inside(offset, from.len(), true)?, Self::Write { offset, from, fua })
            }
            Operation::Flush => (true, Self::Flush),
            Operation::Discard { offset, len } => (inside(offset, len, true)?, Self::Discard { offset, len }),
            Operation::WriteZeroes { offset, len, unmap } => {
                (inside(offset, len, true)?, Self::WriteZeroes { offset, len, unmap })
            }
        };
        Ok(sensible.then_some(command))
    }

    /// Does it, on the calling thread.
    pub(super) fn execute(&self, image: &dyn Image) -> io::Result<()> {
        match self {
            Self::Read { offset, to } => image.read(*offset, to),
            Self::Write { offset, from, fua } => image.write(*offset, from, *fua),
            Self::Flush => image.flush(),
            Self::Discard { offset, len } => image.discard(*offset, *len),
            Self::WriteZeroes { offset, len, unmap } => image.write_zeroes(*offset, *len, *unmap),
        }
    }

    /// Whether it moves data, which the host may do without waiting for anything.
    pub(super) fn is_transfer(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Write { fua: false, .. })
    }

    /// Bytes of data that it moves.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read { to: buffers, .. } | Self::Write { from: buffers, .. } => buffers.len(),
            Self::Flush | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }
}

impl std::fmt::Display for Command {
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

/// A command on its way, with those who want to hear of its end.
pub(super) struct Work {
    pub(super) command: Command,
    pub(super) done: Done,
    pub(super) owner: Arc<Owner>,
}

impl Work {
    /// Tells that it is over, and that there is nothing more to tell. See [`Batch`] for more than one.
    pub(super) fn finish(self, result: io::Result<()>) {
        self.tell(result).settle();
    }

    fn tell(self, result: io::Result<()>) -> Arc<Owner> {
        if let Err(why) = &result {
            self.owner.report(&self.command, why);
        }
        (self.done)(result.map_err(IoError::Host));
        self.owner
    }

    /// Tells that it will not be done.
    pub(super) fn cancel(self) {
        (self.done)(Err(IoError::Cancelled));
        self.owner.settle();
    }

    /// Whether copying its data takes so long that another thread should do that meanwhile.
    pub(super) fn is_large(&self) -> bool {
        self.command.bytes() >= LARGE
    }
}

/// Bytes from which a request counts as large.
const LARGE: u64 = 128 << 10;

/// The ends of requests of one disk that a thread tells one after the other, so that the disk's owner can deal with them
/// together. Whoever has one settles it before anything that may take long.
#[derive(Default)]
pub(super) struct Batch {
    owner: Option<Arc<Owner>>,
    count: u32,
    bytes: u64,
}

impl Batch {
    /// More than this is not held back.
    const MAX_COUNT: u32 = 32;
    const MAX_BYTES: u64 = 2 * LARGE;

    /// Whether there is nothing to settle.
    pub(super) fn is_empty(&self) -> bool {
        self.owner.is_none()
    }

    /// Tells that a request is over.
    pub(super) fn end(&mut self, work: Work, result: io::Result<()>) {
        self.count += 1;
        self.bytes += work.command.bytes();
        self.owner = Some(work.tell(result));
        if self.count >= Self::MAX_COUNT || self.bytes >= Self::MAX_BYTES {
            self.settle();
        }
    }

    /// Tells that there is nothing more to tell for now.
    pub(super) fn settle(&mut self) {
        (self.count, self.bytes) = (0, 0);
        if let Some(owner) = self.owner.take() {
            owner.settle();
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Something for an engine's thread to run.
pub(super) type Call = Box<dyn FnOnce() + Send>;

/// What stands in an engine's queue.
pub(super) enum Job {
    Work(Work),
    Call(Call),
}

impl Job {
    /// Whether it is work that moves much data.
    pub(super) fn is_large(&self) -> bool {
        matches!(self, Self::Work(work) if work.is_large())
    }
}

/// Takes the work out of a queue, leaving the calls.
pub(super) fn take_work(jobs: &mut std::collections::VecDeque<Job>) -> Vec<Work> {
    let mut work = Vec::new();
    let calls = std::mem::take(jobs).into_iter().filter_map(|job| match job {
        Job::Work(one) => {
            work.push(one);
            None
        }
        Job::Call(call) => Some(Job::Call(call)),
    });
    *jobs = calls.collect();
    work
}

/// Does commands: a thread pool, an io_uring, a network client. Dropping an engine forgets what has not begun and waits
/// for the rest.
pub(super) trait Engine: Send + Sync {
    /// Queues work and returns at once.
    fn submit(&self, work: Work);

    /// Has `call` run on a thread of the engine.
    fn defer(&self, call: Call);

    /// Queues work for the calling thread, which is one of the engine's, unless another is free. For deferred calls.
    fn perform(&self, work: Work) {
        self.submit(work);
    }

    /// Ends work that has not begun with [`IoError::Cancelled`].
    fn cancel_queued(&self);

    /// Waits until everything queued is done. Not for threads of the engine.
    fn wait_idle(&self);
}
