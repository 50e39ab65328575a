//! The front end of vhost-user: another process serves a device's queues, over a UNIX socket and shared guest memory.
//!
//! For any device: [`Frontend`] speaks the protocol (QEMU's `vhost-user.rst`, without migration and IOMMU),
//! the device says which features were negotiated and where the rings are. The order is
//!
//! 1. [`Frontend::connect`], [`Frontend::features`]: what the back end can do;
//! 2. when the driver is ready: [`Frontend::start`] with the features in force and the rings;
//! 3. doorbells: [`Frontend::kick`]; interrupts: [`Frontend::wait_calls`] on a thread of the device;
//! 4. [`Frontend::stop`] before the rings go away, after which 2. may come again;
//! 5. when the back end has gone, [`Frontend::dial`], [`Frontend::adopt`], and 2. again.
//!
//! The back end writes guest memory behind our back. Who makes a device on it calls
//! [`PageMap::has_other_writers`](memory::PageMap::has_other_writers) and notes the writes as well as it can.

mod message;
#[cfg(test)]
mod tests;
mod virtiofsd;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memory::GuestMemory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use message::{Body, Request, protocol};
pub use virtiofsd::Virtiofsd;

/// The feature bit by which a back end offers protocol features (bit 30 of virtio's, reserved for this).
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// How long a back end may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a back end cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// Nobody listens there.
    #[error("cannot connect to the vhost-user back end at {path}; is it running?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A folder cannot be shared.
    #[error("cannot share the folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// There is no virtiofsd to start.
    #[error("virtiofsd is not installed (Debian has it in qemu-system-common); name it by virtiofsd=PROGRAM")]
    NoVirtiofsd,
    /// A back end of our own cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A back end of our own has ended.
    #[error("{program} has ended ({status}) instead of sharing the folder")]
    Ended {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// The guest's memory is this process's own.
    #[error("the vhost-user back end at {path} needs guest memory that is shared: set memory.shared=true")]
    NotShared {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke, or an answer did not come or made no sense.
    #[error("the vhost-user back end at {path} failed to {doing}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}

/// Where the rings of a queue are, as guest-physical addresses that have been checked to be in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ring {
    /// Number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// The index at which the back end begins.
    pub base: u16,
    /// Whether the back end shall use the queue from the start.
    pub enabled: bool,
}

/// A connection to a back end.
pub struct Frontend {
    path: PathBuf,
    stream: Mutex<UnixStream>,
    /// The same, to wait for its end.
    watch: Mutex<Arc<UnixStream>>,
    memory: GuestMemory,
    /// What the back end offers.
    features: u64,
    /// How many queues it says it can serve, if it says; for a NIC these are pairs.
    limit: Option<u64>,
    /// Whether it answers every request that asks for it.
    replies: bool,
    /// Whether it has closed the connection.
    gone: AtomicBool,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    /// Ends a wait for calls.
    wake: OwnedFd,
}

impl Frontend {
    /// Connects to the back end at `path`, for a device with `queues` queues.
    ///
    /// # Errors
    /// The memory is not shared, nobody listens, or the other side does not speak the protocol.
    pub fn connect(path: &Path, queues: usize, memory: GuestMemory) -> Result<Self, VhostError> {
        let failed = |source| VhostError::Connect { path: path.to_owned(), source };
        Self::over(UnixStream::connect(path).map_err(failed)?, path, queues, memory)
    }

    /// The same over a connection that is there already; `path` is for messages.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub fn over(stream: UnixStream, path: &Path, queues: usize, memory: GuestMemory) -> Result<Self, VhostError> {
        if memory.fd().is_none() {
            return Err(VhostError::NotShared { path: path.to_owned() });
        }
        let failed = |source| VhostError::Connect { path: path.to_owned(), source };
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let events = || (0..queues).map(|_| event()).collect::<Result<Vec<_>, _>>();
        let (kicks, calls) = (events().map_err(|e| failed(e.into()))?, events().map_err(|e| failed(e.into()))?);
        let wake = event().map_err(|e| failed(e.into()))?;
        let watch = Mutex::new(Arc::new(stream.try_clone().map_err(failed)?));
        let (stream, Greeting { features, limit, replies }) = greet(stream, path)?;
        Ok(Self {
            path: path.to_owned(),
            watch,
            stream: Mutex::new(stream),
            memory,
            features,
            limit,
            replies,
            gone: AtomicBool::new(false),
            kicks,
            calls,
            wake,
        })
    }

    /// Connects anew when the back end has gone: to another one at the same place. [`Self::adopt`] is to follow.
    ///
    /// # Errors
    /// As for [`Self::connect`]; also that it can less than the one before, on which the driver counts.
    pub fn dial(&self) -> Result<Connection, VhostError> {
        let failed = |source| VhostError::Connect { path: self.path.clone(), source };
        let stream = UnixStream::connect(&self.path).map_err(failed)?;
        let watch = Arc::new(stream.try_clone().map_err(failed)?);
        let (stream, greeting) = greet(stream, &self.path)?;
        let less = greeting.features & self.features != self.features || greeting.limit < self.limit;
        if less || greeting.replies != self.replies {
            return Err(self.error("do what the one before it did", io::ErrorKind::Unsupported.into()));
        }
        Ok(Connection { stream, watch })
    }

    /// Goes over to another back end, which has no queues yet. Not while others use this value to start or stop queues.
    pub fn adopt(&self, connection: Connection) {
        *self.stream() = connection.stream;
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = connection.watch;
        self.gone.store(false, Ordering::Release);
    }

    fn error(&self, doing: &'static str, source: io::Error) -> VhostError {
        VhostError::Protocol { path: self.path.clone(), doing, source }
    }

    fn stream(&self) -> MutexGuard<'_, UnixStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's features that the back end offers.
    pub fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// How many queues it has been asked to serve.
    pub fn queues(&self) -> usize {
        self.kicks.len()
    }

    /// The most queues that the back end can serve, or pairs of queues if it serves a NIC; `None` if it does not say.
    pub fn queue_limit(&self) -> Option<u64> {
        self.limit
    }

    /// Hands the queues over. `rings` are those that the driver has set up, by queue number.
    ///
    /// # Errors
    /// The back end is gone or refuses.
    pub fn start(&self, features: u64, rings: &[(usize, Ring)]) -> Result<(), VhostError> {
        let host = |gpa: u64| self.memory.base() as u64 + gpa;
        let protocol = self.features & PROTOCOL_FEATURES;
        let run = || -> io::Result<()> {
            self.send(Request::SetFeatures, &Body::new().u64(features | protocol), &[])?;
            self.share_memory()?;
            for (index, ring) in rings {
                let (kick, call) = match (self.kicks.get(*index), self.calls.get(*index)) {
                    (Some(kick), Some(call)) => (kick, call),
                    _ => continue,
                };
                let state = |value: u32| Body::new().u32(*index as u32).u32(value);
                self.send(Request::SetVringNum, &state(ring.size.into()), &[])?;
                self.send(Request::SetVringBase, &state(ring.base.into()), &[])?;
                let addresses =
                    state(0).u64(host(ring.descriptors)).u64(host(ring.used)).u64(host(ring.available)).u64(0);
                self.send(Request::SetVringAddr, &addresses, &[])?;
                let number = Body::new().u64(*index as u64);
                self.send(Request::SetVringKick, &number, &[kick.as_fd()])?;
                self.send(Request::SetVringCall, &number, &[call.as_fd()])?;
                if protocol != 0 {
                    self.send(Request::SetVringEnable, &state(ring.enabled.into()), &[])?;
                }
            }
            Ok(())
        };
        run().map_err(|source| self.error("take over the queues", source))
    }

    /// Gives the back end the guest's memory: its file, and where pieces of it are.
    fn share_memory(&self) -> io::Result<()> {
        let mut body = Body::new().u32(self.memory.ranges().count() as u32).u32(0);
        let mut offset = 0;
        let mut files = Vec::new();
        for range in self.memory.ranges() {
            let host = self.memory.base() as u64 + range.start.0;
            body = body.u64(range.start.0).u64(range.size).u64(host).u64(offset);
            offset += range.size;
            files.push(self.memory.fd().ok_or_else(|| io::Error::other("guest memory is not shared"))?);
        }
        self.send(Request::SetMemTable, &body, &files)
    }

    /// Takes the queues back: returns when the back end does not touch them any more. What it was doing is lost.
    ///
    /// # Errors
    /// The back end is gone; then it does not touch them either.
    pub fn stop(&self, queues: impl IntoIterator<Item = usize>) -> Result<(), VhostError> {
        for index in queues {
            let state = Body::new().u32(index as u32).u32(0);
            let mut stream = self.stream();
            let answer = message::send(&stream, Request::GetVringBase, false, &state, &[])
                .and_then(|()| message::receive(&mut stream, Request::GetVringBase));
            answer.map_err(|source| self.error("give the queues back", source))?;
        }
        Ok(())
    }

    /// Says whether the back end shall use a queue that it has been given.
    ///
    /// # Errors
    /// The back end is gone or refuses.
    pub fn enable(&self, queue: usize, on: bool) -> Result<(), VhostError> {
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        let state = Body::new().u32(queue as u32).u32(on.into());
        self.send(Request::SetVringEnable, &state, &[]).map_err(|source| self.error("turn a queue on or off", source))
    }

    /// Tells the back end that there are new buffers on a queue. Never waits.
    pub fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            // Fails only when the counter is full: then the back end is about to look anyway.
            let _ = rustix::io::write(kick, &1u64.to_ne_bytes());
        }
    }

    /// Waits until the back end has used buffers or is gone, [`Self::wake`] is called, or `seconds` are over: the queues
    /// concerned, as bits.
    pub fn wait_calls(&self, seconds: Option<u32>) -> u64 {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let time = seconds.map(|seconds| Timespec { tv_sec: seconds.into(), tv_nsec: 0 });
        let events = || self.calls.iter().chain([&self.wake]);
        let mut fds: Vec<_> = events().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        if !self.is_gone() {
            fds.push(PollFd::new(&*watch, PollFlags::RDHUP));
        }
        if poll(&mut fds, time.as_ref()).is_err() {
            // A signal, or a host without memory: the caller comes back.
            return 0;
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
        let mut queues = 0;
        for (index, event) in events().enumerate() {
            if ready.next() == Some(true) {
                // Fails only when it is clear already.
                let _ = rustix::io::read(event, &mut [0u8; 8]);
                queues |= if index < self.calls.len() { 1 << (index % 64) } else { 0 };
            }
        }
        if ready.next() == Some(true) {
            self.gone.store(true, Ordering::Release);
        }
        queues
    }

    /// Ends a wait for calls.
    pub fn wake(&self) {
        // Fails only when the counter is full: then it is set as it is.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Whether the back end has closed the connection, as far as [`Self::wait_calls`] has seen.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    fn send(&self, request: Request, body: &Body, files: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        let mut stream = self.stream();
        message::send(&stream, request, self.replies, body, files)?;
        if self.replies {
            match message::receive(&mut stream, request)? {
                0 => {}
                code => return Err(io::Error::other(format!("it refused {request:?} with code {code}"))),
            }
        }
        Ok(())
    }
}

