//! A listening socket, TCP or UNIX, as a serial line: one client at a time, output without a client is dropped.
//!
//! A client that has closed its sending side may still read, so it stays, but it makes place for the next one:
//! on this side of the network, a client that is gone for good looks the same.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, SocketFlags};

use super::line::{ByteSource, Input, Parts};
use super::output::{ByteSink, WhenFull};
use super::wake::{Wake, wait, writable};
use super::{Tty, TtyError};

/// How long to leave clients waiting after the host could not make a connection (out of descriptors or memory).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Listens on a TCP port.
pub(super) fn open_tcp(address: SocketAddr) -> Result<Tty, TtyError> {
    let failed = |e| TtyError::host("listen on", address, e);
    let listener = TcpListener::bind(address).map_err(failed)?;
    let local_address = listener.local_addr().map_err(failed)?;
    start(listener.into(), None, Some(local_address)).map_err(failed)?
}

/// Listens on a UNIX socket.
pub(super) fn open_unix(path: &Path) -> Result<Tty, TtyError> {
    let failed = |e| TtyError::host("listen on", path.display(), e);
    let socket = UnixSocket::bind(path).map_err(failed)?;
    start(socket.0, Some(socket.1), None).map_err(failed)?
}

fn start(
    listener: OwnedFd,
    file: Option<SocketFile>,
    address: Option<SocketAddr>,
) -> io::Result<Result<Tty, TtyError>> {
    rustix::io::ioctl_fionbio(&listener, true)?;
    let seat = Arc::new(Seat::default());
    let source = SocketSource { listener, tcp: address.is_some(), seat: seat.clone(), told: false, _file: file };
    let mut parts = Parts::new(Some(Box::new(source)), Box::new(SocketSink { seat }), WhenFull::Drop);
    parts.local_address = address;
    parts.has_clients = true;
    Ok(Tty::start(parts))
}

/// A listening UNIX socket and its file.
pub(crate) struct UnixSocket(pub(crate) OwnedFd, pub(crate) SocketFile);

impl UnixSocket {
    /// Listens at `path`. A socket file that a dead process has left there is replaced.
    ///
    /// # Errors
    /// Somebody listens there, something else is there, or the host refuses.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_dead_socket(path) => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        let meta = std::fs::symlink_metadata(path)?;
        let file = SocketFile { path: path.to_owned(), identity: (meta.dev(), meta.ino()) };
        Ok(Self(listener.into(), file))
    }
}

/// Whether a stream socket is there to which nobody listens any more; nothing else may be replaced.
pub(crate) fn is_dead_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// The file of a listening UNIX socket; removed when dropped, unless it has become another one.
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity) {
            // One that cannot be removed is replaced by the next to listen there.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

struct Client {
    stream: OwnedFd,
    /// The client sends no more.
    at_end: AtomicBool,
}

impl Client {
    fn new(stream: OwnedFd, tcp: bool) -> io::Result<Self> {
        if tcp {
            rustix::net::sockopt::set_tcp_nodelay(&stream, true)?;
            // So that a client whose host vanished does not hold the line for ever.
            rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
        }
        Ok(Self { stream, at_end: AtomicBool::new(false) })
    }

    fn hang_up(&self) {
        // Fails only when the connection is gone anyway.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }

    /// Whether the client has closed its sending side, or is gone.
    fn leaving(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        self.at_end.load(Ordering::Acquire)
            || (poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && !fds[0].revents().is_empty())
    }
}

/// Where the one client sits.
#[derive(Default)]
struct Seat(Mutex<Option<Arc<Client>>>);

impl Seat {
    fn client(&self) -> Option<Arc<Client>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, new: Option<Client>) {
        let old = std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), new.map(Arc::new));
        if let Some(old) = old {
            // Ends a wait of the other thread on this client.
            old.hang_up();
        }
    }

    /// Ends the connection with `client`, if it is still the one.
    fn dismiss(&self, client: &Arc<Client>) {
        let mut seat = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seat.as_ref().is_some_and(|current| Arc::ptr_eq(current, client)) {
            *seat = None;
        }
        drop(seat);
        client.hang_up();
    }
}

struct SocketSource {
    listener: OwnedFd,
    tcp: bool,
    seat: Arc<Seat>,
    /// Whether the device has been told of a client.
    told: bool,
    _file: Option<SocketFile>,
}

impl SocketSource {
    /// Takes in those who knock: the first gets a free seat, the others are sent away.
    fn accept(&self, wake: &Wake) {
        loop {
            match rustix::net::accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(stream) => {
                    if self.seat.client().is_none_or(|client| client.leaving())
                        && let Ok(client) = Client::new(stream, self.tcp)
                    {
                        self.seat.put(Some(client));
                    }
                }
                Err(Errno::AGAIN) => return,
                // The client changed its mind.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => {
                    let pause = Timespec { tv_sec: ACCEPT_PAUSE.as_secs() as i64, tv_nsec: 0 };
                    let _ = poll(&mut [PollFd::new(wake, PollFlags::IN)], Some(&pause));
                    return;
                }
            }
        }
    }

    fn receive(&self, client: &Arc<Client>, buffer: &mut [u8]) -> Input {
        match rustix::io::read(&client.stream, buffer) {
            Ok(0) => client.at_end.store(true, Ordering::Release),
            Ok(count) => return Input::Bytes(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.seat.dismiss(client),
        }
        Input::Nothing
    }
}

impl ByteSource for SocketSource {
    fn read(&mut self, buffer: &mut [u8], want: bool, wake: &Wake) -> Input {
        let client = self.seat.client();
        if want && client.is_some() != self.told {
            self.told = client.is_some();
            return Input::Client(self.told);
        }
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        if let Some(client) = &client {
            let reading = want && !client.at_end.load(Ordering::Acquire);
            // Without events, the end of the connection is still told.
            fds.push(PollFd::new(&client.stream, if reading { PollFlags::IN } else { PollFlags::empty() }));
        }
        wait(&mut fds);
        let ready = |n: usize| fds.get(n).map_or(PollFlags::empty(), |fd| fd.revents());
        let (knock, client_ready) = (ready(0), ready(2));
        if let Some(client) = &client {
            if client_ready.contains(PollFlags::IN) {
                return self.receive(client, buffer);
            }
            if !client_ready.is_empty() {
                self.seat.dismiss(client);
            }
        }
        if !knock.is_empty() {
            self.accept(wake);
        }
        Input::Nothing
    }
}

impl Drop for SocketSource {
    fn drop(&mut self) {
        self.seat.put(None);
    }
}

struct SocketSink {
    seat: Arc<Seat>,
}

impl ByteSink for SocketSink {
    fn write(&mut self, bytes: &[u8], stop: &Wake) -> io::Result<usize> {
        let Some(client) = self.seat.client() else { return Ok(bytes.len()) };
        if !writable(client.stream.as_fd(), stop) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match rustix::net::send(&client.stream, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => Ok(count),
            Err(Errno::INTR | Errno::AGAIN) => Ok(0),
            Err(_) => {
                self.seat.dismiss(&client);
                Ok(bytes.len())
            }
        }
    }
}
