//! The system calls of the network layer that no safe wrapper offers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// One piece of memory for vectored I/O.
pub(super) type IoVec = libc::iovec;

/// Pieces that the kernel takes in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// How bytes get to where they go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// `writev`, for devices.
    Device,
    /// `sendmsg`, for sockets: does not wait and raises no signal.
    Socket,
}

/// Sends pieces by one system call; returns how many bytes were taken.
///
/// # Safety
/// Every piece must be memory that stays mapped during the call; the kernel reads it only.
pub(super) unsafe fn send(to: BorrowedFd<'_>, way: Way, pieces: &[IoVec]) -> io::Result<usize> {
    let count = pieces.len().min(MAX_PIECES);
    loop {
        let sent = match way {
            // SAFETY: `count` pieces are in the slice; the caller vouches for what they point to.
            Way::Device => unsafe { libc::writev(to.as_raw_fd(), pieces.as_ptr(), count as libc::c_int) },
            Way::Socket => {
                // SAFETY: all zero is a valid `msghdr`: no address, no pieces, no control data.
                let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
                message.msg_iov = pieces.as_ptr().cast_mut();
                message.msg_iovlen = count;
                // SAFETY: as for the other way; the message outlives the call.
                unsafe { libc::sendmsg(to.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
            }
        };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => {
                let why = io::Error::last_os_error();
                if why.kind() != io::ErrorKind::Interrupted {
                    return Err(why);
                }
            }
        }
    }
}

/// `ifreq` of Linux, as far as the calls here use it (netdevice(7)).
#[repr(C)]
#[derive(Clone, Copy)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    /// Flags or an integer; the rest is for other requests.
    value: [u8; 24],
}

/// Longest name of an interface.
pub(super) const MAX_INTERFACE_NAME: usize = libc::IFNAMSIZ - 1;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETVNETLE: libc::Ioctl = 0x4004_54dc;

/// A request about interface `name` whose answer, if any, is in the value.
fn interface_request(file: BorrowedFd<'_>, request: libc::Ioctl, name: &str, value: &[u8]) -> io::Result<[u8; 24]> {
    let mut argument = InterfaceRequest { name: [0; libc::IFNAMSIZ], value: [0; 24] };
    if name.len() > MAX_INTERFACE_NAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    argument.name[..name.len()].copy_from_slice(name.as_bytes());
    argument.value[..value.len()].copy_from_slice(value);
    // SAFETY: the descriptor is open; all requests used here take a pointer to an `ifreq` of 40 bytes, which outlives the
    // call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(argument.value) }
}

/// Binds an open `/dev/net/tun` to the tap interface `name`, which is made if it is missing.
pub(super) fn tap_bind(file: BorrowedFd<'_>, name: &str, multi_queue: bool) -> io::Result<()> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    interface_request(file, TUNSETIFF, name, &(flags as libc::c_short).to_ne_bytes()).map(drop)
}

fn tap_integer(file: BorrowedFd<'_>, request: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open; these requests read an int through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the size of the header before each packet, and that it is little-endian.
pub(super) fn tap_header(file: BorrowedFd<'_>, size: usize) -> io::Result<()> {
    tap_integer(file, TUNSETVNETHDRSZ, size as libc::c_int)?;
    if cfg!(target_endian = "big") { tap_integer(file, TUNSETVNETLE, 1) } else { Ok(()) }
}

/// Sets what the kernel may leave to the reader (`TUN_F_` flags).
pub(super) fn tap_offloads(file: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open; this request takes its value in the argument itself.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The flags of an interface (`IFF_`), through any socket.
pub(super) fn interface_flags(socket: BorrowedFd<'_>, name: &str) -> io::Result<i16> {
    let value = interface_request(socket, libc::SIOCGIFFLAGS, name, &[])?;
    Ok(i16::from_ne_bytes([value[0], value[1]]))
}

/// Sets the flags of an interface.
pub(super) fn set_interface_flags(socket: BorrowedFd<'_>, name: &str, flags: i16) -> io::Result<()> {
    interface_request(socket, libc::SIOCSIFFLAGS, name, &flags.to_ne_bytes()).map(drop)
}

/// Sets the MTU of an interface, in bytes.
pub(super) fn set_interface_mtu(socket: BorrowedFd<'_>, name: &str, mtu: u16) -> io::Result<()> {
    interface_request(socket, libc::SIOCSIFMTU, name, &libc::c_int::from(mtu).to_ne_bytes()).map(drop)
}
