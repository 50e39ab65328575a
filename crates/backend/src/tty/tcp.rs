//! A listening TCP socket as a serial line: one client at a time, output without a client is dropped.
//!
//! A client that has closed its sending side may still read, so it stays, but it makes place for the next one:
//! on this side of the network, a client that is gone for good looks the same.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::line::{ByteSource, Input, Parts};
use super::output::{ByteSink, WhenFull};
use super::wake::{Wake, wait, writable};
use super::{Tty, TtyError};

/// How long to leave clients waiting after the host could not make a connection (out of descriptors or memory).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(super) fn open(address: SocketAddr) -> Result<Tty, TtyError> {
    let failed = |e| TtyError::host("listen on", address, e);
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let local_address = listener.local_addr().map_err(failed)?;
    let seat = Arc::new(Seat::default());
    let source = TcpSource { listener, seat: seat.clone() };
    let mut parts = Parts::new(Some(Box::new(source)), Box::new(TcpSink { seat }), WhenFull::Drop);
    parts.local_address = Some(local_address);
    Tty::start(parts)
}

struct Client {
    stream: TcpStream,
    /// The client sends no more.
    at_end: AtomicBool,
}

impl Client {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        // So that a client whose host vanished does not hold the line for ever.
        rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
        Ok(Self { stream, at_end: AtomicBool::new(false) })
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
            // Ends a wait of the other thread on this client. Fails only when the connection is gone anyway.
            let _ = old.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Ends the connection with `client`, if it is still the one.
    fn dismiss(&self, client: &Arc<Client>) {
        let mut seat = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seat.as_ref().is_some_and(|current| Arc::ptr_eq(current, client)) {
            *seat = None;
        }
        drop(seat);
        let _ = client.stream.shutdown(std::net::Shutdown::Both);
    }
}

struct TcpSource {
    listener: TcpListener,
    seat: Arc<Seat>,
}

impl TcpSource {
    /// Takes in those who knock: the first gets a free seat, the others are sent away.
    fn accept(&self, wake: &Wake) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if self.seat.client().is_none_or(|client| client.leaving())
                        && let Ok(client) = Client::new(stream)
                    {
                        self.seat.put(Some(client));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // The client changed its mind.
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                Err(_) => {
                    let pause = Timespec { tv_sec: ACCEPT_PAUSE.as_secs() as i64, tv_nsec: 0 };
                    let _ = poll(&mut [PollFd::new(wake, PollFlags::IN)], Some(&pause));
                    return;
                }
            }
        }
    }

    fn receive(&self, client: &Arc<Client>, buffer: &mut [u8]) -> Input {
        match (&client.stream).read(buffer) {
            Ok(0) => client.at_end.store(true, Ordering::Release),
            Ok(count) => return Input::Bytes(count),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => self.seat.dismiss(client),
        }
        Input::Nothing
    }
}

impl ByteSource for TcpSource {
    fn read(&mut self, buffer: &mut [u8], want: bool, wake: &Wake) -> Input {
        let client = self.seat.client();
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

impl Drop for TcpSource {
    fn drop(&mut self) {
        self.seat.put(None);
    }
}

struct TcpSink {
    seat: Arc<Seat>,
}

impl ByteSink for TcpSink {
    fn write(&mut self, bytes: &[u8], stop: &Wake) -> io::Result<usize> {
        let Some(client) = self.seat.client() else { return Ok(bytes.len()) };
        if !writable(client.stream.as_fd(), stop) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match (&client.stream).write(bytes) {
            Ok(count) => Ok(count),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => Ok(0),
            Err(_) => {
                self.seat.dismiss(&client);
                Ok(bytes.len())
            }
        }
    }
}
