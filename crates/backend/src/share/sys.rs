//! The system calls of the share that no safe wrapper offers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Kinds of advisory locks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum HostLock {
    Unlock,
    Read,
    Write,
}

/// A `flock` of `start` to `end`, both included; `end` of `u64::MAX` means to the end of the file. `None` beyond what
/// the host can say.
fn request(kind: HostLock, start: u64, end: u64) -> Option<libc::flock> {
    // SAFETY: an all-zero `flock` is a valid value; the pid of 0 is what these locks demand.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    let kind = match kind {
        HostLock::Unlock => libc::F_UNLCK,
        HostLock::Read => libc::F_RDLCK,
        HostLock::Write => libc::F_WRLCK,
    };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    request.l_start = libc::off_t::try_from(start).ok()?;
    // Length 0 reaches to the end of the file, however long it gets.
    request.l_len = end.checked_sub(start)?.checked_add(1).and_then(|len| libc::off_t::try_from(len).ok()).unwrap_or(0);
    Some(request)
}

/// Sets or takes away an open-file-description lock, without waiting.
///
/// # Errors
/// `AGAIN` or `ACCESS`: someone else holds a conflicting lock; others where such locks do not work.
pub(super) fn set_lock(file: BorrowedFd<'_>, kind: HostLock, start: u64, end: u64) -> Result<(), Errno> {
    let mut request = request(kind, start, end).ok_or(Errno::INVAL)?;
    // SAFETY: the descriptor is open, and the command takes a pointer to a `flock`, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut request) };
    if result < 0 { Err(last_error()) } else { Ok(()) }
}

/// Whether a lock could be set: `None`, or kind, start and end of one that is in the way.
pub(super) fn test_lock(file: BorrowedFd<'_>, kind: HostLock, start: u64, end: u64) -> Option<(HostLock, u64, u64)> {
    let mut request = request(kind, start, end)?;
    // SAFETY: as for `set_lock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    if result < 0 || i32::from(request.l_type) == libc::F_UNLCK {
        return None;
    }
    let kind = if i32::from(request.l_type) == libc::F_WRLCK { HostLock::Write } else { HostLock::Read };
    let start = u64::try_from(request.l_start).unwrap_or(0);
    let end = match u64::try_from(request.l_len) {
        Ok(len) if len > 0 => start.saturating_add(len - 1),
        _ => u64::MAX,
    };
    Some((kind, start, end))
}

/// Gives the calling thread a file mode mask of its own, and clears that: modes are the guest's business. Without the
/// means for that the process's mask stays in force.
pub(super) fn clear_umask() {
    // SAFETY: only the sharing of mask and working folder ends; no file is closed and no memory changes hands.
    if unsafe { libc::unshare(libc::CLONE_FS) } == 0 {
        rustix::process::umask(rustix::fs::Mode::empty());
    }
}

fn last_error() -> Errno {
    std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}
