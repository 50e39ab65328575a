//! Disks: the block layer under every emulated disk.
//!
//! | module | what it does |
//! |---|---|
//! | [`options`] | the options of a disk and their keys |
//! | [`disk`] | [`Disk`]: asynchronous requests on guest memory, done by a few threads per disk |
//! | [`image`] | what a disk image can do, as the threads see it |
//! | [`raw`] | images that are files or block devices, byte for byte |
//! | [`lock`] | who may open an image at the same time |
//! | [`buffers`] | guest memory as the kernel's vectored I/O wants it |
//!
//! Guest data goes straight between guest memory and the host's file, without copies. An error reaches the guest as an
//! error, never as silent success; a flush is over when the data is on stable storage.

pub mod buffers;
pub mod disk;
pub mod image;
pub mod lock;
pub mod options;
pub mod raw;
mod sys;
#[cfg(test)]
mod tests;

pub use buffers::HostBuffers;
pub use disk::{Disk, IoError, Operation, Request};
pub use image::{Geometry, Image};
pub use options::{BlockOptions, SectorSize};

use std::io;
use std::path::PathBuf;

use config::ConfigError;

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A key has a value of the wrong type.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No path.
    #[error("No \"path\" for block device.")]
    NoPath,
    /// A word that is no option.
    #[error("Invalid device option \"{0}\"")]
    Option(String),
    /// Not of the form L or L/P.
    #[error("Invalid sector size \"{0}\"")]
    SectorSize(String),
    /// Not powers of two from 512, logical not above physical.
    #[error(
        "Invalid sector size {logical}/{physical}: both must be powers of two, 512 or more, the first not above the second"
    )]
    SectorSizes {
        /// Logical sector size asked for.
        logical: u32,
        /// Physical sector size asked for.
        physical: u32,
    },
    /// Smaller than, or not a multiple of, the sectors of the device underneath.
    #[error("Sector size {logical} incompatible with underlying device sector size {device}")]
    DeviceSectorSize {
        /// Logical sector size asked for.
        logical: u32,
        /// The host device's.
        device: u32,
    },
    /// The file cannot be opened, neither for writing nor for reading.
    #[error("Could not open backing file: {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be examined.
    #[error("Could not stat backing file {}", path.display())]
    Stat {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("Could not open backing file: {}: it is {what}, not a regular file or block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// An image format this build cannot read.
    #[error("{}: {format} images are not available in this build yet; for a raw disk of that name say format=raw", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format.
        format: &'static str,
    },
    /// Another process has the image open.
    #[error("{}: in use by {holder}; two VMs that write to one disk destroy it. Stop the other, or say lock=off if sharing is safe", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// The host gives no thread.
    #[error("cannot start a thread for {}", path.display())]
    Thread {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
