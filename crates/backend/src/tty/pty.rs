//! Pseudo terminals made for the occasion: `pty`, and FreeBSD's null-modem pairs.
//!
//! A pair `/dev/nmdm0A`, `/dev/nmdm0B` is a pseudo terminal and a symbolic link: who opens one name first makes the
//! terminal and a link by the other name, who opens the other name opens the terminal. The link lies in `/dev` where that
//! is permitted, otherwise in `bhyve` under `XDG_RUNTIME_DIR`; where neither is, the terminal's own name has to do.
//!
//! While nobody has the terminal open, output is dropped. The kernel says so on the master side (it is "hung up"), but
//! not when that ends; `inotify` does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::line::{ByteSource, Input, Parts, read_now};
use super::output::{ByteSink, WhenFull};
use super::wake::{Wake, wait, writable};
use super::{Tty, TtyError, path};

/// A new pseudo terminal, with a link to it if one is named.
pub(super) fn open(link: Option<&Path>) -> Result<Tty, TtyError> {
    let pair = Pair::new().map_err(|e| TtyError::host("make", "a pseudo terminal", e))?;
    let link = match link {
        Some(at) => Some(Link::make(&pair.path, at).map_err(|e| TtyError::host("make a link at", at.display(), e))?),
        None => None,
    };
    pair.start(link)
}

/// One side of a null-modem pair, `/dev/nmdmNAMEA` or `/dev/nmdmNAMEB`.
pub(super) fn open_null_modem(ours: &Path) -> Result<Tty, TtyError> {
    let places = places(ours);
    if let Some(there) = places.iter().find(|place| leads_to_terminal(place)) {
        return path::open(there);
    }
    let pair = Pair::new().map_err(|e| TtyError::host("make a pseudo terminal for", ours.display(), e))?;
    let links = places.iter().filter_map(|place| Link::make(&pair.path, &other_side(place)?).ok());
    let link = links.into_iter().next();
    pair.start(link)
}

/// Where a null-modem device may be.
fn places(name: &Path) -> Vec<PathBuf> {
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(|folder| Path::new(&folder).join("bhyve"));
    let own = own.and_then(|folder| Some(folder.join(name.file_name()?)));
    [Some(name.to_owned()), own].into_iter().flatten().collect()
}

fn leads_to_terminal(place: &Path) -> bool {
    std::fs::read_link(place).is_ok_and(|target| target.starts_with("/dev/pts")) && place.exists()
}

/// The name of the pair's other side.
fn other_side(place: &Path) -> Option<PathBuf> {
    let name = place.file_name()?.to_str()?;
    let (start, side) = name.split_at_checked(name.len().checked_sub(1)?)?;
    Some(place.with_file_name(format!("{start}{}", if side == "A" { "B" } else { "A" })))
}

/// A symbolic link to a terminal; removed when dropped, unless it has become another one.
struct Link {
    at: PathBuf,
    target: PathBuf,
}

impl Link {
    /// Makes it, in the place of one that is there.
    fn make(target: &Path, at: &Path) -> io::Result<Self> {
        if let Some(folder) = at.parent() {
            std::fs::create_dir_all(folder)?;
        }
        if std::fs::symlink_metadata(at).is_ok_and(|meta| !meta.is_symlink()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let fresh = at.with_extension(format!("{}.new", std::process::id()));
        std::os::unix::fs::symlink(target, &fresh)?;
        std::fs::rename(&fresh, at)?;
        Ok(Self { at: at.to_owned(), target: target.to_owned() })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::fs::read_link(&self.at).is_ok_and(|target| target == self.target) {
            // One that stays behind is replaced by the next.
            let _ = std::fs::remove_file(&self.at);
        }
    }
}

/// A new pseudo terminal: our side, and the path of the other.
struct Pair {
    master: OwnedFd,
    path: PathBuf,
    opened: OwnedFd,
}

impl Pair {
    fn new() -> rustix::io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path: PathBuf = ptsname(&master, Vec::new())?.into_string().map_err(|_| rustix::io::Errno::INVAL)?.into();
        rustix::io::ioctl_fionbio(&master, true)?;
        let opened = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&opened, &path, WatchFlags::OPEN)?;
        // Raw, whoever opens it; and hung up from the start, because it was open once.
        let slave = rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let mut modes = tcgetattr(&slave)?;
        modes.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &modes)?;
        Ok(Self { master, path, opened })
    }

    fn start(self, link: Option<Link>) -> Result<Tty, TtyError> {
        let master = Arc::new(self.master);
        let peer = link.as_ref().map_or(self.path, |link| link.at.clone());
        let source = PtySource { master: master.clone(), opened: self.opened, _link: link };
        let mut parts = Parts::new(Some(Box::new(source)), Box::new(PtySink(master)), WhenFull::Drop);
        parts.peer = Some(peer);
        Tty::start(parts)
    }
}

/// Whether nobody has the other side open.
fn is_hung_up(master: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(master, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok()
        && fds[0].revents().contains(PollFlags::HUP)
        && !fds[0].revents().contains(PollFlags::IN)
}

struct PtySource {
    master: Arc<OwnedFd>,
    /// Says when the other side is opened.
    opened: OwnedFd,
    _link: Option<Link>,
}

impl ByteSource for PtySource {
    fn read(&mut self, buffer: &mut [u8], want: bool, wake: &Wake) -> Input {
        // Openings before the question do not matter, those after it end the wait.
        while rustix::io::read(&self.opened, &mut [0u8; 256]).is_ok() {}
        let is_open = !is_hung_up(&self.master);
        let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
        if !is_open {
            fds.push(PollFd::new(&self.opened, PollFlags::IN));
        } else if want {
            fds.push(PollFd::new(&*self.master, PollFlags::IN));
        }
        wait(&mut fds);
        if is_open && fds.get(1).is_some_and(|fd| fd.revents().contains(PollFlags::IN)) {
            return match read_now(self.master.as_fd(), buffer) {
                Input::End => Input::Nothing,
                other => other,
            };
        }
        Input::Nothing
    }
}

struct PtySink(Arc<OwnedFd>);

impl ByteSink for PtySink {
    fn write(&mut self, bytes: &[u8], stop: &Wake) -> io::Result<usize> {
        if is_hung_up(&self.0) {
            return Ok(bytes.len());
        }
        if !writable(self.0.as_fd(), stop) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match rustix::io::write(&*self.0, bytes) {
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            // It was closed just now.
            Err(_) => Ok(bytes.len()),
        }
    }
}
