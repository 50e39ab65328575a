//! What a request becomes on the wire: parts as large as the server takes them, which end together.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::journal::Journal;
use super::wire::{Export, FUA, Header, Kind, NO_HOLE, flag};
use crate::block::buffers::HostBuffers;
use crate::block::request::{Command, Work};

/// Bytes cleared by one part: a round number that fits the protocol's 32 bits.
const CLEAR_STEP: u64 = 1 << 30;

/// How a part ended.
pub(super) enum End {
    Done,
    Failed(io::Error),
    Cancelled,
}

/// One request on the wire.
pub(super) struct Part {
    pub(super) header: Header,
    /// Where data goes to or comes from; a write without buffers writes zeroes.
    pub(super) buffers: Option<Arc<HostBuffers>>,
    /// The data of a write, once it was sent: the guest may change its memory afterwards.
    pub(super) payload: Option<Arc<Vec<u8>>>,
    /// For a flush that was sent: what it covers.
    pub(super) mark: u64,
    /// Whose part it is; the client's own flush belongs to none.
    pub(super) group: Option<Arc<Group>>,
}

/// The parts of one piece of work.
pub(super) struct Group(Mutex<GroupState>);

struct GroupState {
    work: Option<Work>,
    left: usize,
    error: Option<io::Error>,
    cancelled: bool,
    /// The server has no FUA, so that a flush stands in for it.
    flush_after: bool,
}

/// What follows when a part of a group has ended.
pub(super) enum Next {
    /// Other parts are still out.
    Wait,
    /// This part remains to be sent.
    Send(Part),
    /// All is over; to be told outside any lock.
    Over(Work, io::Result<()>),
    /// It was cancelled; to be told outside any lock.
    Cancelled(Work),
}

impl Part {
    /// The client's own flush.
    pub(super) fn own_flush() -> Self {
        Self::flush(None)
    }

    /// A read of `len` bytes that nobody wants, before the first large request of a connection. Servers take memory for
    /// each request, and the C library gives what is large back to the host each time, to be mapped and cleared for
    /// the next, until it has seen something larger be freed: afterwards requests cost qemu-nbd half as much.
    pub(super) fn first_read(len: u32) -> Self {
        let header = Header { kind: Kind::Read, flags: 0, offset: 0, len };
        Self { header, buffers: None, payload: None, mark: 0, group: None }
    }

    fn flush(group: Option<Arc<Group>>) -> Self {
        let header = Header { kind: Kind::Flush, flags: 0, offset: 0, len: 0 };
        Self { header, buffers: None, payload: None, mark: 0, group }
    }

    /// The data to send, which is fixed from now on; its memory comes from the journal.
    pub(super) fn payload(&mut self, journal: &mut Journal) -> Arc<Vec<u8>> {
        if let Some(payload) = &self.payload {
            return payload.clone();
        }
        let bytes = match (self.header.kind, &self.buffers) {
            (Kind::Write, Some(buffers)) => {
                let mut bytes = journal.payload(self.header.len as usize);
                // The buffers were checked to be in RAM, so this does not fail.
                if buffers.copy_to(&mut bytes).is_err() {
                    bytes.fill(0);
                }
                bytes
            }
            (Kind::Write, None) => vec![0; self.header.len as usize],
            _ => Vec::new(),
        };
        self.payload.insert(Arc::new(bytes)).clone()
    }
}

impl Group {
    /// Notes the end of a part.
    pub(super) fn end(self: &Arc<Self>, how: End) -> Next {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match how {
            End::Done => {}
            End::Failed(why) => state.error = Some(why),
            End::Cancelled => state.cancelled = true,
        }
        state.left = state.left.saturating_sub(1);
        if state.left > 0 {
            return Next::Wait;
        }
        if !state.cancelled && state.error.is_none() && std::mem::take(&mut state.flush_after) {
            state.left = 1;
            return Next::Send(Part::flush(Some(self.clone())));
        }
        let (error, cancelled) = (state.error.take(), state.cancelled);
        match state.work.take() {
            None => Next::Wait,
            Some(work) if cancelled => Next::Cancelled(work),
            Some(work) => Next::Over(work, error.map_or(Ok(()), Err)),
        }
    }
}

/// Takes work apart. Work for which the server has no request is done with, and has no parts.
pub(super) fn split(work: Work, export: &Export, durable: bool) -> Vec<Part> {
    let max = u64::from(export.max_payload);
    let fua = |asked: bool| if (asked || durable) && export.has(flag::SEND_FUA) { FUA } else { 0 };
    let (kind, flags, offset, len, step) = match &work.command {
        Command::Read { offset, to } => (Kind::Read, 0, *offset, to.len(), max),
        Command::Write { offset, from, fua: asked } => (Kind::Write, fua(*asked), *offset, from.len(), max),
        Command::Flush if export.has(flag::SEND_FLUSH) => (Kind::Flush, 0, 0, 0, max),
        Command::Discard { offset, len } if export.has(flag::SEND_TRIM) => (Kind::Trim, 0, *offset, *len, CLEAR_STEP),
        Command::WriteZeroes { offset, len, unmap } if export.has(flag::SEND_WRITE_ZEROES) => {
            let hole = if *unmap { 0 } else { NO_HOLE };
            (Kind::WriteZeroes, hole | fua(false), *offset, *len, CLEAR_STEP)
        }
        Command::WriteZeroes { offset, len, .. } => (Kind::Write, fua(false), *offset, *len, max),
        // Without a cache there is nothing to flush; and what is discarded may as well stay.
        Command::Flush | Command::Discard { .. } => {
            work.finish(Ok(()));
            return Vec::new();
        }
    };
    let durable = durable || matches!(&work.command, Command::Write { fua: true, .. });
    let changes = matches!(kind, Kind::Write | Kind::WriteZeroes);
    let flush_after = changes && durable && flags & FUA == 0 && export.has(flag::SEND_FLUSH);
    let pieces = pieces(&work, offset, len, step, Header { kind, flags, offset, len: 0 });
    let pieces = match pieces {
        Ok(pieces) => pieces,
        Err(why) => {
            work.finish(Err(why));
            return Vec::new();
        }
    };
    let state = GroupState { work: Some(work), left: pieces.len(), error: None, cancelled: false, flush_after };
    let group = Arc::new(Group(Mutex::new(state)));
    let part = |(header, buffers)| Part { header, buffers, payload: None, mark: 0, group: Some(group.clone()) };
    pieces.into_iter().map(part).collect()
}

type Piece = (Header, Option<Arc<HostBuffers>>);

fn pieces(work: &Work, offset: u64, len: u64, step: u64, header: Header) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < len || pieces.is_empty() {
        let here = (len - done).min(step);
        let buffers = match &work.command {
            Command::Read { to: buffers, .. } | Command::Write { from: buffers, .. } => {
                Some(Arc::new(buffers.part(done, here).map_err(io::Error::other)?))
            }
            _ => None,
        };
        // At most `step`, which is far below 4 GiB; the sum is inside the disk.
        pieces.push((Header { offset: offset + done, len: here as u32, ..header }, buffers));
        done += here;
    }
    Ok(pieces)
}
