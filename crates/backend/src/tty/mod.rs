//! Serial lines' host ends: the terminal, a tty or pseudo terminal, a TCP port, a UNIX socket, a file.
//!
//! | module     | what it does                                                              |
//! |------------|---------------------------------------------------------------------------|
//! | `spec`     | reads the text behind `com1,` ([`TtySpec::parse`])                        |
//! | `line`     | [`Tty`]: the two threads between a device and a host file                 |
//! | `output`   | the queue in front of the writer thread                                   |
//! | `stdio`    | standard input and output                                                 |
//! | `path`     | ttys, pseudo terminals and other character devices                        |
//! | `socket`   | a listening socket, TCP or UNIX, with one client at a time                |
//! | `pty`      | pseudo terminals made for the occasion, and null-modem pairs              |
//! | `file`     | output appended to a file                                                 |
//! | `raw`      | [`RawTerminal`]: raw mode, undone on every way out                        |
//! | `wake`     | waiting for host files and for each other                                 |
//!
//! Both directions have flow control. Output is queued and never blocks a vCPU; when the queue of a
//! lossless backend is full, [`SerialBackend::send`] takes less than it was given and the device is told
//! when there is room. Input is handed over as far as the device has room; the rest stays with the
//! host until the device asks for it by [`SerialBackend::resume_input`]. Nothing polls.

mod file;
mod line;
mod output;
mod path;
mod pty;
mod raw;
mod socket;
mod spec;
mod stdio;
pub(crate) mod wake;

use std::io;
use std::sync::Weak;

pub use line::Tty;
pub use raw::{RawTerminal, restore_terminals};
pub(crate) use socket::{UnixSocket, is_dead_socket};
pub use spec::TtySpec;
pub(crate) use wake::{Wake, readable, wait};

/// The device's side of a serial line. Called on the backend's threads.
pub trait SerialDevice: Send + Sync {
    /// Takes input from the host and returns how many of `bytes` it had room for. After taking fewer than all, the
    /// device calls [`SerialBackend::resume_input`] once it has room again.
    fn receive(&self, bytes: &[u8]) -> usize;
    /// The backend has room for output again, after [`SerialBackend::send`] took less than it was given.
    fn output_ready(&self);
    /// A client connected to a listening backend, or left it.
    fn client(&self, here: bool) {
        let _ = here;
    }
    /// The terminal has this size now. Told once at the start, if there is a terminal.
    fn resized(&self, columns: u16, rows: u16) {
        let _ = (columns, rows);
    }
}

/// The host's side of a serial line.
///
/// No call blocks, and none calls back into the device, so a device may call while it holds its own lock.
pub trait SerialBackend: Send + Sync {
    /// Takes output from the guest and returns how many of `bytes` are dealt with: queued, or dropped where
    /// nobody listens. The device keeps the others until [`SerialDevice::output_ready`].
    fn send(&self, bytes: &[u8]) -> usize;
    /// Says where input goes; input flows from now on.
    fn attach(&self, device: Weak<dyn SerialDevice>);
    /// The device has room for input again.
    fn resume_input(&self);
}

/// Why a serial backend could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TtyError {
    /// Nothing was given.
    #[error(
        "a serial port needs a backend: stdio, pty, the path of a tty such as /dev/pts/3, /dev/nmdm0A, tcp=[ADDR:]PORT, \
         unix:PATH, or file:PATH"
    )]
    Empty,
    /// The text is none of the known forms.
    #[error(
        "\"{spec}\" is not a serial backend: use stdio, pty, the path of a tty such as /dev/pts/3, /dev/nmdm0A, \
         tcp=[ADDR:]PORT, unix:PATH, or file:PATH"
    )]
    Unknown {
        /// What was given.
        spec: String,
    },
    /// A null-modem device without a side.
    #[error("\"{path}\" is no null-modem device: the name ends in A or B, as in /dev/nmdm0A")]
    NullModem {
        /// What was given.
        path: String,
    },
    /// `tcp=` without a usable port.
    #[error("\"{spec}\": \"{port}\" is not a TCP port (0 to 65535)")]
    Port {
        /// What was given.
        spec: String,
        /// The part that should be a port.
        port: String,
    },
    /// `tcp=` with an address that is none.
    #[error(
        "\"{spec}\": \"{address}\" is not an IP address; write tcp=PORT, tcp=192.0.2.1:PORT or tcp=[2001:db8::1]:PORT"
    )]
    Address {
        /// What was given.
        spec: String,
        /// The part that should be an address.
        address: String,
    },
    /// An IPv6 zone that is no network interface of this host.
    #[error("\"{spec}\": this host has no network interface \"{zone}\"")]
    Zone {
        /// What was given.
        spec: String,
        /// The name of the interface.
        zone: String,
        /// What the system says.
        source: io::Error,
    },
    /// A second port wants the terminal.
    #[error("stdio is already used by another serial port; only one can have it")]
    StdioTaken,
    /// A path that is no character device.
    #[error("{path} is not a terminal or other character device; to write output to a file use file:{path}")]
    NotTerminal {
        /// The path.
        path: String,
    },
    /// The host refused something.
    #[error("cannot {doing} {what}")]
    Host {
        /// What was being done ("open", "listen on").
        doing: &'static str,
        /// To what.
        what: String,
        /// What the system says.
        source: io::Error,
    },
}

impl TtyError {
    fn host(doing: &'static str, what: impl ToString, source: impl Into<io::Error>) -> Self {
        Self::Host { doing, what: what.to_string(), source: source.into() }
    }
}

#[cfg(test)]
mod tests;
