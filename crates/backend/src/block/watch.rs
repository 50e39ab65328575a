//! Notices that the host made an image larger or smaller: the file is looked at when another process has written and
//! closed it (as truncate(1), qemu-img and dd do) or touched it. Own writes cause no such events, so this costs nothing.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::inotify;

use super::disk::Shared;
use super::image::Image;

/// A thread that sleeps until something happens to a file.
pub(super) struct Watch {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the image at `path`. Without inotify there is no watch, and the size stays what it was.
    pub(super) fn start(path: &Path, image: Arc<dyn Image>, disk: Arc<Shared>, name: &str) -> Option<Self> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
        let wanted = inotify::WatchFlags::CLOSE_WRITE | inotify::WatchFlags::ATTRIB;
        inotify::add_watch(&events, path, wanted).ok()?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).ok()?);
        let theirs = stop.clone();
        let serve = move || watch(&events, &theirs, &*image, &disk);
        let thread = thread::Builder::new().name(format!("{name}-size")).spawn(serve).ok()?;
        Some(Self { stop, thread: Some(thread) })
    }
}

fn watch(events: &OwnedFd, stop: &OwnedFd, image: &dyn Image, disk: &Shared) {
    let mut bytes = [0; 4096];
    loop {
        let mut fds = [PollFd::new(events, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) => {}
        }
        // What happened does not matter, only that it is taken.
        if rustix::io::read(events, &mut bytes).is_ok()
            && let Ok(size) = image.current_size()
        {
            disk.set_size(size);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It fails only when the counter is full, and then the thread is told already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}
