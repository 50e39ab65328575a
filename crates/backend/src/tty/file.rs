//! Output appended to a file. What the guest writes after a failure (a full disk) is tried anew.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::line::Parts;
use super::output::{ByteSink, WhenFull};
use super::wake::Wake;
use super::{Tty, TtyError};

pub(super) fn open(path: &Path) -> Result<Tty, TtyError> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.map_err(|e| TtyError::host("open", path.display(), e))?;
    let sink = LogSink { file, path: path.to_owned(), failed: false };
    Tty::start(Parts::new(None, Box::new(sink), WhenFull::Wait))
}

struct LogSink {
    file: File,
    path: PathBuf,
    failed: bool,
}

impl ByteSink for LogSink {
    fn write(&mut self, bytes: &[u8], _stop: &Wake) -> io::Result<usize> {
        match self.file.write(bytes) {
            Ok(count) if count > 0 => {
                self.failed = false;
                Ok(count)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Err(e),
            failure => {
                if !self.failed {
                    let why = failure.err().map_or_else(|| "it takes no more bytes".to_owned(), |e| e.to_string());
                    log::warn!("serial output to {} is being lost: {why}", self.path.display());
                }
                self.failed = true;
                Ok(bytes.len())
            }
        }
    }
}
