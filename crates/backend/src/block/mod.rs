//! Disks: the block layer under every emulated disk.
//!
//! | module | what it does |
//! |---|---|
//! | [`options`] | the options of a disk and their keys |
//! | [`disk`] | [`Disk`]: what devices submit their requests to |
//! | [`request`] | requests: operations on guest memory, checked, and the trait of what does them |
//! | [`ring`], [`pool`] | who does them: io_uring on raw images, or a few threads on any image |
//! | [`throttle`] | rate limits in front of either |
//! | [`image`] | what a disk image can do, as the threads see it |
//! | [`raw`], [`qcow2`] | images: files and block devices byte for byte; qcow2 |
//! | [`nbd`] | disks behind a server |
//! | [`lock`] | who may open an image at the same time |
//! | [`watch`] | notices that the host made an image larger |
//! | [`buffers`] | guest memory as the kernel's vectored I/O wants it |
//!
//! Guest data goes straight between guest memory and the host's file, without copies. An error reaches the guest as an
//! error, never as silent success; a flush is over when the data is on stable storage.

pub mod buffers;
pub mod disk;
pub mod image;
pub mod lock;
pub mod nbd;
pub mod options;
mod pool;
pub mod qcow2;
#[cfg(test)]
mod qcow2_tests;
pub mod raw;
pub mod request;
mod ring;
mod sys;
#[cfg(test)]
mod tests;
pub mod throttle;
mod watch;

pub use buffers::HostBuffers;
pub use disk::Disk;
pub use image::{Geometry, Image};
pub use nbd::NbdUri;
pub use options::{BlockOptions, Format, SectorSize};
pub use request::{Done, IoError, Operation, Request, Settled};
pub use throttle::Limits;

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
    /// A qcow2 file that cannot be used.
    #[error("{}: cannot use this qcow2 image: {why}", path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// Image formats need a file.
    #[error("format=qcow2 is for files; let the NBD server open the qcow2 image and serve its contents")]
    FormatOverNbd,
    /// The URI of an NBD server is wrong.
    #[error(
        "Invalid NBD server \"{uri}\": {why}; the forms are nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH"
    )]
    NbdUri {
        /// The URI.
        uri: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The NBD server cannot be used.
    #[error("cannot use NBD server {uri}")]
    Nbd {
        /// The server.
        uri: String,
        /// Why.
        source: io::Error,
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
