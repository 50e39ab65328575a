//! Pseudo terminals and their modes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::Console;

/// A pseudo terminal: the test sits before it, the program behind it.
pub struct Terminal {
    front: OwnedFd,
    /// Held open, so that the modes survive the program.
    back: OwnedFd,
    path: PathBuf,
}

/// The modes of a terminal, comparable.
#[derive(Debug, PartialEq)]
pub struct Modes(String);

impl Terminal {
    /// Makes one, with the modes of a terminal that a person uses.
    ///
    /// # Panics
    /// The host has none.
    pub fn new() -> Self {
        let make = || -> rustix::io::Result<Self> {
            let front = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
            grantpt(&front)?;
            unlockpt(&front)?;
            let path: PathBuf = ptsname(&front, Vec::new())?.into_string().unwrap_or_default().into();
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            let back = rustix::fs::open(&path, flags, Mode::empty())?;
            Ok(Self { front, back, path })
        };
        make().expect("cannot make a pseudo terminal")
    }

    /// The path of the program's side.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Makes the terminal so large.
    ///
    /// # Panics
    /// It has no size.
    pub fn set_size(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.back, size).expect("a pseudo terminal has a size");
    }

    /// The program's side, for its stdin or stdout.
    pub(crate) fn stdio(&self) -> Stdio {
        Stdio::from(self.back.try_clone().expect("cannot duplicate a file descriptor"))
    }

    /// The side of the one who sits before it.
    ///
    /// # Panics
    /// The host has no more file descriptors.
    pub fn console(&self) -> Console {
        let front = || File::from(self.front.try_clone().expect("cannot duplicate a file descriptor"));
        Console::new(front(), front())
    }

    fn termios(&self) -> Termios {
        tcgetattr(&self.back).expect("a pseudo terminal has modes")
    }

    /// The modes as they are now.
    pub fn modes(&self) -> Modes {
        let termios = self.termios();
        Modes(format!(
            "{:?} {:?} {:?} {:?} {:?}",
            termios.input_modes,
            termios.output_modes,
            termios.control_modes,
            termios.local_modes,
            termios.special_codes
        ))
    }

    /// Whether the terminal passes every byte on as it is, and echoes none.
    pub fn is_raw(&self) -> bool {
        !self.termios().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}
