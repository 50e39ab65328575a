//! One connection between a program of the guest and one of the host.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, shut};

/// Bytes from the guest that wait for the host's program, at most: what the guest is told to be our room.
pub(super) const ROOM: u32 = 256 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// The host's program asked for it, the guest has not answered.
    Asked,
    Open,
}

/// A connection; its key says by which ports.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) stage: Stage,
    /// From the guest, not yet taken by the host's program.
    waiting: VecDeque<u8>,
    /// Bytes passed on to the host's program.
    passed_on: u32,
    /// What of that the guest has been told.
    told: u32,
    /// The guest's room, and what it has passed on.
    peer_room: u32,
    peer_passed_on: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// What the guest will not do any more (flags of its shutdown).
    pub(super) peer_shut: u32,
    /// What the host's program will not do any more.
    pub(super) host_shut: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            waiting: VecDeque::new(),
            passed_on: 0,
            told: 0,
            peer_room: 0,
            peer_passed_on: 0,
            sent: 0,
            peer_shut: 0,
            host_shut: 0,
        }
    }

    /// Notes what every packet of the guest says of its room.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.peer_room = header.room;
        self.peer_passed_on = header.passed_on;
    }

    /// Puts our room into a packet to the guest.
    pub(super) fn put_credit(&mut self, header: &mut Header) {
        header.room = ROOM;
        header.passed_on = self.passed_on;
        self.told = self.passed_on;
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.peer_room.saturating_sub(self.sent.wrapping_sub(self.peer_passed_on))
    }

    /// Whether the guest should be told of our room: it may believe that half of it is gone.
    pub(super) fn should_tell(&self) -> bool {
        self.passed_on.wrapping_sub(self.told) > ROOM / 2
    }

    /// Takes bytes from the guest; an error if it sends more than there is room, or the host's program is gone.
    pub(super) fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.waiting.len() + bytes.len() > ROOM as usize || self.peer_shut & shut::SEND != 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.waiting.extend(bytes);
        self.pass_on()
    }

    /// Gives the host's program what it takes without waiting.
    pub(super) fn pass_on(&mut self) -> io::Result<()> {
        while !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            match self.stream.write(first) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.passed_on = self.passed_on.wrapping_add(count as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.peer_shut & shut::SEND != 0 {
            // Fails only when the other side is gone anyway.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Whether bytes wait for the host's program.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the host's program should be listened to.
    pub(super) fn wants_input(&self) -> bool {
        self.stage == Stage::Open
            && self.credit() > 0
            && self.host_shut & shut::SEND == 0
            && self.peer_shut & shut::RECEIVE == 0
    }

    /// Reads what the guest has room for, `limit` bytes at most; none at the end.
    pub(super) fn read(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; limit.min(self.credit() as usize)];
        let count = self.stream.read(&mut bytes)?;
        bytes.truncate(count);
        self.sent = self.sent.wrapping_add(count as u32);
        Ok(bytes)
    }
}
