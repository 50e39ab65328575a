//! Names for translated code in profiles: perf(1) reads `/tmp/perf-PID.map`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// The file, to which all vCPUs of a process write: one line for each block, with its address, its size and its name.
pub struct PerfMap(Mutex<File>);

impl PerfMap {
    /// Makes the file of this process. A file that a process of the same number left is replaced.
    ///
    /// # Errors
    /// The file cannot be made, for instance because another user's is in the way.
    pub fn create() -> io::Result<Self> {
        let path = Self::path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Not through a link that somebody else put there.
        Ok(Self(Mutex::new(OpenOptions::new().write(true).create_new(true).open(path)?)))
    }

    /// Where perf(1) looks for it.
    pub fn path() -> PathBuf {
        PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()))
    }

    /// Adds code of `size` bytes at `address`, made from the guest's code at linear address `rip`. Errors are not worth
    /// stopping for: the profile then has fewer names.
    pub(crate) fn add(&self, address: usize, size: usize, rip: u64, user: bool) {
        let space = if user { "user" } else { "kernel" };
        let line = format!("{address:x} {size:x} guest {space} {rip:#x}\n");
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
    }
}