/// A connection to another back end than that in use.
pub struct Connection {
    stream: UnixStream,
    watch: Arc<UnixStream>,
}

/// What a back end says of itself.
struct Greeting {
    features: u64,
    limit: Option<u64>,
    replies: bool,
}

/// The first requests on a connection.
fn greet(mut stream: UnixStream, path: &Path) -> Result<(UnixStream, Greeting), VhostError> {
    let mut talk = || -> io::Result<Greeting> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        message::send(&stream, Request::SetOwner, false, &Body::new(), &[])?;
        let features = ask(&mut stream, Request::GetFeatures)?;
        let mut greeting = Greeting { features, limit: None, replies: false };
        if features & PROTOCOL_FEATURES != 0 {
            let offered = ask(&mut stream, Request::GetProtocolFeatures)?;
            let wanted = offered & (protocol::MULTI_QUEUE | protocol::REPLY_ACK);
            message::send(&stream, Request::SetProtocolFeatures, false, &Body::new().u64(wanted), &[])?;
            greeting.replies = wanted & protocol::REPLY_ACK != 0;
            if wanted & protocol::MULTI_QUEUE != 0 {
                greeting.limit = Some(ask(&mut stream, Request::GetQueueNum)?);
            }
        }
        Ok(greeting)
    };
    let doing = "say what it can do";
    let greeting = talk().map_err(|source| VhostError::Protocol { path: path.to_owned(), doing, source })?;
    Ok((stream, greeting))
}

fn ask(stream: &mut UnixStream, request: Request) -> io::Result<u64> {
    message::send(stream, request, false, &Body::new(), &[])?;
    message::receive(stream, request)
}
