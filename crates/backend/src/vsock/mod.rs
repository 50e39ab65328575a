//! The host's side of virtio sockets: UNIX sockets, in the manner of Firecracker and Cloud Hypervisor.
//!
//! * A program of the host connects to the socket `PATH`, sends `CONNECT port\n`, and is connected to that port of the
//!   guest; the answer is `OK number\n`, or the end of the connection if nobody listens there.
//! * A program of the guest that connects to port N of the host (address 2) is connected to whoever listens at the socket
//!   `PATH_N`.
//!
//! | module | what it does |
//! |---|---|
//! | [`Bridge`] | all connections: packets on one side, sockets on the other |
//! | `host` | its thread, which waits for the sockets |
//! | `connection` | one connection: bytes on the way, and how much room either side has |
//! | `packet` | headers |

mod connection;
mod host;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::tty::{UnixSocket, Wake};
use connection::{Connection, ROOM, Stage};
pub use packet::{HEADER_LEN, HOST_CID, Header};
use packet::{STREAM, op, shut};

/// Connections, at most.
const MAX_CONNECTIONS: usize = 1024;
/// Packets that wait for the guest, at most. More than these come only from a guest that takes none.
const MAX_PACKETS: usize = 4096;
/// Bytes that wait for the guest, at most.
const MAX_WAITING: usize = 1 << 20;
/// Bytes of one packet from the guest, at most, as in Linux.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// The first port that the host's programs get on their side.
const FIRST_PORT: u32 = 1 << 30;

/// Which connection: (port of the host, port of the guest).
type Key = (u32, u32);

#[derive(Default)]
struct State {
    connections: HashMap<Key, Connection>,
    /// For the guest.
    outbox: VecDeque<(Header, Vec<u8>)>,
    /// Bytes in it.
    waiting: usize,
    next_port: u32,
}

struct Shared {
    cid: u64,
    path: PathBuf,
    state: Mutex<State>,
    /// Wakes the thread.
    wake: Wake,
    stop: AtomicBool,
    /// Told when there are packets for the guest.
    ready: Box<dyn Fn() + Send + Sync>,
}

