//! What a disk image can do.

use std::io;

use super::buffers::HostBuffers;
use super::options::SectorSize;

/// What the guest is told of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes, a multiple of the logical sector size.
    pub size: u64,
    /// Sector sizes.
    pub sector_size: SectorSize,
    /// Writes are refused.
    pub read_only: bool,
    /// Discard and unmapping write-zeroes give space back to the host.
    pub discard: bool,
}

/// A disk image. Calls block and come from several threads at a time; ranges are inside the image, and the image is
/// writable where a call changes it.
pub trait Image: Send + Sync {
    /// Size and abilities when it was opened.
    fn geometry(&self) -> Geometry;

    /// Looks how large the image is now, where that can change while it is open.
    ///
    /// # Errors
    /// What the host says.
    fn current_size(&self) -> io::Result<u64> {
        Ok(self.geometry().size)
    }

    /// Reads from `offset`.
    ///
    /// # Errors
    /// What the host says.
    fn read(&self, offset: u64, to: &HostBuffers) -> io::Result<()>;

    /// Writes at `offset`; with `fua`, on to stable storage.
    ///
    /// # Errors
    /// What the host says.
    fn write(&self, offset: u64, from: &HostBuffers, fua: bool) -> io::Result<()>;

    /// Returns when all writes that returned before are on stable storage.
    ///
    /// # Errors
    /// What the host says; then what was written since the last flush may be lost.
    fn flush(&self) -> io::Result<()>;

    /// Gives the space of a range back; its contents are undefined afterwards.
    ///
    /// # Errors
    /// What the host says.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read zeroes, and gives its space back if `unmap` and if that is possible.
    ///
    /// # Errors
    /// What the host says.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}
