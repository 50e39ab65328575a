//! Raw mode of a terminal, undone on every way out of the process.
//!
//! A terminal left in raw mode is useless to the person before it, so three ways lead back: dropping the
//! [`RawTerminal`], and, where nothing is dropped, [`restore_terminals`] from a signal handler or panic hook.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use rustix::io::Errno;
use rustix::termios::{ControlModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// What restoring one terminal takes. Never freed, because a signal handler may be reading it at any moment.
struct Saved {
    fd: RawFd,
    termios: Termios,
    /// Whether the terminal is still to be restored; whoever clears it does it.
    raw: AtomicBool,
    /// The one made raw before, or null.
    next: AtomicPtr<Saved>,
}

/// All terminals ever made raw, latest first.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

impl Saved {
    fn restore(&self) {
        if !self.raw.swap(false, Ordering::AcqRel) {
            return;
        }
        // SAFETY: `raw` was set, so the RawTerminal that owns the file had not begun to close it. Should it close it
        // right now, the call fails or sets the modes of the process's own terminals: memory is not touched.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        // Nothing can be done about a terminal that went away.
        let _ = tcsetattr(fd, OptionalActions::Now, &self.termios);
    }
}

/// A terminal in raw mode; dropping it puts the terminal back.
pub struct RawTerminal {
    saved: &'static Saved,
    // Held so that the descriptor in `saved` stays valid.
    _fd: OwnedFd,
}

impl RawTerminal {
    /// Puts the terminal `fd` into raw mode, ignoring modem control lines.
    ///
    /// # Errors
    /// `fd` is not a terminal, or has gone away.
    pub fn enter(fd: OwnedFd) -> Result<Self, Errno> {
        let termios = tcgetattr(&fd)?;
        let mut raw = termios.clone();
        raw.make_raw();
        raw.control_modes |= ControlModes::CLOCAL;
        let saved: &'static Saved = Box::leak(Box::new(Saved {
            fd: fd.as_raw_fd(),
            termios,
            raw: AtomicBool::new(true),
            next: AtomicPtr::new(SAVED.load(Ordering::Acquire)),
        }));
        let new = ptr::from_ref(saved).cast_mut();
        while let Err(head) =
            SAVED.compare_exchange(saved.next.load(Ordering::Relaxed), new, Ordering::AcqRel, Ordering::Acquire)
        {
            saved.next.store(head, Ordering::Relaxed);
        }
        let terminal = Self { saved, _fd: fd };
        tcsetattr(&terminal._fd, OptionalActions::Now, &raw)?;
        Ok(terminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.saved.restore();
    }
}

/// Puts every terminal that a [`RawTerminal`] made raw back into its former mode. Async-signal-safe: it only reads
/// memory that is never freed and makes system calls. For signal handlers and panic hooks, right before the process ends.
pub fn restore_terminals() {
    restore(|_| true);
}

fn restore(which: impl Fn(&Saved) -> bool) {
    let mut next = SAVED.load(Ordering::Acquire);
    // SAFETY: the list holds only leaked boxes, complete before they were put on it and only read afterwards.
    while let Some(saved) = unsafe { next.as_ref() } {
        if which(saved) {
            saved.restore();
        }
        next = saved.next.load(Ordering::Relaxed);
    }
}

/// [`restore_terminals`] for this terminal alone: the others belong to tests that run at the same time.
#[cfg(test)]
pub(super) fn restore_terminal_for_test(terminal: &RawTerminal) {
    restore(|saved| ptr::eq(saved, terminal.saved));
}