/// The sockets of one guest.
pub struct Bridge {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Bridge {
    /// Listens at `path` for a guest with address `cid`; `ready` is called, on any thread, when there are packets for it.
    ///
    /// # Errors
    /// The socket cannot be made (somebody listens there), or there is no thread.
    pub fn open(cid: u64, path: &Path, name: &str, ready: impl Fn() + Send + Sync + 'static) -> io::Result<Self> {
        let socket = UnixSocket::bind(path)?;
        rustix::io::ioctl_fionbio(&socket.0, true)?;
        let shared = Arc::new(Shared {
            cid,
            path: path.to_owned(),
            state: Mutex::new(State { next_port: FIRST_PORT, ..State::default() }),
            wake: Wake::new()?,
            stop: AtomicBool::new(false),
            ready: Box::new(ready),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || host::run(&theirs, socket))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A packet from the guest. Does not wait.
    pub fn receive(&self, header: &Header, payload: &[u8]) {
        self.shared.receive(header, payload);
        self.shared.wake.set();
        if self.has_packets() {
            (self.shared.ready)();
        }
    }

    /// Whether there are packets for the guest.
    pub fn has_packets(&self) -> bool {
        !self.shared.state().outbox.is_empty()
    }

    /// The next packet for the guest, with as much content as fits into `room` bytes behind the header.
    pub fn next(&self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut state = self.shared.state();
        let (mut header, mut payload) = state.outbox.pop_front()?;
        if payload.len() > room {
            let rest = payload.split_off(room);
            state.outbox.push_front((header, rest));
        }
        header.len = payload.len() as u32;
        state.waiting = state.waiting.saturating_sub(payload.len());
        if let Some(connection) = state.connections.get_mut(&(header.source_port, header.target_port)) {
            connection.put_credit(&mut header);
        }
        if header.op == op::RW && payload.is_empty() && room == 0 {
            // No room for anything: not a buffer for packets.
            return Some((Header { op: op::CREDIT_UPDATE, ..header }, payload));
        }
        drop(state);
        self.shared.wake.set();
        Some((header, payload))
    }

    /// Ends all connections, as a reboot of the guest does.
    pub fn reset(&self) {
        let old = {
            let mut state = self.shared.state();
            let next_port = state.next_port;
            std::mem::replace(&mut *state, State { next_port, ..State::default() })
        };
        drop(old);
        self.shared.wake.set();
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.set();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl State {
    fn push(&mut self, header: Header, payload: Vec<u8>) {
        if self.outbox.len() < MAX_PACKETS {
            self.waiting += payload.len();
            self.outbox.push_back((header, payload));
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A packet to the guest.
    fn header(&self, (host, guest): Key, op: u16) -> Header {
        Header {
            source_cid: HOST_CID,
            target_cid: self.cid,
            source_port: host,
            target_port: guest,
            kind: STREAM,
            op,
            room: ROOM,
            ..Header::default()
        }
    }

    fn receive(&self, header: &Header, payload: &[u8]) {
        let key = (header.target_port, header.source_port);
        let mut state = self.state();
        let valid = header.source_cid == self.cid && header.target_cid == HOST_CID && header.kind == STREAM;
        if !valid || payload.len() != header.len as usize {
            if header.op != op::RST {
                let answer = Header { kind: header.kind, source_cid: header.target_cid, ..self.header(key, op::RST) };
                state.push(answer, Vec::new());
            }
            return;
        }
        if header.op == op::REQUEST {
            return self.connect(&mut state, key, header);
        }
        let Some(connection) = state.connections.get_mut(&key) else {
            if header.op != op::RST {
                state.push(self.header(key, op::RST), Vec::new());
            }
            return;
        };
        connection.note_credit(header);
        let good = match header.op {
            op::RESPONSE if connection.stage == Stage::Asked => {
                connection.stage = Stage::Open;
                greet(connection, key.0)
            }
            op::RW if connection.stage == Stage::Open => connection.take(payload).is_ok(),
            op::SHUTDOWN => {
                connection.peer_shut |= header.flags & shut::BOTH;
                // Both ways, and nothing left to pass on: that is the end.
                connection.pass_on().is_ok() && (connection.peer_shut != shut::BOTH || connection.is_waiting())
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                state.push(self.header(key, op::CREDIT_UPDATE), Vec::new());
                return;
            }
            op::RST => {
                state.connections.remove(&key);
                return;
            }
            _ => false,
        };
        if !good {
            state.connections.remove(&key);
            state.push(self.header(key, op::RST), Vec::new());
        } else if connection.should_tell() {
            state.push(self.header(key, op::CREDIT_UPDATE), Vec::new());
        }
    }

    /// A program of the guest wants to be connected to the socket of a port.
    fn connect(&self, state: &mut State, key: Key, header: &Header) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.0));
        let stream = if state.connections.contains_key(&key) || state.connections.len() >= MAX_CONNECTIONS {
            None
        } else {
            UnixStream::connect(path).and_then(|stream| stream.set_nonblocking(true).map(|()| stream)).ok()
        };
        match stream {
            Some(stream) => {
                let mut connection = Connection::new(stream, Stage::Open);
                connection.note_credit(header);
                state.connections.insert(key, connection);
                state.push(self.header(key, op::RESPONSE), Vec::new());
            }
            None => {
                state.connections.remove(&key);
                state.push(self.header(key, op::RST), Vec::new());
            }
        }
    }
}

/// Tells the host's program that it is connected.
fn greet(connection: &mut Connection, port: u32) -> bool {
    use std::io::Write as _;
    let line = format!("OK {port}\n");
    // A new connection takes a dozen bytes at once.
    (&connection.stream).write(line.as_bytes()).is_ok_and(|count| count == line.len())
}
