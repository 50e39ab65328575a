//! Character devices as serial lines: ttys, pseudo terminals, `/dev/null`.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};

use super::line::Parts;
use super::output::WhenFull;
use super::stdio::{FileSink, FileSource};
use super::{RawTerminal, Tty, TtyError};

pub(super) fn open(path: &Path) -> Result<Tty, TtyError> {
    let file = open_device(path)?;
    let terminal = if rustix::termios::isatty(&file) {
        let raw = rustix::io::fcntl_dupfd_cloexec(&file, 3).and_then(RawTerminal::enter);
        Some(raw.map_err(|e| TtyError::host("set raw mode on", path.display(), e))?)
    } else {
        None
    };
    let file = Arc::new(file);
    // A pseudo terminal whose other side nobody reads must not stall the guest.
    let mut parts = Parts::new(Some(Box::new(FileSource(file.clone()))), Box::new(FileSink(file)), WhenFull::Drop);
    parts.terminal = terminal;
    Tty::start(parts)
}

fn open_device(path: &Path) -> Result<OwnedFd, TtyError> {
    let failed = |e| TtyError::host("open", path.display(), e);
    // Looked at first: opening has effects on other kinds of files (a FIFO's other side sees it).
    let kind = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode);
    if kind(rustix::fs::stat(path).map_err(failed)?) != FileType::CharacterDevice {
        return Err(TtyError::NotTerminal { path: path.display().to_string() });
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(failed)
}
