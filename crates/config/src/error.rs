//! What can be wrong with a configuration.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::exit::{self, Exit};
use crate::tree::TreeError;

/// A configuration that cannot be used. The text names the key or file, what is wrong with it and what is accepted.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The tree refused a value.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A key that must be set is not.
    #[error("{path} is not set")]
    Missing {
        /// The key.
        path: String,
    },
    /// Not a boolean.
    #[error("Invalid value {value} for boolean variable {path}: say true, on, yes or 1, or else false, off, no or 0")]
    Bool {
        /// The key.
        path: String,
        /// Its value, expanded.
        value: String,
    },
    /// Not a number, not a size, not one of the words allowed.
    #[error("Invalid value for {path}: '{value}': {reason}")]
    Value {
        /// The key.
        path: String,
        /// Its value, expanded.
        value: String,
        /// What is accepted.
        reason: String,
    },
    /// `memory.size` or the size of a NUMA domain.
    #[error("invalid memsize '{value}' for {path}: {reason}")]
    MemorySize {
        /// The key.
        path: String,
        /// Its value, expanded.
        value: String,
        /// What is accepted.
        reason: String,
    },
    /// The product of sockets, cores and threads is not the number of vCPUs.
    #[error("Topology ({sockets} sockets, {cores} cores, {threads} threads) does not match {cpus} vCPUs")]
    Topology {
        /// Sockets, as given or derived.
        sockets: u16,
        /// Cores of a socket.
        cores: u16,
        /// Threads of a core.
        threads: u16,
        /// vCPUs asked for.
        cpus: u16,
    },
    /// More vCPUs than a topology can hold.
    #[error("Computed number of vCPUs too high: {cpus}")]
    TooManyCpus {
        /// The product of sockets, cores and threads.
        cpus: u64,
    },
    /// NUMA domains that do not fit together.
    #[error("{0}")]
    Numa(String),
    /// A PCI function that cannot be made.
    #[error("pci slot {bus}:{slot}:{func}: {reason}")]
    Pci {
        /// Bus number.
        bus: u8,
        /// Slot number.
        slot: u8,
        /// Function number.
        func: u8,
        /// What is wrong.
        reason: String,
    },
    /// A configuration file that could not be read.
    #[error("Failed to open configuration file {}", path.display())]
    FileOpen {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of a configuration file that is no option.
    #[error("{} line {line}: invalid config option '{text}'", path.display())]
    FileLine {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// A line of a configuration file whose key does not fit the tree.
    #[error("{} line {line}", path.display())]
    FileTree {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// Why the key does not fit.
        source: TreeError,
    },
}

impl ConfigError {
    /// The code with which bhyve(8) ends for this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::MemorySize { .. } | Self::Numa(_) => exit::EX_USAGE,
            _ => exit::ERROR,
        }
    }
}

impl From<ConfigError> for Exit {
    fn from(error: ConfigError) -> Self {
        match error {
            // Other programs look for this line without the program's name.
            ConfigError::Pci { .. } => Self::with_stderr(error.exit_code(), format!("{error}\n")),
            _ => Self::from_error(error.exit_code(), &error),
        }
    }
}
