//! Raw images: a file or block device whose bytes are the disk's.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::buffers::HostBuffers;
use super::image::{Geometry, Image};
use super::options::{BlockOptions, SectorSize};
use super::{BlockError, lock, sys};

/// Zeroes written at a time where the host cannot make them itself.
const ZEROES: &[u8] = &[0; 64 << 10];

/// An open raw image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    /// For `nocache`: the same file through the page cache, for requests whose alignment direct I/O refuses.
    cached: Option<OnceLock<File>>,
    block_device: bool,
    /// Every write goes to stable storage, also one by the second descriptor.
    sync: bool,
    geometry: Geometry,
}

impl RawImage {
    /// Opens an image: for writing, and where that is refused for reading only.
    ///
    /// # Errors
    /// It cannot be opened, is not a disk, is in use, or cannot have the sector size asked for.
    pub fn open(options: &BlockOptions) -> Result<Self, BlockError> {
        let path = &options.path;
        let (file, read_only) = open_file(options)?;
        let stat = |source| BlockError::Stat { path: path.clone(), source };
        let meta = file.metadata().map_err(stat)?;
        let block_device = meta.file_type().is_block_device();
        let sector_size =
            sector_size(&file, block_device, meta.blksize(), options.sector_size).map_err(|error| match error {
                SectorError::Host(source) => stat(source),
                SectorError::Option(error) => error,
            })?;
        let bytes = if block_device { (&file).seek(SeekFrom::End(0)).map_err(stat)? } else { meta.len() };
        let size = bytes - bytes % u64::from(sector_size.logical);
        let discard = options.discard && !read_only && can_discard(&file, block_device, meta.rdev(), bytes);
        let geometry = Geometry { size, sector_size, read_only, discard };
        Ok(Self { file, cached: options.nocache.then(OnceLock::new), block_device, sync: options.sync, geometry })
    }

    /// The file, for requests made in other ways.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether data comes from the host's page cache, and goes there first.
    pub(super) fn uses_cache(&self) -> bool {
        self.cached.is_none()
    }

    /// Whether a write ends in the host's page cache, which takes no time to speak of.
    pub(super) fn writes_to_cache(&self) -> bool {
        self.uses_cache() && !self.sync
    }

    /// Runs a transfer; with `nocache`, one that is not aligned as direct I/O demands goes through the page cache. The
    /// kernel keeps the two coherent.
    fn transfer(&self, run: impl Fn(&File) -> io::Result<()>) -> io::Result<()> {
        let result = run(&self.file);
        match (&result, &self.cached) {
            (Err(why), Some(cached)) if why.raw_os_error() == Some(libc::EINVAL) => {
                if cached.get().is_none() {
                    // Two threads may open it at once; one of the two descriptors is dropped.
                    let _ = cached.set(reopen_cached(&self.file, self.geometry.read_only)?);
                }
                cached.get().map_or(result, run)
            }
            _ => result,
        }
    }

    fn write_plain_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        self.transfer(|file| {
            let mut done = 0;
            while done < len {
                let here = (len - done).min(ZEROES.len() as u64);
                file.write_all_at(&ZEROES[..here as usize], offset + done)?;
                done += here;
            }
            Ok(())
        })
    }
}

/// Opens and locks the file of a disk; returns it and whether it can only be read.
///
/// # Errors
/// It cannot be opened, is no file or block device, or is in use.
pub(super) fn open_file(options: &BlockOptions) -> Result<(File, bool), BlockError> {
    let path = &options.path;
    let (file, refusal) = open(options).map_err(|source| BlockError::Open { path: path.clone(), source })?;
    let meta = file.metadata().map_err(|source| BlockError::Stat { path: path.clone(), source })?;
    if let Some(what) = not_a_disk(meta.file_type()) {
        return Err(BlockError::Kind { path: path.clone(), what });
    }
    if let Some(why) = &refusal {
        log::warn!("{}: cannot be written ({why}): the guest gets a read-only disk", path.display());
    }
    let read_only = options.read_only || refusal.is_some();
    if options.lock {
        lock::lock(&file, path, !read_only)?;
    }
    Ok((file, read_only))
}

