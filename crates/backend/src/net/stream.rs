//! A connection over a unix socket, each packet behind its length (32 bits, big-endian): what QEMU's `-netdev stream`
//! speaks, and passt. Two VMs are joined when one listens and the other connects.
//!
//! A lost connection takes the link down. Whoever connected tries again every second; whoever listened waits for the
//! next.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::options::NicOptions;
use super::{
    Abilities, Delivery, Frame, MAX_PACKET, NetBackend, NetDevice, NetError, Offloads, Packet, PacketHeader, Sending,
    sys,
};
use crate::tty::is_dead_socket;
use crate::tty::wake::{Wake, readable, wait};

/// Bytes of the length before each packet.
const PREFIX: usize = 4;
const BUFFER: usize = 256 << 10;
const RECONNECT: Duration = Duration::from_secs(1);

/// One end of such a connection.
pub(super) struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    listener: Option<UnixListener>,
    device: OnceLock<Weak<dyn NetDevice>>,
    out: Mutex<Out>,
    wake: Wake,
    stop: AtomicBool,
}

/// The sending side.
#[derive(Default)]
struct Out {
    socket: Option<Arc<UnixStream>>,
    /// The end of a packet that the socket took in part.
    rest: Vec<u8>,
    /// The NIC's queues that were told "busy", as bits.
    busy: u64,
}

impl Stream {
    /// Connects to the socket at `path`, or makes it and waits there.
    pub(super) fn open(path: &str, options: &NicOptions) -> Result<Arc<Self>, NetError> {
        let path = PathBuf::from(path);
        let failed = |what, advice| {
            let path = path.clone();
            move |source: io::Error| NetError::Socket { what, path, advice, source }
        };
        if path.as_os_str().is_empty() {
            return Err(NetError::Value {
                option: "backend",
                value: "unix:".into(),
                why: "name the socket, as in unix:/run/passt.socket".into(),
            });
        }
        let mut out = Out::default();
        let listener = if options.listen {
            Some(listen(&path).map_err(failed("listen on", ""))?)
        } else {
            let advice =
                " (who listens there, such as passt, has to be started first; with \",listen\" this VM listens)";
            out.socket = Some(connect(&path).map_err(failed("connect to", advice))?);
            None
        };
        let wake = Wake::new().map_err(failed("wait for", ""))?;
        let shared = Arc::new(Shared {
            path: path.clone(),
            listener,
            device: OnceLock::new(),
            out: Mutex::new(out),
            wake,
            stop: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = thread::Builder::new().name(format!("{}-rx", options.name)).spawn(move || theirs.run());
        Ok(Arc::new(Self { shared, thread: Some(thread.map_err(failed("start a thread for", ""))?) }))
    }
}

fn connect(path: &Path) -> io::Result<Arc<UnixStream>> {
    let socket = UnixStream::connect(path)?;
    socket.set_nonblocking(true)?;
    Ok(Arc::new(socket))
}

/// Makes a socket to listen on; one that was left behind by a process that is gone is replaced.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(why) if why.kind() == io::ErrorKind::AddrInUse && is_dead_socket(path) => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Shared {
    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn run(&self) {
        while self.device.get().is_none() && !self.stopped() {
            wait(&mut [PollFd::new(&self.wake, PollFlags::IN)]);
            self.wake.clear();
        }
        while !self.stopped() {
            let connected = self.out().socket.clone();
            let Some(socket) = connected.or_else(|| self.find_peer()) else { continue };
            self.set_link(true);
            self.serve(&socket);
            let mut out = self.out();
            *out = Out { busy: out.busy, ..Out::default() };
            drop(out);
            self.set_link(false);
            self.tell_ready();
        }
    }

    fn set_link(&self, up: bool) {
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.set_link(up);
        }
    }

