//! Standard input and output as a serial line: a terminal in raw mode, or pipes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::line::{ByteSource, Input, Parts, read_now};
use super::output::{ByteSink, WhenFull};
use super::wake::{Wake, readable, writable};
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
    let mut parts =
        Parts::new(Some(Box::new(FileSource(stdin))), Box::new(FileSink(rustix::stdio::stdout())), WhenFull::Wait);
    if rustix::termios::isatty(stdin) {
        let terminal = rustix::io::fcntl_dupfd_cloexec(stdin, 3).and_then(RawTerminal::enter);
        parts.terminal = Some(terminal.map_err(|e| TtyError::host("set raw mode on", "the terminal", e))?);
    }
    parts.claim = Some(claim);
    Tty::start(parts)
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