/// The file, and why it cannot be written if that was tried.
fn open(options: &BlockOptions) -> io::Result<(File, Option<io::Error>)> {
    let mut flags = OFlags::CLOEXEC;
    flags.set(OFlags::DIRECT, options.nocache);
    flags.set(OFlags::SYNC, options.sync);
    let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags.bits() as i32).open(&options.path);
    if options.read_only {
        return Ok((open(false)?, None));
    }
    match open(true) {
        Ok(file) => Ok((file, None)),
        Err(why) => Ok((open(false)?, Some(why))),
    }
}

/// The same open file without O_DIRECT, also if its name is gone meanwhile.
fn reopen_cached(file: &File, read_only: bool) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    OpenOptions::new().read(true).write(!read_only).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn not_a_disk(kind: FileType) -> Option<&'static str> {
    let kinds = [
        (kind.is_dir(), "a directory"),
        (kind.is_char_device(), "a character device"),
        (kind.is_fifo(), "a pipe"),
        (kind.is_socket(), "a socket"),
    ];
    kinds.into_iter().find_map(|(is, what)| is.then_some(what))
}

enum SectorError {
    Host(io::Error),
    Option(BlockError),
}

/// The sector sizes: those asked for, if the device underneath can have them; otherwise its own, or 512 bytes over the
/// file system's block size.
fn sector_size(
    file: &File,
    block_device: bool,
    block_size: u64,
    wanted: Option<SectorSize>,
) -> Result<SectorSize, SectorError> {
    let host = if block_device {
        let logical = rustix::fs::ioctl_blksszget(file).map_err(|why| SectorError::Host(why.into()))?;
        let physical = rustix::fs::ioctl_blkpbszget(file).unwrap_or(logical).max(logical);
        SectorSize { logical, physical }
    } else {
        let physical = u32::try_from(block_size).ok().filter(|size| size.is_power_of_two() && *size >= 512);
        SectorSize { logical: 512, physical: physical.unwrap_or(512) }
    };
    match wanted {
        None => Ok(host),
        Some(wanted) if block_device && !wanted.logical.is_multiple_of(host.logical) => {
            Err(SectorError::Option(BlockError::DeviceSectorSize { logical: wanted.logical, device: host.logical }))
        }
        Some(wanted) => Ok(wanted),
    }
}

/// Whether the host can give space back.
fn can_discard(file: &File, block_device: bool, device: u64, size: u64) -> bool {
    if block_device {
        return device_can_discard(device);
    }
    // A hole punched behind the end of the file changes nothing, but tells whether the file system can do it.
    let beyond = size.next_multiple_of(1 << 20);
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, beyond, 4096).is_ok()
}

fn device_can_discard(device: u64) -> bool {
    let node = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    // A partition's queue is its disk's.
    let limits = ["queue/discard_max_bytes", "../queue/discard_max_bytes"];
    let limit = limits.iter().find_map(|name| std::fs::read_to_string(Path::new(&node).join(name)).ok());
    limit.and_then(|text| text.trim().parse::<u64>().ok()).is_some_and(|limit| limit > 0)
}

impl Image for RawImage {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn current_size(&self) -> io::Result<u64> {
        let bytes = if self.block_device { (&self.file).seek(SeekFrom::End(0))? } else { self.file.metadata()?.len() };
        Ok(bytes - bytes % u64::from(self.geometry.sector_size.logical))
    }

    fn read(&self, offset: u64, to: &HostBuffers) -> io::Result<()> {
        self.transfer(|file| to.read_from(file.as_fd(), offset))
    }

    fn write(&self, offset: u64, from: &HostBuffers, fua: bool) -> io::Result<()> {
        self.transfer(|file| from.write_to(file.as_fd(), offset, fua || self.sync))
    }

    fn flush(&self) -> io::Result<()> {
        rustix::fs::fdatasync(&self.file).map_err(Into::into)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.block_device {
            return sys::discard_device(self.file.as_fd(), offset, len);
        }
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len).map_err(Into::into)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let unmap = unmap && self.geometry.discard;
        let mode = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(()),
            Err(_) => self.write_plain_zeroes(offset, len),
        }
    }
}
