//! The client: an engine whose thread sends requests, while another receives replies and reconnects.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::journal::Journal;
use super::parts::{End, Next, Part, split};
use super::uri::NbdUri;
use super::wire::{self, Export, FUA, Header, Kind, Outgoing, Stream, flag};
use crate::block::BlockError;
use crate::block::disk::Shared;
use crate::block::image::Geometry;
use crate::block::options::{BlockOptions, SectorSize};
use crate::block::request::{Batch, Call, Engine, Work};

/// Requests under way at a time, and bytes of their data.
const MAX_SENT: usize = 128;
const MAX_BYTES: usize = 16 << 20;
/// Requests sent with one system call, and the bytes of data after which no more are added.
const MAX_TOGETHER: usize = 32;
const MAX_TOGETHER_BYTES: usize = 256 << 10;
/// Bytes from which on a request is large for the server: its C library gives such memory back to the host.
const LARGE: usize = 128 << 10;
/// Bytes of replies that are received with one system call.
const REPLIES: usize = 64 << 10;

/// Pause before the first attempt to reconnect, and the longest between later ones.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long a reset or the end of the VM waits for replies before it gives the connection up.
const LAST_REPLIES: Duration = Duration::from_secs(2);

/// The engine.
pub(in crate::block) struct NbdClient {
    client: Arc<Client>,
    threads: Vec<JoinHandle<()>>,
}

struct Client {
    uri: NbdUri,
    export: Export,
    disk: Arc<Shared>,
    /// Every write is to be on stable storage before it is reported done.
    sync: bool,
    reconnect: Duration,
    state: Mutex<State>,
    /// The sending thread waits for this one.
    to_send: Condvar,
    /// Everybody else for this one.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    calls: VecDeque<Call>,
    /// A call is running.
    calling: bool,
    /// The sending thread waits.
    sender_waits: bool,
    /// How many others do.
    watchers: usize,
    /// Parts to be sent, in this order.
    waiting: VecDeque<Part>,
    /// Parts that were sent on this connection, by handle.
    sent: BTreeMap<u64, Part>,
    /// Bytes of data of these.
    sent_bytes: usize,
    next_handle: u64,
    connection: Option<Arc<Stream>>,
    /// A large request was sent on this connection.
    large_sent: bool,
    /// The server has been away for too long: requests fail at once.
    given_up: bool,
    journal: Journal,
    /// The client's own flush is on its way.
    flushing: bool,
    /// The client's own flush failed: the guest's next one has to tell.
    flush_failed: bool,
    stop: bool,
}

impl NbdClient {
    /// Connects, and starts threads called `name-0` and `name-1`.
    ///
    /// # Errors
    /// The server cannot be used, or the sector size not be had.
    pub(in crate::block) fn open(uri: &NbdUri, options: &BlockOptions, name: &str) -> Result<Self, BlockError> {
        let (stream, export) = wire::open(uri).map_err(|source| BlockError::Nbd { uri: uri.text.clone(), source })?;
        let geometry = geometry(&export, options)?;
        if geometry.read_only && !options.read_only {
            log::warn!("{}: the server lets nobody write: the guest gets a read-only disk", uri.text);
        }
        let stream = Arc::new(stream);
        let client = Arc::new(Client {
            uri: uri.clone(),
            export,
            disk: Shared::new(geometry),
            sync: options.sync,
            reconnect: options.reconnect,
            state: Mutex::new(State { connection: Some(stream.clone()), ..State::default() }),
            to_send: Condvar::new(),
            changed: Condvar::new(),
        });
        let mut this = Self { client: client.clone(), threads: Vec::new() };
        let thread = |source| BlockError::Thread { path: options.path.clone(), source };
        let (sender, receiver) = (client.clone(), client);
        this.threads.push(spawn(format!("{name}-0"), move || sender.send_all()).map_err(thread)?);
        this.threads.push(spawn(format!("{name}-1"), move || receiver.receive_all(stream)).map_err(thread)?);
        Ok(this)
    }

    /// What the disk is, as far as it can change.
    pub(in crate::block) fn disk(&self) -> Arc<Shared> {
        self.client.disk.clone()
    }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).spawn(run)
}

