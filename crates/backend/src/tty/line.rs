//! A serial line: the two threads between a device and a host file.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::output::{ByteSink, Output, WhenFull};
use super::stdio::StdioClaim;
use super::wake::Wake;
use super::{RawTerminal, SerialBackend, SerialDevice, TtyError};

/// Bytes read from the host at once at most, thus also those read but not yet taken by the device.
const INPUT_BYTES: usize = 256;
/// How long a dropped line waits for the host to take the last output.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// What came of waiting for input.
pub(super) enum Input {
    /// So many bytes were read.
    Bytes(usize),
    /// A client came, or left.
    Client(bool),
    /// The terminal has another size: (columns, rows).
    Size(u16, u16),
    /// Something else happened.
    Nothing,
    /// There will be no more input.
    End,
}

/// Where input comes from. Used by the reader thread alone.
pub(super) trait ByteSource: Send {
    /// Waits for input (only if `want` is set), for other events of the source, or until `wake` is set.
    fn read(&mut self, buffer: &mut [u8], want: bool, wake: &Wake) -> Input;
}

/// The parts that make a line.
pub(super) struct Parts {
    pub(super) source: Option<Box<dyn ByteSource>>,
    pub(super) sink: Box<dyn ByteSink>,
    pub(super) when_full: WhenFull,
    pub(super) terminal: Option<RawTerminal>,
    pub(super) claim: Option<StdioClaim>,
    pub(super) local_address: Option<SocketAddr>,
    /// Where somebody can reach the other side, if that is not what was asked for.
    pub(super) peer: Option<PathBuf>,
    /// Whether clients come and go; others are always there.
    pub(super) has_clients: bool,
}

impl Parts {
    pub(super) fn new(source: Option<Box<dyn ByteSource>>, sink: Box<dyn ByteSink>, when_full: WhenFull) -> Self {
        Self {
            source,
            sink,
            when_full,
            terminal: None,
            claim: None,
            local_address: None,
            peer: None,
            has_clients: false,
        }
    }
}

struct Shared {
    device: Mutex<Option<Weak<dyn SerialDevice>>>,
    output: Output,
    /// Wakes the reader: the device has room, a device was attached, or the line closes.
    input_wake: Wake,
    closing: AtomicBool,
}

impl Shared {
    fn device(&self) -> Option<Arc<dyn SerialDevice>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(Weak::upgrade)
    }

    fn tell(&self, what: impl FnOnce(&dyn SerialDevice)) {
        if let Some(device) = self.device() {
            what(&*device);
        }
    }

    /// The reader thread. Input that the device has no room for waits in `pending`, and nothing more is read.
    fn read(&self, source: &mut dyn ByteSource) {
        let mut buffer = [0; INPUT_BYTES];
        let mut pending = 0..0;
        loop {
            // Whatever sets the flag from here on is either seen below or ends the wait.
            self.input_wake.clear();
            if self.closing.load(Ordering::Acquire) {
                return;
            }
            // The device is not kept alive while this thread sleeps: it may own this line.
            let attached = self.device().is_some_and(|device| {
                if let Some(bytes) = buffer.get(pending.clone()).filter(|bytes| !bytes.is_empty()) {
                    pending.start += device.receive(bytes);
                }
                true
            });
            let event = if pending.is_empty() {
                source.read(&mut buffer, attached, &self.input_wake)
            } else {
                source.read(&mut [], false, &self.input_wake)
            };
            match event {
                Input::Bytes(count) => pending = 0..count,
                Input::Client(here) => self.tell(|device| device.client(here)),
                Input::Size(columns, rows) => self.tell(|device| device.resized(columns, rows)),
                Input::Nothing => {}
                // Only told to those who want input, so nothing is pending.
                Input::End => return,
            }
        }
    }
}

/// An open serial backend. Dropping it gives the last output a second to reach the host, ends the threads and puts a
/// raw terminal back.
pub struct Tty {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    writer: Option<JoinHandle<()>>,
    local_address: Option<SocketAddr>,
    peer: Option<PathBuf>,
    has_clients: bool,
    // Dropped after the threads have ended: first the modes go back, then stdio is free again.
    _terminal: Option<RawTerminal>,
    _claim: Option<StdioClaim>,
}

impl Tty {
    pub(super) fn start(parts: Parts) -> Result<Self, TtyError> {
        let failed = |e: io::Error| TtyError::host("start the threads of", "a serial port", e);
        let shared = Arc::new(Shared {
            device: Mutex::new(None),
            output: Output::new(parts.when_full).map_err(failed)?,
            input_wake: Wake::new().map_err(failed)?,
            closing: AtomicBool::new(false),
        });
        // Complete but for the threads, so that a failure to start the second ends the first.
        let mut tty = Self {
            shared: shared.clone(),
            reader: None,
            writer: None,
            local_address: parts.local_address,
            peer: parts.peer,
            has_clients: parts.has_clients,
            _terminal: parts.terminal,
            _claim: parts.claim,
        };
        let (mut sink, writing) = (parts.sink, shared.clone());
        let writer = move || writing.output.run(&mut *sink, || writing.device());
        tty.writer = Some(spawn("serial out", writer).map_err(failed)?);
        if let Some(mut source) = parts.source {
            tty.reader = Some(spawn("serial in", move || shared.read(&mut *source)).map_err(failed)?);
        }
        Ok(tty)
    }

    /// Where a `tcp=` backend listens.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.local_address
    }

    /// The file by which a person reaches the guest: the other side of a new pseudo terminal.
    pub fn peer(&self) -> Option<&Path> {
        self.peer.as_deref()
    }

    /// Whether clients come and go, which the device is told by [`SerialDevice::client`].
    pub fn has_clients(&self) -> bool {
        self.has_clients
    }

    /// Waits until the host has all output, at most for `grace`; returns whether it has. For the way out of the process.
    pub fn drain(&self, grace: Duration) -> bool {
        self.shared.output.drain(grace)
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body)
}

impl SerialBackend for Tty {
    fn send(&self, bytes: &[u8]) -> usize {
        self.shared.output.send(bytes)
    }

    fn attach(&self, device: Weak<dyn SerialDevice>) {
        *self.shared.device.lock().unwrap_or_else(PoisonError::into_inner) = Some(device);
        self.shared.input_wake.set();
    }

    fn resume_input(&self) {
        self.shared.input_wake.set();
    }
}

impl Drop for Tty {
    fn drop(&mut self) {
        // The last owner may be one of the line's own threads, which held the device for a moment.
        let other = |thread: &JoinHandle<()>| thread.thread().id() != std::thread::current().id();
        if let Some(writer) = self.writer.take().filter(other)
            && self.shared.output.close(DROP_GRACE)
        {
            // Nothing in the threads panics; and if it did, the line is closed all the same.
            let _ = writer.join();
        }
        self.shared.output.abandon();
        self.shared.closing.store(true, Ordering::Release);
        self.shared.input_wake.set();
        if let Some(reader) = self.reader.take().filter(other) {
            let _ = reader.join();
        }
    }
}

/// Reads what is there from a host file, after it was found readable.
pub(super) fn read_now(file: BorrowedFd<'_>, buffer: &mut [u8]) -> Input {
    match rustix::io::read(file, buffer) {
        Ok(0) => Input::End,
        Ok(count) => Input::Bytes(count),
        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Input::Nothing,
        // The other side of the line is gone.
        Err(_) => Input::End,
    }
}
