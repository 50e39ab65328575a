//! SCSI devices of the host (`/dev/sgN`, `/dev/bsg/...` excepted), commands passed on by the SG_IO ioctl (Linux, sg(4)).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use crate::block::{Geometry, HostBuffers, Image, SectorSize};

const SG_GET_VERSION_NUM: libc::Ioctl = 0x2282;
const SG_IO: libc::Ioctl = 0x2285;
/// First version of the driver with the interface used here.
const VERSION: libc::c_int = 30_000;

const DIRECTION_NONE: i32 = -1;
const DIRECTION_TO_DEVICE: i32 = -2;
const DIRECTION_FROM_DEVICE: i32 = -3;

/// Milliseconds for a command; formatting a disk takes longer, but nothing that a guest waits for.
const TIMEOUT: u32 = 60_000;
/// Bytes of sense data that are kept.
const MAX_SENSE: usize = 96;
/// Pieces of a command's data, at most.
const MAX_PIECES: usize = 1024;

/// Why a SCSI device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ScsiGenericError {
    /// It cannot be opened.
    #[error("Could not open SCSI device {}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is not a SCSI generic device; these are called /dev/sg0, /dev/sg1 and so on", .0.display())]
    Kind(PathBuf),
}

/// How a command ended on the device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ended {
    /// SCSI status.
    pub status: u8,
    /// Sense data.
    pub sense: Vec<u8>,
    /// Bytes that were not moved.
    pub residual: u32,
    /// Whether the command reached the device at all.
    pub delivered: bool,
}

/// An open SCSI device.
#[derive(Debug)]
pub struct ScsiGeneric {
    file: File,
}

/// `struct sg_io_hdr` of <scsi/sg.h>.
#[repr(C)]
struct Header {
    interface_id: i32,
    direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *const libc::c_void,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

impl ScsiGeneric {
    /// Whether a path is that of such a device, by its name.
    pub fn is_one(path: &Path) -> bool {
        let number = path.to_str().and_then(|path| path.strip_prefix("/dev/sg"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// Opens a device.
    ///
    /// # Errors
    /// It cannot be opened, or is something else.
    pub fn open(path: &Path) -> Result<Self, ScsiGenericError> {
        let open = OpenOptions::new().read(true).write(true).open(path);
        let file = open.map_err(|source| ScsiGenericError::Open { path: path.into(), source })?;
        let mut version: libc::c_int = 0;
        // SAFETY: the descriptor is open, and the command writes one int to the pointer.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), SG_GET_VERSION_NUM, &raw mut version) };
        if result < 0 || version < VERSION { Err(ScsiGenericError::Kind(path.into())) } else { Ok(Self { file }) }
    }

    /// Does a command, whose data go in one direction at most. Blocks until it is done.
    ///
    /// # Errors
    /// The kernel does not take the command.
    pub fn execute(&self, cdb: &[u8], out: &HostBuffers, input: &HostBuffers) -> io::Result<Ended> {
        let (direction, buffers) = match (out.is_empty(), input.is_empty()) {
            (true, true) => (DIRECTION_NONE, out),
            (false, true) => (DIRECTION_TO_DEVICE, out),
            (true, false) => (DIRECTION_FROM_DEVICE, input),
            (false, false) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let pieces = buffers.pieces();
        let len = u32::try_from(buffers.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let cmd_len = u8::try_from(cdb.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        if pieces.len() > MAX_PIECES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut sense = vec![0; MAX_SENSE];
        let mut header = Header {
            interface_id: i32::from(b'S'),
            direction,
            cmd_len,
            mx_sb_len: MAX_SENSE as u8,
            iovec_count: pieces.len() as u16,
            dxfer_len: len,
            dxferp: if pieces.is_empty() { null() } else { pieces.as_ptr().cast() },
            cmdp: cdb.as_ptr(),
            sbp: sense.as_mut_ptr(),
            timeout: TIMEOUT,
            flags: 0,
            pack_id: 0,
            usr_ptr: null_mut(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sb_len_wr: 0,
            host_status: 0,
            driver_status: 0,
            resid: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: the command takes a pointer to this structure. What that points to lives until the call returns: the pieces
        // lie in guest RAM, which the buffers keep mapped and which is only accessed raw.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), SG_IO, &raw mut header) };
        if direction == DIRECTION_FROM_DEVICE {
            input.note_written();
        }
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        sense.truncate(usize::from(header.sb_len_wr));
        let residual = u32::try_from(header.resid).unwrap_or(0).min(len);
        Ok(Ended { status: header.status, sense, residual, delivered: header.host_status == 0 })
    }
}

/// Only so that a device's commands can wait on the threads of a [`Disk`](crate::block::Disk): it has no blocks.
impl Image for ScsiGeneric {
    fn geometry(&self) -> Geometry {
        let sector_size = SectorSize { logical: 512, physical: 512 };
        Geometry { size: 0, sector_size, read_only: true, discard: false }
    }

    fn read(&self, _: u64, _: &HostBuffers) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, _: u64, _: &HostBuffers, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    #[cfg(target_pointer_width = "64")]
    fn the_structure_is_the_kernels() {
        assert_eq!(size_of::<Header>(), 88);
        assert_eq!(offset_of!(Header, dxferp), 16);
        assert_eq!(offset_of!(Header, timeout), 40);
        assert_eq!(offset_of!(Header, usr_ptr), 56);
        assert_eq!(offset_of!(Header, host_status), 68);
        assert_eq!(offset_of!(Header, resid), 72);
    }

    #[test]
    fn only_scsi_generic_devices() {
        let is_one = |path: &str| ScsiGeneric::is_one(Path::new(path));
        assert!(is_one("/dev/sg0") && is_one("/dev/sg12"));
        assert!(!is_one("/dev/sg") && !is_one("/dev/sga") && !is_one("/dev/sda") && !is_one("./sg0"));
        assert!(matches!(ScsiGeneric::open(Path::new("/dev/null")), Err(ScsiGenericError::Kind(_))));
        let missing = ScsiGeneric::open(Path::new("/dev/sg999")).unwrap_err().to_string();
        assert_eq!(missing, "Could not open SCSI device /dev/sg999");
    }
}
