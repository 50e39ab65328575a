//! The system calls of the block layer that no safe wrapper offers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// One piece of host memory for vectored I/O.
pub(super) type IoVec = libc::iovec;

/// Pieces that the kernel takes in one call.
pub(super) const MAX_PIECES: usize = 1024;

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Direction {
    /// From an offset of the file.
    Read(u64),
    /// The same, if that is only a matter of copying: `WouldBlock` otherwise.
    ReadCached(u64),
    /// To an offset of the file; `true`: and on to stable storage.
    Write(u64, bool),
    /// From a stream.
    Receive,
}

/// Moves bytes between `file` and the first pieces of `pieces`; returns how many.
///
/// # Safety
/// Every piece must be memory that stays mapped during the call, and that nothing but raw accesses touch.
pub(super) unsafe fn transfer(file: BorrowedFd<'_>, direction: Direction, pieces: &[IoVec]) -> io::Result<usize> {
    let count = pieces.len().min(MAX_PIECES) as libc::c_int;
    let at = |offset: u64| libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let (fd, start) = (file.as_raw_fd(), pieces.as_ptr());
    // SAFETY: `count` pieces are in the slice; the caller vouches for what they point to.
    let moved = unsafe {
        match direction {
            Direction::Read(offset) => libc::preadv(fd, start, count, at(offset)?),
            Direction::ReadCached(offset) => libc::preadv2(fd, start, count, at(offset)?, libc::RWF_NOWAIT),
            Direction::Write(offset, false) => libc::pwritev(fd, start, count, at(offset)?),
            Direction::Write(offset, true) => libc::pwritev2(fd, start, count, at(offset)?, libc::RWF_DSYNC),
            Direction::Receive => libc::readv(fd, start, count),
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Takes an open-file-description lock on the whole file without waiting.
///
/// # Errors
/// `WouldBlock` or `PermissionDenied` when someone else holds a conflicting lock; others where locks do not work.
pub(super) fn try_lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    // SAFETY: an all-zero `flock` is a valid value: whole file, from its start, pid 0 as these locks demand.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open, and the command takes a pointer to a `flock`, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Tells a block device that a range is no longer needed.
pub(super) fn discard_device(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [offset, len];
    // SAFETY: the descriptor is open, and the command reads two u64 from the pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
