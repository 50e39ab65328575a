//! Shared folders: a server of the 9P2000.L protocol, as Linux' v9fs and others speak it.
//!
//! | module | what it does |
//! |---|---|
//! | [`Share`] (`session`) | takes messages, answers them on threads of its own, cancels and flushes |
//! | `server` | the messages: versions, attaching, walking, and who answers what |
//! | `files`, `tree`, `attributes` | the messages by what they act on: open files, folders, attributes |
//! | `node` | files of the share as handles that cannot leave it |
//! | `fids` | what the guest's numbers stand for |
//! | `locks` | advisory locks |
//! | `state` | what survives a snapshot |
//! | `wire` | numbers and strings of messages |
//! | `sys` | system calls that no safe wrapper offers |
//!
//! **The share is a cage.** A file is reached only from the share's own folder, one name at a time, each opened as a
//! handle (`O_PATH`) that does not follow symbolic links; what is done to a file is done through its handle. The guest
//! follows symbolic links itself. A name never contains a slash, and `..` is answered from the way by which the guest
//! came, not by the file system: so nothing that the guest or others rename meanwhile leads outside. Only regular files
//! and folders are ever opened; devices, FIFOs and sockets are names for the guest to use within itself.
//!
//! **Who owns what.** Everything is done with the rights of this process. If those are root's, new files belong to the user
//! and group that the guest names, and `chown` works; otherwise they belong to the user who runs the VM, and a `chown` to
//! somebody else fails as it does for any program of that user. Device nodes cannot be made.

mod attributes;
mod fids;
mod files;
mod locks;
mod node;
mod server;
mod session;
mod state;
mod sys;
#[cfg(test)]
mod tests;
mod tree;
mod wire;

use std::io;
use std::path::PathBuf;

pub use session::{Message, Share};
pub use state::ShareState;
pub use wire::{HEADER, MAX_MESSAGE};

/// What is shared, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShareOptions {
    /// The folder, an absolute path.
    pub path: PathBuf,
    /// Whether everything that would change it fails with `EROFS`.
    pub read_only: bool,
}

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A relative path.
    #[error("cannot share {path}: the path must be absolute")]
    NotAbsolute {
        /// The path.
        path: PathBuf,
    },
    /// Not a folder.
    #[error("cannot share {path}: it is not a folder")]
    NotFolder {
        /// The path.
        path: PathBuf,
    },
    /// The host refused something.
    #[error("cannot {doing} to share {path}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}
