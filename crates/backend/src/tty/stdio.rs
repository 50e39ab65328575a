//! Standard input and output as a serial line: a terminal in raw mode, or pipes.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use signal_hook::consts::SIGWINCH;

use super::line::{ByteSource, Input, Parts, read_now};
use super::output::{ByteSink, WhenFull};
use super::wake::{Wake, readable, wait, writable};
use super::{RawTerminal, Tty, TtyError};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The right to use stdio; there is one.
pub(super) struct StdioClaim(());

impl StdioClaim {
    pub(super) fn take() -> Result<Self, TtyError> {
        if TAKEN.swap(true, Ordering::AcqRel) { Err(TtyError::StdioTaken) } else { Ok(Self(())) }
    }
}

impl Drop for StdioClaim {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

pub(super) fn open() -> Result<Tty, TtyError> {
    let claim = StdioClaim::take()?;
    let stdin = rustix::stdio::stdin();
    let source = if rustix::termios::isatty(stdin) { TerminalSource::open()? } else { Box::new(FileSource(stdin)) };
    let mut parts = Parts::new(Some(source), Box::new(FileSink(rustix::stdio::stdout())), WhenFull::Wait);
    if rustix::termios::isatty(stdin) {
        let terminal = rustix::io::fcntl_dupfd_cloexec(stdin, 3).and_then(RawTerminal::enter);
        parts.terminal = Some(terminal.map_err(|e| TtyError::host("set raw mode on", "the terminal", e))?);
    }
    parts.claim = Some(claim);
    Tty::start(parts)
}

/// Input from the terminal, and news of its size.
struct TerminalSource {
    stdin: FileSource<BorrowedFd<'static>>,
    /// Readable after the terminal has changed its size.
    resized: UnixStream,
    told: Option<(u16, u16)>,
}

impl TerminalSource {
    fn open() -> Result<Box<dyn ByteSource>, TtyError> {
        let watch = || -> io::Result<UnixStream> {
            let (resized, signal) = UnixStream::pair()?;
            resized.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(SIGWINCH, signal)?;
            Ok(resized)
        };
        let resized = watch().map_err(|e| TtyError::host("watch the size of", "the terminal", e))?;
        Ok(Box::new(Self { stdin: FileSource(rustix::stdio::stdin()), resized, told: None }))
    }
}

impl ByteSource for TerminalSource {
    fn read(&mut self, buffer: &mut [u8], want: bool, wake: &Wake) -> Input {
        while (&self.resized).read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
        let size = rustix::termios::tcgetwinsize(self.stdin.0).ok().map(|size| (size.ws_col, size.ws_row));
        if let Some((columns, rows)) = size.filter(|size| want && self.told != Some(*size)) {
            self.told = size;
            return Input::Size(columns, rows);
        }
        let mut fds = vec![PollFd::new(wake, PollFlags::IN), PollFd::new(&self.resized, PollFlags::IN)];
        if want {
            fds.push(PollFd::from_borrowed_fd(self.stdin.0, PollFlags::IN));
        }
        wait(&mut fds);
        let ready = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        if ready { read_now(self.stdin.0, buffer) } else { Input::Nothing }
    }
}

/// Input from a file that may be in blocking mode: it is shared with other processes, so its mode is not ours to change.
pub(super) struct FileSource<F>(pub(super) F);

impl<F: AsFd + Send> ByteSource for FileSource<F> {
    fn read(&mut self, buffer: &mut [u8], want: bool, wake: &Wake) -> Input {
        let file: BorrowedFd<'_> = self.0.as_fd();
        if readable(want.then_some(file), wake) { read_now(file, buffer) } else { Input::Nothing }
    }
}

/// Output to a file that may be in blocking mode.
pub(super) struct FileSink<F>(pub(super) F);

impl<F: AsFd + Send> ByteSink for FileSink<F> {
    fn write(&mut self, bytes: &[u8], stop: &Wake) -> io::Result<usize> {
        loop {
            if !writable(&self.0, stop) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            match rustix::io::write(&self.0, bytes) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok(0) if !bytes.is_empty() => return Err(io::ErrorKind::WriteZero.into()),
                other => return Ok(other?),
            }
        }
    }
}
