//! Why a kernel could not be loaded.

use std::fmt;
use std::io;
use std::path::PathBuf;

use memory::MemoryError;

/// Which of the files an error is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// `kernel.image`
    Kernel,
    /// `kernel.initrd`
    Initrd,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        })
    }
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The host cannot open the file.
    #[error("cannot open {role} {}", path.display())]
    Open {
        /// Kernel or initrd.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("{role} {} is not a regular file", path.display())]
    NotAFile {
        /// Kernel or initrd.
        role: Role,
        /// The file.
        path: PathBuf,
    },
    /// An initrd of no bytes.
    #[error("initrd {} is empty", path.display())]
    EmptyInitrd {
        /// The file.
        path: PathBuf,
    },
    /// The host cannot read the file.
    #[error("cannot read {role} {}", path.display())]
    Read {
        /// Kernel or initrd.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file is shorter than its own header says.
    #[error("kernel {} is truncated: its {part} ends at byte {end}, the file at byte {size}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What lies beyond its end.
        part: &'static str,
        /// Where that ends, in bytes from the start of the file.
        end: u64,
        /// Size of the file in bytes.
        size: u64,
    },
    /// No format that is known.
    #[error("kernel {} is {what}: give a Linux bzImage, an ELF file with a PVH note, or a multiboot kernel", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        what: &'static str,
    },
    /// A known format with contents that make no sense, or that ask for what is not there.
    #[error("kernel {} cannot be started: {why}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There is no RAM where it must go.
    #[error(
        "the {what} needs {size:#x} bytes at {start:#x}, and guest memory ends at {ram:#x}: give the machine more memory (-m)"
    )]
    DoesNotFit {
        /// What was to be placed.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
        /// Where it must go.
        start: u64,
        /// End of low memory.
        ram: u64,
    },
    /// It must go where something else already is.
    #[error("the {what} belongs at {start:#x}-{end:#x}, which is taken by the {other}")]
    Overlap {
        /// What was to be placed.
        what: &'static str,
        /// Its first byte.
        start: u64,
        /// The byte after its last.
        end: u64,
        /// What is there.
        other: &'static str,
    },
    /// No free memory is large enough.
    #[error(
        "no room for the {what} of {size} bytes beside the kernel in {ram} bytes of guest memory: give the machine more (-m)"
    )]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
        /// Guest memory in bytes.
        ram: u64,
    },
    /// The kernel would cut the command line off.
    #[error("the kernel command line is {len} bytes long, and this kernel takes at most {limit}")]
    CommandLine {
        /// Its length in bytes.
        len: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// An access to guest memory failed.
    #[error("cannot write the {what} to guest memory")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// The failed access.
        source: MemoryError,
    },
}
