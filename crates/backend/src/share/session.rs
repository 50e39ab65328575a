//! [`Share`]: messages in, answers out, on threads of the share. Nothing here waits on the caller's thread.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::io::Errno;

use super::server::Server;
use super::state::ShareState;
use super::wire::{HEADER, MAX_MESSAGE, Reader, Writer, header, message};
use super::{ShareError, ShareOptions};

/// Threads of a share, at most. They start as they are needed.
const MAX_THREADS: usize = 8;

/// A message and the place for its answer, wherever they are.
pub trait Message: Send {
    /// The first bytes of the message; fewer if there are fewer.
    fn start(&self) -> Vec<u8>;
    /// The message, but no more than `limit` bytes.
    fn read(&self, limit: usize, into: &mut Vec<u8>);
    /// Bytes that an answer may have.
    fn room(&self) -> usize;
    /// Answers it. A message that is dropped instead is lost to the client.
    fn reply(self: Box<Self>, bytes: &[u8]);
}

struct Job {
    id: u64,
    message: Box<dyn Message>,
}

/// A message that is not answered yet.
struct Active {
    tag: u16,
    /// Requests to flush it, by tag, which are answered after it.
    flushes: Vec<(u16, Box<dyn Message>)>,
}

#[derive(Default)]
struct Pool {
    queue: VecDeque<Job>,
    active: HashMap<u64, Active>,
    next_id: u64,
    waiting: usize,
    running: usize,
    threads: Vec<JoinHandle<()>>,
    stop: bool,
}

struct Shared {
    options: ShareOptions,
    name: String,
    server: Mutex<Arc<Server>>,
    pool: Mutex<Pool>,
    work: Condvar,
    idle: Condvar,
}

/// A shared folder with its threads. Dropping it forgets what has not begun and waits for the rest.
pub struct Share(Arc<Shared>);

impl Share {
    /// Opens the folder; threads are called `name`.
    ///
    /// # Errors
    /// The folder is not there, is none, or may not be opened; the host gives no thread.
    pub fn open(options: &ShareOptions, name: &str) -> Result<Self, ShareError> {
        let server = Server::open(options)?;
        let shared = Arc::new(Shared {
            options: options.clone(),
            name: name.into(),
            server: Mutex::new(Arc::new(server)),
            pool: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
        });
        // With one thread every message will be answered; more are a matter of speed.
        shared.start_thread(&mut shared.pool()).map_err(|source| ShareError::Host {
            doing: "start a thread",
            path: options.path.clone(),
            source,
        })?;
        Ok(Self(shared))
    }

    /// Takes a message; its answer comes later, from another thread.
    pub fn submit(&self, message: Box<dyn Message>) {
        let start = message.start();
        match header(&start) {
            Some((_, message::FLUSH, tag)) => self.flush(tag, message),
            other => self.enqueue(other.map_or(0xffff, |(_, _, tag)| tag), message),
        }
    }

    fn enqueue(&self, tag: u16, message: Box<dyn Message>) {
        let mut pool = self.0.pool();
        let id = pool.next_id;
        pool.next_id += 1;
        pool.active.insert(id, Active { tag, flushes: Vec::new() });
        pool.queue.push_back(Job { id, message });
        if pool.queue.len() > pool.waiting && pool.threads.len() < MAX_THREADS {
            // Without one more thread it takes longer.
            let _ = self.0.start_thread(&mut pool);
        }
        drop(pool);
        self.0.work.notify_one();
    }

    /// Answers a flush when the message it names is out of the way: at once if there is none, or one that has not begun,
    /// which is cancelled; otherwise after its answer.
    fn flush(&self, tag: u16, flush: Box<dyn Message>) {
        let mut request = Vec::new();
        flush.read(HEADER + 2, &mut request);
        let old = Reader(request.get(HEADER..).unwrap_or_default()).u16().ok().filter(|old| *old != tag);
        let mut pool = self.0.pool();
        let id = old.and_then(|old| {
            let names = |active: &Active| active.tag == old || active.flushes.iter().any(|(tag, _)| *tag == old);
            // A message that has just been answered may still be listed, and its tag used again.
            pool.active.iter().filter(|(_, active)| names(active)).map(|(id, _)| *id).max()
        });
        let Some(id) = id else {
            drop(pool);
            return answer(flush, message::FLUSH, tag, Ok(()));
        };
        if let Some(active) = pool.active.get_mut(&id) {
            active.flushes.push((tag, flush));
        }
        let queued = pool.queue.iter().position(|job| job.id == id).and_then(|at| pool.queue.remove(at));
        drop(pool);
        if let Some(job) = queued {
            let (_, kind, old) = header(&job.message.start()).unwrap_or((0, 0, 0xffff));
            answer(job.message, kind, old, Err(Errno::INTR));
            self.0.finished(id);
        }
    }

