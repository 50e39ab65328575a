//! A TCP connection between the guest and a socket of the host (RFC 9293).
//!
//! The guest's side is ended here, with a TCP of our own. The cable loses nothing and keeps the order, so what other
//! implementations need for bad networks can be left out: what comes out of order is not kept, what is lost is sent
//! again from the first missing byte, and there is no congestion control. The host's side is the kernel's.
//!
//! From the guest, data goes straight from guest memory into the host's socket. What the socket does not take waits in
//! `pending`, and the window offered to the guest is what room is left there. To the guest, `out` keeps what is not
//! acknowledged; packets are as large as the guest's driver takes.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::link::{Link, TcpOut};
use super::ring::Ring;
use crate::net::sys::Way;
use crate::net::wire::{Segment, flag};
use crate::net::{Delivery, Frame};

/// Bytes kept in each direction.
const BUFFER: usize = 1 << 20;
/// Our window scale: 64 KiB << 5 is more than [`BUFFER`].
const SCALE: u8 = 5;
/// What a peer is sent that says nothing of its largest segment (RFC 9293, 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// Smallest segments that are believed: others would only cost.
const MIN_MSS: u16 = 88;
/// Time until something is sent again; doubled each time.
const RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);
const MAX_TRIES: u32 = 10;
/// Rounds of reading and sending for one connection, before others have their turn.
const ROUNDS: usize = 8;

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The host's socket is connecting; the guest waits for an answer to its SYN.
    Connecting,
    /// The guest was answered with SYN and ACK.
    SynReceived,
    /// The connection came from the host, and the guest was sent a SYN.
    SynSent,
    /// Data can flow.
    Open,
}

/// What is to be done with a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// It goes on.
    Goes,
    /// It goes on, and would send more if the NIC had room.
    Waits,
    /// It goes on, and has more to do when others have had their turn.
    More,
    /// It has ended.
    Ended,
}

/// A connection.
pub(super) struct Connection {
    pub(super) guest: SocketAddr,
    /// The other end, as the guest sees it.
    pub(super) remote: SocketAddr,
    /// The guest's queue that its packets came from last.
    pub(super) queue: u16,
    /// Somebody is going to call [`work`](Self::work).
    pub(super) scheduled: bool,
    /// When to send again.
    pub(super) deadline: Option<Instant>,
    socket: TcpStream,
    phase: Phase,
    /// The socket may have something to read, or room for writing.
    readable: bool,
    writable: bool,

    /// To the guest: what is not acknowledged.
    out: Ring,
    /// Sequence number of the first byte in `out` (or of SYN or FIN), of the next to send, and one past the last sent.
    unacknowledged: u32,
    next: u32,
    sent: u32,
    window: u32,
    scale: Option<u8>,
    mss: u16,
    repeated: u32,
    tries: u32,
    /// A window of zero is to be tested with a byte.
    probe: bool,
    /// The host will send no more.
    host_closed: bool,
    fin_acknowledged: bool,

    /// From the guest: what the socket has not taken.
    pending: Ring,
    expected: u32,
    /// One past the last byte the guest may send, as it was last told.
    told: u32,
    must_acknowledge: bool,
    guest_closed: bool,
    shut_down: bool,
    /// The host's connection failed: the guest is to be told by RST.
    failed: bool,
}

