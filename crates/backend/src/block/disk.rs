//! [`Disk`]: what emulated disks submit their requests to, whatever is behind it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memory::GuestMemory;

use super::BlockError;
use super::image::{Geometry, Image};
use super::nbd::NbdClient;
use super::options::{BlockOptions, Format};
use super::pool::Pool;
use super::qcow2::Qcow2Image;
use super::raw::RawImage;
use super::request::{Command, Engine, Owner, Request, Settled, Work};
use super::ring::Ring;
use super::throttle::Throttle;
use super::watch::Watch;

/// Called when the size of a disk has changed.
pub type Resized = Box<dyn Fn() + Send + Sync>;

/// An open disk with its threads. Dropping it forgets what has not begun and waits for the rest.
pub struct Disk {
    shared: Arc<Shared>,
    memory: GuestMemory,
    engine: Arc<dyn Engine>,
    owner: Arc<Owner>,
    /// Looks whether the host made the image larger; absent where that cannot be seen.
    _watch: Option<Watch>,
}

/// What can change while the disk is open.
pub(super) struct Shared {
    geometry: Geometry,
    size: AtomicU64,
    resized: Mutex<Option<Resized>>,
}

impl Shared {
    pub(super) fn new(geometry: Geometry) -> Arc<Self> {
        Arc::new(Self { geometry, size: AtomicU64::new(geometry.size), resized: Mutex::default() })
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Logical sector size in bytes.
    pub(super) fn logical(&self) -> u32 {
        self.geometry.sector_size.logical
    }

    fn geometry(&self) -> Geometry {
        Geometry { size: self.size(), ..self.geometry }
    }

    /// Takes over a new size, and tells of it if it is one.
    pub(super) fn set_size(&self, size: u64) {
        if self.size.swap(size, Ordering::AcqRel) != size
            && let Some(tell) = &*self.resized.lock().unwrap_or_else(PoisonError::into_inner)
        {
            tell();
        }
    }
}

impl Disk {
    /// Opens a disk whose requests use `memory`; its threads are called `name-N`.
    ///
    /// # Errors
    /// The image cannot be opened or no thread be started.
    pub fn open(options: &BlockOptions, memory: GuestMemory, name: &str) -> Result<Self, BlockError> {
        let path = options.path.display().to_string();
        let thread = |source| BlockError::Thread { path: options.path.clone(), source };
        let (shared, engine, watch): (_, Arc<dyn Engine>, _) = match &options.format {
            Format::Nbd(uri) => {
                let client = NbdClient::open(uri, options, name)?;
                (client.disk(), Arc::new(client), None)
            }
            Format::Qcow2 => {
                let image = Arc::new(Qcow2Image::open(options)?);
                let shared = Shared::new(image.geometry());
                (shared, Arc::new(Pool::start(image, name).map_err(thread)?), None)
            }
            Format::Raw => {
                let image = Arc::new(RawImage::open(options)?);
                let shared = Shared::new(image.geometry());
                let engine: Arc<dyn Engine> = match options.ring.then(|| Ring::start(image.clone(), name)) {
                    Some(Ok(ring)) => Arc::new(ring),
                    // The host's kernel has none, or does not let this process have it.
                    Some(Err(_)) | None => Arc::new(Pool::start(image.clone(), name).map_err(thread)?),
                };
                let watch = Watch::start(&options.path, image, shared.clone(), name);
                (shared, engine, watch)
            }
        };
        let engine = match options.limits.is_some() {
            true => Arc::new(Throttle::start(engine, options.limits, name).map_err(thread)?),
            false => engine,
        };
        Ok(Self { shared, memory, engine, owner: Owner::new(path), _watch: watch })
    }

    /// A disk on any image; `path` is what messages call it.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn with_image(image: Arc<dyn Image>, memory: GuestMemory, name: &str, path: String) -> io::Result<Self> {
        let shared = Shared::new(image.geometry());
        let engine = Arc::new(Pool::start(image, name)?);
        Ok(Self { shared, memory, engine, owner: Owner::new(path), _watch: None })
    }

    /// Size and abilities; the size may change, see [`on_resize`](Self::on_resize).
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }

    /// Has `tell` called, on some thread, whenever the size of the disk has changed.
    pub fn on_resize(&self, tell: Resized) {
        *self.shared.resized.lock().unwrap_or_else(PoisonError::into_inner) = Some(tell);
    }

    /// Has `tell` called after the ends of some requests have been told (by [`Request::done`]), on the same thread, when it
    /// has no more to tell for now: so a device can give many requests back to its driver at a time. Set it before the
    /// first request, once.
    pub fn on_settled(&self, tell: Settled) {
        self.owner.on_settled(tell);
    }

    /// Queues a request and returns at once.
    pub fn submit(&self, request: Request) {
        if let Some(work) = self.check(request) {
            self.engine.submit(work);
        }
    }

    /// Has `call` run on a thread of the disk, for instance to look at a guest's queue and submit what is there.
    pub fn defer(&self, call: impl FnOnce() + Send + 'static) {
        self.engine.defer(Box::new(call));
    }

    /// Queues a request, without waking another thread where this one will come to it. For use by deferred calls, as the
    /// last of what they submit.
    pub fn perform(&self, request: Request) {
        if let Some(work) = self.check(request) {
            self.engine.perform(work);
        }
    }

    /// Ends requests that have not begun with [`IoError::Cancelled`](super::IoError::Cancelled). Those under way go on.
    pub fn cancel_queued(&self) {
        self.engine.cancel_queued();
    }

    /// Waits until everything queued is done. Not for threads of the disk.
    pub fn wait_idle(&self) {
        self.engine.wait_idle();
    }

    /// The work of a request, unless it is over already: senseless or empty.
    fn check(&self, request: Request) -> Option<Work> {
        match Command::check(request.operation, &self.memory, &self.geometry()) {
            Ok(Some(command)) => Some(Work { command, done: request.done, owner: self.owner.clone() }),
            Ok(None) => {
                (request.done)(Ok(()));
                self.owner.settle();
                None
            }
            Err(why) => {
                (request.done)(Err(why));
                self.owner.settle();
                None
            }
        }
    }
}
