//! The requests of evdev, for which there are no safe wrappers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Requests that fill a buffer of any length.
pub(super) const NAME: u8 = 0x06;
pub(super) const SERIAL: u8 = 0x08;
pub(super) const PROPERTIES: u8 = 0x09;
/// And one for each type of events.
pub(super) const CODES: u8 = 0x20;

const IDS: u8 = 0x02;
const AXIS: u8 = 0x40;
const GRAB: u8 = 0x90;

/// The number of a request: direction, length of the argument, evdev's letter, number (asm-generic/ioctl.h).
fn request(read: bool, number: u8, len: usize) -> libc::Ioctl {
    let direction: u32 = if read { 2 } else { 1 };
    (direction << 30 | (len as u32 & 0x3fff) << 16 | u32::from(b'E') << 8 | u32::from(number)) as libc::Ioctl
}

/// Asks for at most `len` bytes.
pub(super) fn bytes(file: BorrowedFd<'_>, number: u8, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; len];
    // SAFETY: the descriptor is open, and the request, whose number carries the length, writes at most that many bytes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request(true, number, len), bytes.as_mut_ptr()) };
    let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Bus, vendor, product, version.
pub(super) fn ids(file: BorrowedFd<'_>) -> io::Result<[u16; 4]> {
    let mut ids = [0u16; 4];
    // SAFETY: as above; the request writes four numbers of 16 bits.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request(true, IDS, 8), ids.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(ids) }
}

/// Minimum, maximum, fuzz, flat and resolution of an axis.
pub(super) fn axis(file: BorrowedFd<'_>, axis: u8) -> io::Result<[u32; 5]> {
    let mut words = [0u32; 6];
    // SAFETY: as above; the request writes six numbers of 32 bits.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request(true, AXIS + axis, 24), words.as_mut_ptr()) };
    let [_value, rest @ ..] = words;
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(rest) }
}

/// Takes the device away from everybody else, until the file is closed.
pub(super) fn grab(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the argument of this request is a number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request(false, GRAB, 4), 1) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
