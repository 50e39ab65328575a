//! Waiting for host files, interruptible by other threads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

/// A flag that can be polled like a file: set by any thread, seen and cleared by the one that waits.
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Sets the flag.
    pub(crate) fn set(&self) {
        // Fails only when the counter is full: then the flag is set as it is.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Clears the flag.
    pub(crate) fn clear(&self) {
        // Fails only when the flag is clear already.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits, as long as it takes, until one of the files is ready; fills in what each is ready for.
pub(crate) fn wait(fds: &mut [PollFd<'_>]) {
    loop {
        match poll(fds, None) {
            Err(Errno::INTR) => {}
            Ok(_) => return,
            // Out of kernel memory: nothing is ready as far as we know; the caller comes back.
            Err(_) => return fds.iter_mut().for_each(PollFd::clear_revents),
        }
    }
}

/// Waits until `file` can be written (or has failed, which the next write tells); `false` when `stop` was set first.
pub(crate) fn writable(file: impl AsFd, stop: &Wake) -> bool {
    let mut fds = [PollFd::new(&file, PollFlags::OUT), PollFd::new(stop, PollFlags::IN)];
    wait(&mut fds);
    !fds[0].revents().is_empty() || fds[1].revents().is_empty()
}

/// Waits until `file` (if given) can be read or has failed, or until `wake` is set. Returns whether it was the file.
pub(crate) fn readable(file: Option<BorrowedFd<'_>>, wake: &Wake) -> bool {
    let wake = PollFd::new(wake, PollFlags::IN);
    match file {
        None => {
            wait(&mut [wake]);
            false
        }
        Some(file) => {
            let mut fds = [PollFd::from_borrowed_fd(file, PollFlags::IN), wake];
            wait(&mut fds);
            !fds[0].revents().is_empty()
        }
    }
}