    /// Ends what the guest had with the share, as at power-on. What is under way goes on, on files that nobody else sees
    /// any more; what has not begun is forgotten.
    pub fn reset(&self) {
        let queued: Vec<_> = {
            let mut pool = self.0.pool();
            let queued: Vec<_> = pool.queue.drain(..).collect();
            queued.into_iter().map(|job| (pool.active.remove(&job.id), job)).collect()
        };
        drop(queued);
        // The folder was there when the VM began. If it is not there any more, the old one goes on, without fids.
        match Server::open(&self.0.options) {
            Ok(server) => *self.0.server.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(server),
            Err(why) => {
                log::warn!("{why}");
                let server = self.0.server();
                server.fids.clear();
                server.locks.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
        }
        self.0.idle.notify_all();
    }

    /// Waits until every message has been answered.
    pub fn wait_idle(&self) {
        let pool = self.0.pool();
        drop(self.0.idle.wait_while(pool, |pool| !pool.queue.is_empty() || pool.running > 0));
    }

    /// The state; waits until nothing is under way.
    pub fn state(&self) -> ShareState {
        self.wait_idle();
        self.0.server().state()
    }

    /// Takes over a state, which is checked.
    ///
    /// # Errors
    /// It is one that a share cannot be in; the share is then as after a reset.
    pub fn restore(&self, state: ShareState) -> Result<(), String> {
        self.reset();
        self.0.server().restore(state).inspect_err(|_| self.reset())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let (threads, queued) = {
            let mut pool = self.0.pool();
            pool.stop = true;
            (std::mem::take(&mut pool.threads), std::mem::take(&mut pool.queue))
        };
        self.0.work.notify_all();
        drop(queued);
        for thread in threads {
            if thread.thread().id() != thread::current().id() {
                // A panic of the thread has been reported by the panic hook; there is nothing to add.
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn server(&self) -> Arc<Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start_thread(self: &Arc<Self>, pool: &mut Pool) -> io::Result<()> {
        let shared = self.clone();
        let thread = thread::Builder::new().name(self.name.clone()).spawn(move || {
            super::sys::clear_umask();
            let (mut request, mut reply) = (Vec::new(), Vec::new());
            while let Some(job) = shared.next() {
                shared.serve(job, &mut request, &mut reply);
            }
        })?;
        pool.threads.push(thread);
        Ok(())
    }

    fn next(&self) -> Option<Job> {
        let mut pool = self.pool();
        pool.waiting += 1;
        let mut pool = self
            .work
            .wait_while(pool, |pool| pool.queue.is_empty() && !pool.stop)
            .unwrap_or_else(PoisonError::into_inner);
        pool.waiting -= 1;
        let job = pool.queue.pop_front()?;
        pool.running += 1;
        Some(job)
    }

    fn serve(&self, job: Job, request: &mut Vec<u8>, reply: &mut Vec<u8>) {
        request.clear();
        job.message.read(MAX_MESSAGE, request);
        self.server().answer(request, reply, job.message.room());
        job.message.reply(reply);
        self.finished(job.id);
        let mut pool = self.pool();
        pool.running -= 1;
        if pool.running == 0 && pool.queue.is_empty() {
            self.idle.notify_all();
        }
    }

    /// A message has been answered; now those that wanted it flushed are, and then those that wanted these flushed.
    fn finished(&self, id: u64) {
        loop {
            let mut pool = self.pool();
            let flushes =
                pool.active.get_mut(&id).map(|active| std::mem::take(&mut active.flushes)).unwrap_or_default();
            if flushes.is_empty() {
                pool.active.remove(&id);
                return;
            }
            drop(pool);
            for (tag, flush) in flushes {
                answer(flush, message::FLUSH, tag, Ok(()));
            }
        }
    }
}

/// Answers a message without content.
fn answer(to: Box<dyn Message>, kind: u8, tag: u16, result: Result<(), Errno>) {
    let mut bytes = Vec::new();
    Writer::new(&mut bytes, to.room()).finish(kind, tag, result);
    to.reply(&bytes);
}
