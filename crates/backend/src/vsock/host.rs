//! The bridge's thread: waits for the sockets.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags};
use rustix::net::SocketFlags;

use super::connection::{Connection, Stage};
use super::packet::{op, shut};
use super::{Key, MAX_CONNECTIONS, MAX_PAYLOAD, MAX_WAITING, Shared, State};
use crate::tty::{UnixSocket, wait};

/// Longest line by which a program says where it wants to be connected.
const MAX_LINE: usize = 32;

/// A program that has connected and not yet said where to.
struct Newcomer {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a socket that is waited for belongs to.
enum Owner {
    Newcomer(usize),
    Connection(Key),
}

pub(super) fn run(shared: &Shared, socket: UnixSocket) {
    let mut newcomers: Vec<Newcomer> = Vec::new();
    while !shared.stop.load(Ordering::Acquire) {
        // Whatever sets the flag from here on is either seen below or ends the wait.
        shared.wake.clear();
        let (ready, knock) = wait_for(shared, &socket, &newcomers);
        let mut gone = Vec::new();
        for (owner, events) in ready {
            match owner {
                Owner::Newcomer(index) => {
                    if let Some(newcomer) = newcomers.get_mut(index)
                        && listen(shared, newcomer)
                    {
                        gone.push(index);
                    }
                }
                Owner::Connection(key) => serve(shared, key, events),
            }
        }
        gone.into_iter().rev().for_each(|index| drop(newcomers.remove(index)));
        if knock {
            accept(&socket, &mut newcomers);
        }
        if !shared.state().outbox.is_empty() {
            (shared.ready)();
        }
    }
}

/// Waits until something happens; what, and whether somebody knocks.
fn wait_for(shared: &Shared, socket: &UnixSocket, newcomers: &[Newcomer]) -> (Vec<(Owner, PollFlags)>, bool) {
    let mut owners = Vec::new();
    let mut streams: Vec<(UnixStream, PollFlags)> = Vec::new();
    {
        let state = shared.state();
        let may_read = state.waiting < MAX_WAITING;
        for (key, connection) in &state.connections {
            let events = interest(connection, may_read);
            // The socket may be closed by another thread while this one waits: a duplicate stays.
            if let Ok(stream) = connection.stream.try_clone()
                && (!events.is_empty() || connection.host_shut != shut::BOTH)
            {
                owners.push(Owner::Connection(*key));
                streams.push((stream, events));
            }
        }
    }
    let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN), PollFd::new(&socket.0, PollFlags::IN)];
    fds.extend(streams.iter().map(|(stream, events)| PollFd::new(stream, *events)));
    for (index, newcomer) in newcomers.iter().enumerate() {
        owners.push(Owner::Newcomer(index));
        let stream: BorrowedFd<'_> = newcomer.stream.as_fd();
        fds.push(PollFd::from_borrowed_fd(stream, PollFlags::IN));
    }
    wait(&mut fds);
    let mut results = fds.iter().skip(1).map(PollFd::revents);
    let knock = results.next().is_some_and(|events| !events.is_empty());
    let ready = owners.into_iter().zip(results).filter(|(_, events)| !events.is_empty()).collect();
    (ready, knock)
}

fn interest(connection: &Connection, may_read: bool) -> PollFlags {
    let mut events = PollFlags::empty();
    if may_read && connection.wants_input() {
        events |= PollFlags::IN;
    }
    if connection.is_waiting() {
        events |= PollFlags::OUT;
    }
    events
}

fn accept(socket: &UnixSocket, newcomers: &mut Vec<Newcomer>) {
    // Errors are those of clients that changed their minds, or of a host without descriptors: the next knock tells.
    while let Ok(fd) = rustix::net::accept_with(&socket.0, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        if newcomers.len() < MAX_CONNECTIONS {
            newcomers.push(Newcomer { stream: fd.into(), line: Vec::new() });
        }
    }
}

/// Reads the line of a newcomer; whether that is over, one way or the other.
fn listen(shared: &Shared, newcomer: &mut Newcomer) -> bool {
    loop {
        let mut byte = [0];
        match newcomer.stream.read(&mut byte) {
            Ok(1) if byte[0] == b'\n' => break,
            Ok(1) if newcomer.line.len() < MAX_LINE => newcomer.line.push(byte[0]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            _ => return true,
        }
    }
    let line = String::from_utf8_lossy(&newcomer.line);
    let port = line.trim_end_matches('\r').strip_prefix("CONNECT ").and_then(|port| port.parse().ok());
    if let (Some(port), Ok(stream)) = (port, newcomer.stream.try_clone()) {
        ask(shared, port, stream);
    }
    true
}

/// Asks the guest for a connection to a port.
fn ask(shared: &Shared, port: u32, stream: UnixStream) {
    let mut state = shared.state();
    if state.connections.len() >= MAX_CONNECTIONS {
        return;
    }
    let mut local = state.next_port;
    while state.connections.contains_key(&(local, port)) {
        local = local.wrapping_add(1).max(super::FIRST_PORT);
    }
    state.next_port = local.wrapping_add(1).max(super::FIRST_PORT);
    state.connections.insert((local, port), Connection::new(stream, Stage::Asked));
    state.push(shared.header((local, port), op::REQUEST), Vec::new());
}

/// Something happened to a connection's socket.
fn serve(shared: &Shared, key: Key, events: PollFlags) {
    let mut state = shared.state();
    let state: &mut State = &mut state;
    let Some(connection) = state.connections.get_mut(&key) else { return };
    let mut alive = true;
    if events.contains(PollFlags::OUT) {
        alive = connection.pass_on().is_ok() && (connection.peer_shut != shut::BOTH || connection.is_waiting());
    }
    let tell = connection.should_tell();
    let mut shut_now = 0;
    let mut data = Vec::new();
    if events.contains(PollFlags::IN) && connection.wants_input() && state.waiting < MAX_WAITING {
        match connection.read(MAX_PAYLOAD) {
            Ok(bytes) if bytes.is_empty() => shut_now = shut::SEND,
            Ok(bytes) => data = bytes,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => alive = false,
        }
    }
    // Hung up: what it sent before has been read when reading gives nothing more.
    let hung_up = events.intersects(PollFlags::HUP | PollFlags::ERR);
    if hung_up && data.is_empty() && (shut_now != 0 || !events.contains(PollFlags::IN)) {
        if connection.stage == Stage::Asked {
            alive = false;
        }
        shut_now = shut::BOTH;
    }
    shut_now &= !connection.host_shut;
    connection.host_shut |= shut_now;
    let all_shut = connection.host_shut;
    if !data.is_empty() {
        state.push(shared.header(key, op::RW), data);
    }
    if !alive {
        state.connections.remove(&key);
        state.push(shared.header(key, op::RST), Vec::new());
    } else if shut_now != 0 {
        let header = super::Header { flags: all_shut, ..shared.header(key, op::SHUTDOWN) };
        state.push(header, Vec::new());
    } else if tell {
        state.push(shared.header(key, op::CREDIT_UPDATE), Vec::new());
    }
}