fn geometry(export: &Export, options: &BlockOptions) -> Result<Geometry, BlockError> {
    let logical = export.min_block.max(512);
    let preferred = export.preferred_block;
    let physical = if preferred.is_power_of_two() && preferred <= 64 << 10 { preferred.max(logical) } else { logical };
    let sector_size = options.sector_size.unwrap_or(SectorSize { logical, physical });
    if !sector_size.logical.is_multiple_of(logical) {
        return Err(BlockError::DeviceSectorSize { logical: sector_size.logical, device: logical });
    }
    let read_only = options.read_only || export.has(flag::READ_ONLY);
    let discard = options.discard && !read_only && export.has(flag::SEND_TRIM);
    let size = export.size - export.size % u64::from(sector_size.logical);
    Ok(Geometry { size, sector_size, read_only, discard })
}

impl Engine for NbdClient {
    fn submit(&self, work: Work) {
        let parts = split(work, &self.client.export, self.client.sync);
        let mut state = self.client.state();
        state.waiting.extend(parts);
        self.client.tell(state);
    }

    fn defer(&self, call: Call) {
        let mut state = self.client.state();
        state.calls.push_back(call);
        self.client.tell(state);
    }

    fn cancel_queued(&self) {
        self.client.cancel_waiting();
        let mut state = self.client.state();
        // What was sent will soon be over. What the server keeps for itself must not come after the guest's next writes.
        let busy = |state: &mut State| state.connection.is_some() && !state.sent.is_empty();
        state = self.client.wait(state, LAST_REPLIES, busy);
        if let Some(stream) = state.connection.clone().filter(|_| !state.sent.is_empty()) {
            stream.shut();
            let same = |state: &mut State| state.connection.as_ref().is_some_and(|now| Arc::ptr_eq(now, &stream));
            drop(self.client.wait(state, Duration::MAX, same));
        } else {
            drop(state);
        }
        self.client.cancel_waiting();
    }