    /// Waits for a peer, for a time.
    fn find_peer(&self) -> Option<Arc<UnixStream>> {
        let socket = if let Some(listener) = &self.listener {
            wait(&mut [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)]);
            self.wake.clear();
            let (socket, _) = listener.accept().ok()?;
            socket.set_nonblocking(true).ok()?;
            Arc::new(socket)
        } else {
            let pause = Timespec { tv_sec: RECONNECT.as_secs() as i64, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(&pause));
            self.wake.clear();
            connect(&self.path).ok()?
        };
        self.out().socket = Some(socket.clone());
        Some(socket)
    }

    /// Takes packets of the peer, and sends to it what had to wait, until the connection ends.
    fn serve(&self, socket: &UnixStream) {
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let mut room = true;
        while !self.stopped() {
            let Some(used) = self.deliver(&buffer[..filled], &mut room) else { return };
            // What is left with room is a part of a packet, so that there is space behind it.
            buffer.copy_within(used..filled, 0);
            filled -= used;
            let waiting = self.out().waits();
            if !room && !waiting {
                // Without the socket: the end of the connection would wake for ever.
                readable(None, &self.wake);
                self.wake.clear();
                continue;
            }
            let mut events = if room { PollFlags::IN } else { PollFlags::empty() };
            events |= if waiting { PollFlags::OUT } else { PollFlags::empty() };
            let mut fds = [PollFd::new(socket, events), PollFd::new(&self.wake, PollFlags::IN)];
            wait(&mut fds);
            let (ready, woken) = (fds[0].revents(), !fds[1].revents().is_empty());
            if woken {
                self.wake.clear();
            }
            if ready.contains(PollFlags::OUT) && self.out().flush() {
                self.tell_ready();
            }
            if room && !ready.difference(PollFlags::OUT).is_empty() {
                match (&mut &*socket).read(&mut buffer[filled..]) {
                    Ok(0) => return,
                    Ok(count) => filled += count,
                    Err(why) if matches!(why.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                    Err(_) => return,
                }
            }
        }
    }

    /// Hands over whole packets; returns how many bytes those were, `None` when the peer breaks the protocol.
    fn deliver(&self, bytes: &[u8], room: &mut bool) -> Option<usize> {
        let device = self.device.get().and_then(Weak::upgrade)?;
        let mut used = 0;
        *room = true;
        while let Some((prefix, rest)) = bytes.get(used..).and_then(|rest| rest.split_first_chunk::<PREFIX>()) {
            let len = u32::from_be_bytes(*prefix) as usize;
            if len > MAX_PACKET {
                log::warn!("{}: the peer sends no packets of this kind", self.path.display());
                return None;
            }
            let Some(packet) = rest.get(..len) else { break };
            if device.receive(0, &Packet { header: PacketHeader::default(), pieces: &[packet] }) == Delivery::NoRoom {
                *room = false;
                break;
            }
            used += PREFIX + len;
        }
        Some(used)
    }

    fn tell_ready(&self) {
        let busy = std::mem::take(&mut self.out().busy);
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            (0..64).filter(|queue| busy & 1 << queue != 0).for_each(|queue| device.send_ready(queue));
        }
    }
}

impl Out {
    /// Whether something waits until the socket takes more.
    fn waits(&self) -> bool {
        !self.rest.is_empty() || self.busy != 0
    }

    /// Sends what was left of a packet; returns whether all of it is gone.
    fn flush(&mut self) -> bool {
        let Some(socket) = &self.socket else { return true };
        while !self.rest.is_empty() {
            match io::Write::write(&mut &**socket, &self.rest) {
                Ok(count) => drop(self.rest.drain(..count)),
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return false,
                // The reader notices the end.
                Err(_) => self.rest.clear(),
            }
        }
        true
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sending {
        if !self.flush() {
            return Sending::Busy;
        }
        let Some(socket) = &self.socket else { return Sending::Taken };
        let prefix = (frame.len() as u32).to_be_bytes();
        match frame.send(socket.as_fd(), sys::Way::Socket, &prefix, (0, frame.len())) {
            Ok(count) if count < PREFIX + frame.len() => {
                let mut rest = prefix.get(count..).unwrap_or_default().to_vec();
                rest.extend(frame.to_vec().get(count.saturating_sub(PREFIX)..).unwrap_or_default());
                self.rest = rest;
            }
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => return Sending::Busy,
            _ => {}
        }
        Sending::Taken
    }
}

impl NetBackend for Stream {
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn link(&self) -> bool {
        self.shared.out().socket.is_some()
    }

    fn attach(&self, device: Weak<dyn NetDevice>) {
        // A second NIC would be a mistake of ours; the first keeps the connection.
        let _ = self.shared.device.set(device);
        self.shared.wake.set();
    }

    fn send(&self, queue: u16, frame: &Frame<'_>) -> Sending {
        let mut out = self.shared.out();
        let sending = out.send(frame);
        let waits = sending == Sending::Busy || !out.rest.is_empty();
        if sending == Sending::Busy {
            out.busy |= 1 << (queue % 64);
        }
        drop(out);
        if waits {
            self.shared.wake.set();
        }
        sending
    }

    fn resume(&self, _: u16) {
        self.shared.wake.set();
    }

    fn set_offloads(&self, _: Offloads) {}
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.set();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            log::warn!("the thread of {} failed", self.shared.path.display());
        }
        if self.shared.listener.is_some() {
            // It may have been removed by somebody else.
            let _ = std::fs::remove_file(&self.shared.path);
        }
    }
}
