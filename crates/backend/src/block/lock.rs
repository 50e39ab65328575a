//! Keeps two processes from writing to one image: an open-file-description lock on the whole file, shared between those
//! who only read. It belongs to the open file, so it ends with the process however that ends.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{BlockError, sys};

/// Locks `file` for this process: alone to write, with others to read.
///
/// # Errors
/// Another process holds a lock that forbids it. Where the file system has no locks, that is only reported.
pub(super) fn lock(file: &fs::File, path: &Path, exclusive: bool) -> Result<(), BlockError> {
    match sys::try_lock(file.as_fd(), exclusive) {
        Ok(()) => Ok(()),
        Err(why) if matches!(why.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied) => {
            Err(BlockError::Locked { path: path.into(), holder: holders(file) })
        }
        Err(why) => {
            log::warn!(
                "{}: cannot be locked ({why}); make sure that no other VM uses it, or say lock=off to silence this",
                path.display()
            );
            Ok(())
        }
    }
}

/// Who else has the file open, as far as this user can see.
fn holders(file: &fs::File) -> String {
    let Ok(wanted) = file.metadata().map(|meta| (meta.dev(), meta.ino())) else { return "another process".into() };
    let mut found: Vec<u32> = pids().filter(|pid| *pid != std::process::id() && has_open(*pid, wanted)).collect();
    found.sort_unstable();
    match found[..] {
        [] => "another process".into(),
        [pid] => describe(pid),
        [pid, ..] => format!("{} and {} more", describe(pid), found.len() - 1),
    }
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn has_open(pid: u32, (device, inode): (u64, u64)) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    entries
        .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
        .any(|meta| (meta.dev(), meta.ino()) == (device, inode))
}

/// "process 123 (bhyve: vm0)".
fn describe(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = command.split(|byte| *byte == 0).filter(|word| !word.is_empty()).collect();
    let text = String::from_utf8_lossy(&words.join(&b' ')).chars().take(60).collect::<String>();
    if text.is_empty() { format!("process {pid}") } else { format!("process {pid} ({text})") }
}