    fn wait_idle(&self) {
        let busy = |state: &mut State| {
            state.calling || !state.calls.is_empty() || !state.waiting.is_empty() || !state.sent.is_empty()
        };
        drop(self.client.wait(self.client.state(), Duration::MAX, busy));
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        let mut state = self.client.state();
        state.stop = true;
        let forgotten = (std::mem::take(&mut state.calls), std::mem::take(&mut state.waiting));
        // A thread that is trying to reconnect may take its time, and touches nothing any more.
        let connected = state.connection.is_some();
        self.client.tell(state);
        drop(forgotten);
        let threads = self.threads.drain(..).filter(|thread| thread.thread().id() != thread::current().id());
        for thread in threads.take(if connected { 2 } else { 1 }) {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl Client {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes those who wait for a change of the state.
    fn tell(&self, mut state: MutexGuard<'_, State>) {
        let (sender, others) = (std::mem::take(&mut state.sender_waits), state.watchers > 0);
        drop(state);
        if sender {
            self.to_send.notify_one();
        }
        if others {
            self.changed.notify_all();
        }
    }

    /// Waits while `condition` holds, for `time` at most.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        time: Duration,
        condition: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        state.watchers += 1;
        let mut state = if time == Duration::MAX {
            self.changed.wait_while(state, condition).unwrap_or_else(PoisonError::into_inner)
        } else {
            self.changed.wait_timeout_while(state, time, condition).unwrap_or_else(PoisonError::into_inner).0
        };
        state.watchers -= 1;
        state
    }

    /// The life of the sending thread.
    fn send_all(&self) {
        let mut state = self.state();
        while !state.stop {
            if state.given_up && !state.waiting.is_empty() {
                let parts = std::mem::take(&mut state.waiting);
                drop(state);
                self.end_all(parts, &|| End::Failed(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
            } else if let Some((stream, requests)) = self.next_few(&mut state) {
                drop(state);
                if wire::send_all(&stream, &requests).is_err() {
                    // The other thread sees it too, and reconnects.
                    stream.shut();
                }
            } else if let Some(call) = state.calls.pop_front() {
                state.calling = true;
                drop(state);
                call();
                let mut state = self.state();
                state.calling = false;
                self.tell(state);
            } else {
                state.sender_waits = true;
                state = self.to_send.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.sender_waits = false;
                drop(state);
            }
            state = self.state();
        }
        let state = self.wait(state, LAST_REPLIES, |state| state.connection.is_some() && !state.sent.is_empty());
        if let Some(stream) = state.connection.clone() {
            drop(state);
            let header = Header { kind: Kind::Disconnect, flags: 0, offset: 0, len: 0 };
            // A matter of courtesy.
            let _ = wire::send(&stream, 0, header, Arc::default());
            stream.shut();
        }
    }

    /// The next parts that may be sent now, with the connection to send them on.
    fn next_few(&self, state: &mut State) -> Option<(Arc<Stream>, Vec<Outgoing>)> {
        let stream = state.connection.clone()?;
        let mut requests = Vec::new();
        let mut bytes = 0;
        while requests.len() < MAX_TOGETHER
            && bytes < MAX_TOGETHER_BYTES
            && let Some(next) = self.next(state)
        {
            bytes += next.payload.len();
            requests.push(next);
        }
        (!requests.is_empty()).then_some((stream, requests))
    }

    /// The next part that may be sent now; it counts as sent.
    fn next(&self, state: &mut State) -> Option<Outgoing> {
        let large = data_bytes(&state.waiting.front()?.header) >= LARGE;
        if large && self.export.first_read > 0 && !std::mem::replace(&mut state.large_sent, true) {
            state.waiting.push_front(Part::first_read(self.export.first_read));
        }
        let header = state.waiting.front()?.header;
        let changes = matches!(header.kind, Kind::Write | Kind::WriteZeroes | Kind::Trim);
        let bytes = data_bytes(&header);
        let room = state.sent.is_empty() || (state.sent.len() < MAX_SENT && state.sent_bytes + bytes <= MAX_BYTES);
        if !room || (changes && state.journal.is_full()) {
            return None;
        }
        let mut part = state.waiting.pop_front()?;
        let payload = part.payload(&mut state.journal);
        part.mark = state.journal.mark();
        let handle = state.next_handle;
        state.next_handle += 1;
        state.sent_bytes += bytes;
        state.sent.insert(handle, part);
        Some(Outgoing { handle, header, payload })
    }

    /// The life of the receiving thread.
    fn receive_all(&self, mut stream: Arc<Stream>) {
        loop {
            let why = self.receive_from(&stream);
            stream.shut();
            let mut state = self.state();
            state.connection = None;
            // In the order in which they were sent.
            for part in std::mem::take(&mut state.sent).into_values().rev() {
                state.waiting.push_front(part);
            }
            (state.sent_bytes, state.large_sent) = (0, false);
            let stop = state.stop;
            self.tell(state);
            if stop {
                return;
            }
            log::warn!("{}: connection lost ({why}); trying to reconnect", self.uri.text);
            match self.reconnect() {
                Some(fresh) => stream = fresh,
                None => return,
            }
        }
    }

    /// Takes replies until the connection ends; returns why it did.
    fn receive_from(&self, stream: &Stream) -> io::Error {
        let mut replies = BufReader::with_capacity(REPLIES, stream);
        let mut batch = Batch::default();
        loop {
            if replies.buffer().len() < wire::REPLY_LEN {
                // The next one may be long in coming.
                batch.settle();
            }
            if let Err(why) = self.receive_one(stream, &mut replies, &mut batch) {
                return why;
            }
        }
    }

    fn receive_one(&self, stream: &Stream, replies: &mut BufReader<&Stream>, batch: &mut Batch) -> io::Result<()> {
        let (handle, verdict) = wire::receive(&mut *replies)?;
        let data = match self.state().sent.get(&handle) {
            Some(part) if part.header.kind == Kind::Read => Some((part.buffers.clone(), u64::from(part.header.len))),
            Some(_) => None,
            None => return Err(io::Error::new(io::ErrorKind::InvalidData, "a reply to no request")),
        };
        if let Err(why) = &verdict
            && why.raw_os_error() == Some(libc::ESHUTDOWN)
        {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server is shutting down"));
        }
        match (data, &verdict) {
            (Some((Some(buffers), _)), Ok(())) => {
                let taken = buffers.receive_from(replies.buffer(), stream.as_fd())?;
                replies.consume(taken);
            }
            (Some((None, len)), Ok(())) => forget(replies, len)?,
            _ => {}
        }
        let mut state = self.state();
        let Some(part) = state.sent.remove(&handle) else { return Ok(()) };
        state.sent_bytes = state.sent_bytes.saturating_sub(data_bytes(&part.header));
        let how = self.note(&mut state, &part, verdict);
        drop(state);
        self.end(part, how, batch);
        let state = self.state();
        if !state.waiting.is_empty() || state.watchers > 0 {
            self.tell(state);
        }
        Ok(())
    }

    /// Keeps the journal.
    fn note(&self, state: &mut State, part: &Part, verdict: io::Result<()>) -> End {
        let header = part.header;
        match (header.kind, verdict) {
            (Kind::Write | Kind::WriteZeroes | Kind::Trim, Ok(()))
                if header.flags & FUA == 0 && self.export.has(flag::SEND_FLUSH) =>
            {
                state.journal.add(header, part.payload.clone().unwrap_or_default());
                if state.journal.is_large() && !state.flushing {
                    state.flushing = true;
                    state.waiting.push_front(Part::own_flush());
                }
                End::Done
            }
            (Kind::Flush, Ok(())) => {
                state.journal.forget(part.mark);
                if part.group.is_none() {
                    state.flushing = false;
                } else if std::mem::take(&mut state.flush_failed) {
                    return End::Failed(io::Error::from_raw_os_error(libc::EIO));
                }
                End::Done
            }
            (Kind::Flush, Err(why)) if part.group.is_none() => {
                // It cannot be made durable, and keeping more and more of it would not help.
                state.journal.forget(part.mark);
                (state.flushing, state.flush_failed) = (false, true);
                End::Failed(why)
            }
            (_, Ok(())) => End::Done,
            (_, Err(why)) => End::Failed(why),
        }
    }

    /// Ends a part, with what follows from that.
    fn end(&self, part: Part, how: End, batch: &mut Batch) {
        match part.group.map(|group| group.end(how)) {
            Some(Next::Over(work, result)) => batch.end(work, result),
            Some(Next::Cancelled(work)) => work.cancel(),
            Some(Next::Send(part)) => self.state().waiting.push_front(part),
            Some(Next::Wait) | None => {}
        }
    }

    fn end_all(&self, parts: VecDeque<Part>, how: &dyn Fn() -> End) {
        let mut batch = Batch::default();
        for part in parts {
            if part.group.is_none() && part.header.kind == Kind::Flush {
                self.state().flushing = false;
            }
            self.end(part, how(), &mut batch);
        }
        batch.settle();
        self.tell(self.state());
    }

    fn cancel_waiting(&self) {
        let parts = std::mem::take(&mut self.state().waiting);
        self.end_all(parts, &|| End::Cancelled);
    }

    /// Tries until there is a connection again, on which the journal has been written; `None` when it is time to end.
    fn reconnect(&self) -> Option<Arc<Stream>> {
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let state = self.wait(self.state(), pause, |state| !state.stop);
            if state.stop {
                return None;
            }
            drop(state);
            match self.try_again() {
                Ok(stream) => {
                    log::warn!("{}: connected again", self.uri.text);
                    return Some(stream);
                }
                Err(why) if start.elapsed() >= self.reconnect => {
                    let mut state = self.state();
                    if !std::mem::replace(&mut state.given_up, true) {
                        let seconds = self.reconnect.as_secs();
                        log::warn!("{}: away for {seconds} s ({why}): the guest gets errors", self.uri.text);
                    }
                    self.tell(state);
                }
                Err(_) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn try_again(&self) -> io::Result<Arc<Stream>> {
        let (stream, export) = wire::open(&self.uri)?;
        let size = self.disk.size();
        if export.size < size || export.flags != self.export.flags || export.min_block > self.export.min_block {
            return Err(io::Error::other("the export is another one now"));
        }
        // Only acknowledgements add to the journal, and there are none now.
        let journal = std::mem::take(&mut self.state().journal);
        let replayed = replay(&stream, &journal);
        let mut state = self.state();
        state.journal = journal;
        if state.stop {
            return Err(io::ErrorKind::Interrupted.into());
        }
        replayed?;
        let stream = Arc::new(stream);
        state.connection = Some(stream.clone());
        state.given_up = false;
        self.tell(state);
        self.disk.set_size(export.size - export.size % u64::from(self.disk.logical()));
        Ok(stream)
    }
}

/// Reads `len` bytes that nobody wants.
fn forget(replies: &mut BufReader<&Stream>, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let here = replies.fill_buf()?.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        if here == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        replies.consume(here);
        len -= here as u64;
    }
    Ok(())
}

/// Bytes of data that a request moves.
fn data_bytes(header: &Header) -> usize {
    if matches!(header.kind, Kind::Read | Kind::Write) { header.len as usize } else { 0 }
}

/// Writes the journal to a server that may have lost it.
fn replay(stream: &Stream, journal: &Journal) -> io::Result<()> {
    stream.set_timeout(Some(Duration::from_secs(30)))?;
    for entry in journal.entries() {
        wire::send(stream, 0, entry.header, entry.payload.clone())?;
        let (_, verdict) = wire::receive(stream)?;
        verdict?;
    }
    stream.set_timeout(None)
}