/// Whether `a` comes before `b` in the circle of sequence numbers.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Connection {
    fn new(guest: SocketAddr, remote: SocketAddr, socket: TcpStream, start: u32, phase: Phase) -> Self {
        // Fails only on a socket that has failed already. The guest decides for itself when to send.
        let _ = socket.set_nodelay(true);
        Self {
            guest,
            remote,
            queue: 0,
            scheduled: false,
            deadline: None,
            socket,
            phase,
            readable: true,
            writable: true,
            out: Ring::default(),
            unacknowledged: start,
            next: start,
            sent: start,
            window: 0,
            scale: None,
            mss: DEFAULT_MSS,
            repeated: 0,
            tries: 0,
            probe: false,
            host_closed: false,
            fin_acknowledged: false,
            pending: Ring::default(),
            expected: 0,
            told: 0,
            must_acknowledge: false,
            guest_closed: false,
            shut_down: false,
            failed: false,
        }
    }

    /// A connection that the guest asks for by `segment`, a SYN; `socket` is connecting.
    pub(super) fn from_guest(
        (guest, remote): (SocketAddr, SocketAddr),
        socket: TcpStream,
        start: u32,
        segment: &Segment,
    ) -> Self {
        let mut connection = Self::new(guest, remote, socket, start, Phase::Connecting);
        connection.take_options(segment);
        connection
    }

    /// A connection that the host accepted for the guest.
    pub(super) fn from_host((guest, remote): (SocketAddr, SocketAddr), socket: TcpStream, start: u32) -> Self {
        Self::new(guest, remote, socket, start, Phase::SynSent)
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    fn take_options(&mut self, segment: &Segment) {
        self.expected = segment.sequence.wrapping_add(1);
        self.told = self.expected;
        self.mss = segment.mss.unwrap_or(DEFAULT_MSS).max(MIN_MSS);
        self.scale = segment.scale;
        self.window = u32::from(segment.window);
    }

    /// Room for data of the guest.
    fn room(&self) -> usize {
        BUFFER.saturating_sub(self.pending.len())
    }

    /// A segment of the guest; its data is `len` bytes of the frame from `at` on.
    pub(super) fn input(&mut self, segment: &Segment, frame: &Frame<'_>, at: usize, len: usize) -> Outcome {
        if segment.flags & flag::RST != 0 {
            return self.reset_by_guest(segment);
        }
        match self.phase {
            Phase::Connecting => return Outcome::Goes,
            Phase::SynSent => {
                let answer = segment.flags & (flag::SYN | flag::ACK) == flag::SYN | flag::ACK;
                if answer && segment.acknowledgement == self.sent {
                    self.take_options(segment);
                    self.open(segment.acknowledgement);
                    self.must_acknowledge = true;
                }
                return Outcome::Goes;
            }
            Phase::SynReceived => {
                if segment.flags & flag::SYN != 0 {
                    // It did not get the answer.
                    self.next = self.unacknowledged;
                    return Outcome::Goes;
                }
                if segment.flags & flag::ACK == 0 || segment.acknowledgement != self.sent {
                    return Outcome::Goes;
                }
                self.open(segment.acknowledgement);
            }
            Phase::Open => {}
        }
        if segment.flags & flag::SYN != 0 {
            // Of another life of the guest; its answer to the acknowledgement will end this connection.
            self.must_acknowledge = true;
            return Outcome::Goes;
        }
        if segment.flags & flag::ACK != 0 {
            self.acknowledged(segment, len);
            self.data(segment, frame, at, len);
        }
        Outcome::Goes
    }

    fn reset_by_guest(&mut self, segment: &Segment) -> Outcome {
        let valid = match self.phase {
            Phase::Connecting => true,
            Phase::SynSent => segment.flags & flag::ACK != 0 && segment.acknowledgement == self.sent,
            Phase::SynReceived | Phase::Open => segment.sequence == self.expected,
        };
        if !valid {
            self.must_acknowledge |= matches!(self.phase, Phase::SynReceived | Phase::Open);
            return Outcome::Goes;
        }
        // The host's peer is to see a reset as well. Fails only if it is gone already.
        let _ = rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
        Outcome::Ended
    }

    fn open(&mut self, acknowledgement: u32) {
        self.phase = Phase::Open;
        self.unacknowledged = acknowledgement;
        self.next = acknowledgement;
        self.deadline = None;
        self.tries = 0;
    }

    fn acknowledged(&mut self, segment: &Segment, len: usize) {
        let acknowledgement = segment.acknowledgement;
        let count = acknowledgement.wrapping_sub(self.unacknowledged);
        if count > self.sent.wrapping_sub(self.unacknowledged) {
            // Old, or of something that was never sent.
            self.must_acknowledge |= before(self.sent, acknowledgement);
            return;
        }
        let window = u32::from(segment.window) << self.scale.unwrap_or(0);
        if count > 0 {
            self.fin_acknowledged |= count as usize > self.out.len();
            self.out.consume(count as usize);
            self.unacknowledged = acknowledgement;
            if before(self.next, acknowledgement) {
                self.next = acknowledgement;
            }
            (self.repeated, self.tries, self.deadline) = (0, 0, None);
        } else if len == 0 && window == self.window && self.next != self.unacknowledged {
            self.repeated += 1;
            if self.repeated == 3 {
                self.next = self.unacknowledged;
            }
        }
        if window == 0 {
            // It lives, and wants nothing now: for as long as it likes.
            self.tries = 0;
        }
        self.window = window;
    }

    fn data(&mut self, segment: &Segment, frame: &Frame<'_>, at: usize, len: usize) {
        let fin = segment.flags & flag::FIN != 0;
        if len == 0 && !fin {
            // Before what is expected: a test whether we are alive (RFC 9293, 3.8.4).
            self.must_acknowledge |= before(segment.sequence, self.expected);
            return;
        }
        self.must_acknowledge = true;
        let known = self.expected.wrapping_sub(segment.sequence) as usize;
        if before(self.expected, segment.sequence) || known > len || self.guest_closed {
            return;
        }
        let new = (len - known).min(self.room());
        if self.take(frame, at + known, new).is_err() {
            self.failed = true;
            return;
        }
        self.expected = self.expected.wrapping_add(new as u32);
        if fin && known + new == len {
            self.expected = self.expected.wrapping_add(1);
            self.guest_closed = true;
        }
    }

    /// Gives data of the guest to the host; what the host does not take now is kept.
    fn take(&mut self, frame: &Frame<'_>, at: usize, len: usize) -> io::Result<()> {
        let mut done = 0;
        while len > done && self.pending.is_empty() && self.writable {
            match frame.send(self.socket.as_fd(), Way::Socket, &[], (at + done, len - done)) {
                Ok(count) => done += count,
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(why) => return Err(why),
            }
        }
        if done < len {
            let mut rest = vec![0; len - done];
            let count = frame.read(at + done, &mut rest);
            self.pending.extend(&rest[..count]);
        }
        Ok(())
    }

    /// The host's socket has news.
    pub(super) fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
        if self.phase == Phase::Connecting && writable {
            match self.socket.take_error() {
                Ok(None) => self.phase = Phase::SynReceived,
                _ => self.failed = true,
            }
        }
    }

    /// It is time to send again.
    pub(super) fn retry(&mut self) {
        self.deadline = None;
        self.tries += 1;
        self.next = self.unacknowledged;
        self.probe = self.phase == Phase::Open && self.window == 0;
        self.failed |= self.tries > MAX_TRIES;
    }

    /// Does all that can be done now: moves data in both directions, acknowledges.
    pub(super) fn work(&mut self, now: Instant, link: &Link) -> Outcome {
        for _ in 0..ROUNDS {
            if self.phase == Phase::Open && !self.failed {
                self.failed = self.empty_pending().and_then(|()| self.fill_out()).is_err();
            }
            if self.failed {
                return self.reset_guest(link);
            }
            match self.send(now, link) {
                Delivery::NoRoom => return Outcome::Waits,
                Delivery::Done if self.has_ended() => return Outcome::Ended,
                Delivery::Done if !self.could_read() => return Outcome::Goes,
                Delivery::Done => {}
            }
        }
        Outcome::More
    }

    fn has_ended(&self) -> bool {
        self.shut_down && self.fin_acknowledged && !self.must_acknowledge
    }

    fn could_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_closed && self.out.len() < BUFFER
    }

    /// Writes to the host what the guest sent before; closes that direction when the guest has.
    fn empty_pending(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() && self.writable {
            match io::Write::write_vectored(&mut &self.socket, &self.pending.io_slices()) {
                Ok(count) => self.pending.consume(count),
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(why),
            }
        }
        if self.guest_closed && self.pending.is_empty() && !self.shut_down {
            self.shut_down = true;
            // The peer may be gone; reading tells.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        // The guest hears of a window that has grown by much.
        let grown = self.expected.wrapping_add(self.room() as u32).wrapping_sub(self.told);
        self.must_acknowledge |= grown as usize >= BUFFER / 2 && !self.guest_closed;
        Ok(())
    }

    fn fill_out(&mut self) -> io::Result<()> {
        while self.could_read() {
            let mut asked = 0;
            let socket = &self.socket;
            let read = self.out.fill(BUFFER, |pieces| {
                asked = pieces.iter().map(|piece| piece.len()).sum();
                io::Read::read_vectored(&mut &*socket, pieces)
            });
            match read {
                Ok(0) => self.host_closed = true,
                // A short read: there is no more now, or the end, which will be told.
                Ok(count) if count < asked => break,
                Ok(_) => {}
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(why),
            }
        }
        Ok(())
    }

    fn reset_guest(&mut self, link: &Link) -> Outcome {
        // A guest whose SYN was not answered is told that nobody is there.
        let out = TcpOut { flags: flag::RST | flag::ACK, ..self.header(self.next) };
        match link.tcp(&out, [&[], &[]]) {
            Delivery::Done => Outcome::Ended,
            Delivery::NoRoom => Outcome::Waits,
        }
    }

    fn header(&self, sequence: u32) -> TcpOut {
        // Windows are not scaled in a SYN, nor for a peer that cannot scale.
        let room = self.room();
        let scaled = self.phase == Phase::Open && self.scale.is_some();
        let window = if scaled { room >> SCALE } else { room };
        TcpOut {
            source: self.remote,
            destination: self.guest,
            queue: self.queue,
            sequence,
            acknowledgement: self.expected,
            flags: flag::ACK,
            window: window.min(usize::from(u16::MAX)) as u16,
            mss: self.mss,
            options: None,
        }
    }

    /// Sends what the guest's window allows, at least an acknowledgement if one is due.
    fn send(&mut self, now: Instant, link: &Link) -> Delivery {
        match self.phase {
            Phase::Connecting => return Delivery::Done,
            Phase::SynReceived | Phase::SynSent => return self.send_syn(now, link),
            Phase::Open => {}
        }
        loop {
            let done = self.next.wrapping_sub(self.unacknowledged) as usize;
            let unsent = self.out.len().saturating_sub(done);
            let window = if self.probe { 1 } else { self.window as usize };
            let len = unsent.min(window.saturating_sub(done)).min(link.largest(self.guest, self.mss));
            let last = len == unsent;
            let fin = self.host_closed && last && done <= self.out.len() && !self.fin_acknowledged;
            if len == 0 && !fin {
                break;
            }
            let mut out = self.header(self.next);
            out.flags |= if last { flag::PSH } else { 0 } | if fin { flag::FIN } else { 0 };
            if link.tcp(&out, self.out.slices(done, len)) == Delivery::NoRoom {
                return Delivery::NoRoom;
            }
            self.acknowledgement_sent(&out);
            self.probe = false;
            self.next = self.next.wrapping_add(len as u32 + u32::from(fin));
            if before(self.sent, self.next) {
                self.sent = self.next;
            }
        }
        if self.must_acknowledge {
            let out = self.header(self.next);
            if link.tcp(&out, [&[], &[]]) == Delivery::NoRoom {
                return Delivery::NoRoom;
            }
            self.acknowledgement_sent(&out);
        }
        let waits = self.next != self.unacknowledged || (self.window == 0 && !self.out.is_empty());
        self.set_deadline(now, waits);
        Delivery::Done
    }

    fn send_syn(&mut self, now: Instant, link: &Link) -> Delivery {
        if self.next == self.unacknowledged {
            let mut out = self.header(self.next);
            // A SYN of ours offers to scale; an answer scales only if the guest does.
            let answer = self.phase == Phase::SynReceived;
            out.options = Some((!answer || self.scale.is_some()).then_some(SCALE));
            out.flags = flag::SYN | if answer { flag::ACK } else { 0 };
            if link.tcp(&out, [&[], &[]]) == Delivery::NoRoom {
                return Delivery::NoRoom;
            }
            self.told = self.expected.wrapping_add(u32::from(out.window));
            self.next = self.next.wrapping_add(1);
            self.sent = self.next;
        }
        self.set_deadline(now, true);
        Delivery::Done
    }

    fn acknowledgement_sent(&mut self, out: &TcpOut) {
        self.must_acknowledge = false;
        self.told = out.acknowledgement.wrapping_add(self.room() as u32);
    }

    fn set_deadline(&mut self, now: Instant, waits: bool) {
        if !waits {
            self.deadline = None;
        } else if self.deadline.is_none() {
            self.deadline = Some(now + (RETRY * (1 << self.tries.min(6))).min(MAX_RETRY));
        }
    }
}
