//! Files of the share as handles that cannot leave it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::wire::Qid;

/// A handle to one file: it says which, and gives no access by itself.
const HANDLE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Which file: device and inode.
pub(super) type Identity = (u64, u64);

/// Handles open in this process, of all shares.
static HANDLES: AtomicUsize = AtomicUsize::new(0);

/// Handles of all shares that may be open before some are closed: a part of what the process may have.
pub(super) fn handle_limit() -> usize {
    static LIMIT: OnceLock<usize> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit.current = limit.maximum;
        // What cannot be raised is used as it is.
        let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
        let now = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        now.map_or(1 << 16, |now| usize::try_from(now / 4).unwrap_or(1 << 16).clamp(32, 1 << 18))
    })
}

/// An open handle or file, counted.
pub(super) struct Handle(OwnedFd);

impl Handle {
    pub(super) fn new(fd: OwnedFd) -> Arc<Self> {
        HANDLES.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self(fd))
    }

    /// Whether there are so many that some should be closed.
    pub(super) fn too_many() -> bool {
        HANDLES.load(Ordering::Relaxed) > handle_limit()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        HANDLES.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

struct Inside {
    /// Where it was found: the folder and the name there. None for the share itself.
    place: Option<(Arc<Node>, Vec<u8>)>,
    /// Its handle. Closed when there are too many; found again by its place then.
    handle: Option<Arc<Handle>>,
    /// Which file it is, once it has been opened.
    identity: Option<Identity>,
}

/// A file that the guest has found.
pub(super) struct Node(Mutex<Inside>);

impl Node {
    /// The shared folder.
    pub(super) fn root(fd: OwnedFd) -> Result<Arc<Self>, Errno> {
        let identity = Some(identity(&rustix::fs::fstat(&fd)?));
        Ok(Arc::new(Self(Mutex::new(Inside { place: None, handle: Some(Handle::new(fd)), identity }))))
    }

    /// A file at a place, not opened yet.
    pub(super) fn at(parent: Arc<Self>, name: &[u8]) -> Arc<Self> {
        let place = Some((parent, name.to_vec()));
        Arc::new(Self(Mutex::new(Inside { place, handle: None, identity: None })))
    }

    /// A file that has just been opened.
    pub(super) fn opened(parent: Arc<Self>, name: &[u8], handle: Arc<Handle>) -> Result<Arc<Self>, Errno> {
        let identity = Some(identity(&rustix::fs::fstat(&*handle)?));
        let place = Some((parent, name.to_vec()));
        Ok(Arc::new(Self(Mutex::new(Inside { place, handle: Some(handle), identity }))))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds `name` in this folder: the name of an entry, checked by the caller.
    pub(super) fn find(self: &Arc<Self>, name: &[u8]) -> Result<Arc<Self>, Errno> {
        let handle = open_handle(&*self.handle()?, name)?;
        Self::opened(self.clone(), name, handle)
    }

    /// The folder it was found in; the share itself has none.
    pub(super) fn place(&self) -> Option<(Arc<Self>, Vec<u8>)> {
        self.inside().place.clone()
    }

    /// It has been given another place. Callers do this one at a time, so that no circle can come about.
    pub(super) fn moved(&self, parent: Arc<Self>, name: &[u8]) {
        // Not below itself, or it would never be freed; the file system refuses such moves anyway.
        if !parent.is_below(self) {
            let mut inside = self.inside();
            if inside.place.is_some() {
                let old = inside.place.replace((parent, name.to_vec()));
                drop(inside);
                drop(old);
            }
        }
    }

    fn is_below(self: &Arc<Self>, other: &Self) -> bool {
        let mut at = Some(self.clone());
        while let Some(node) = at {
            if std::ptr::eq(Arc::as_ptr(&node), other) {
                return true;
            }
            at = node.place().map(|(parent, _)| parent);
        }
        false
    }

    /// Its handle, opened anew if it was closed.
    pub(super) fn handle(self: &Arc<Self>) -> Result<Arc<Handle>, Errno> {
        // Up to the first folder that is open, then down again: paths can be longer than the stack.
        let mut closed = Vec::new();
        let mut at = self.clone();
        let mut handle = loop {
            let inside = at.inside();
            if let Some(handle) = &inside.handle {
                break handle.clone();
            }
            let (parent, name) = inside.place.clone().ok_or(Errno::STALE)?;
            drop(inside);
            closed.push((std::mem::replace(&mut at, parent), name));
        };
        for (node, name) in closed.into_iter().rev() {
            handle = open_handle(&handle, &name)?;
            let found = identity(&rustix::fs::fstat(&*handle)?);
            let mut inside = node.inside();
            if *inside.identity.get_or_insert(found) != found {
                return Err(Errno::STALE);
            }
            inside.handle = Some(handle.clone());
        }
        Ok(handle)
    }

    /// Closes its handle if nothing uses it and it can be found again.
    pub(super) fn relax(&self) {
        let mut inside = self.inside();
        if inside.place.is_some() && inside.handle.as_ref().is_some_and(|handle| Arc::strong_count(handle) == 1) {
            inside.handle = None;
        }
    }

    /// What the host says of it.
    pub(super) fn stat(self: &Arc<Self>) -> Result<Stat, Errno> {
        rustix::fs::fstat(&*self.handle()?)
    }

    /// Which file it is.
    pub(super) fn identity(self: &Arc<Self>) -> Result<Identity, Errno> {
        let known = self.inside().identity;
        known.map_or_else(|| Ok(identity(&self.stat()?)), Ok)
    }

    /// Whether the entry at its place is still this file.
    pub(super) fn is_at(self: &Arc<Self>, parent: &Arc<Self>, name: &[u8]) -> Result<(), Errno> {
        let there = rustix::fs::statat(&*parent.handle()?, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if identity(&there) == self.identity()? { Ok(()) } else { Err(Errno::STALE) }
    }

    /// The names from the share's folder to here.
    pub(super) fn path(self: &Arc<Self>) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = self.clone();
        while let Some((parent, name)) = at.place() {
            names.push(name);
            at = parent;
        }
        names.reverse();
        names
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // One after the other: a path can be longer than the stack.
        let mut place = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).place.take();
        while let Some((parent, _)) = place {
            place = Arc::into_inner(parent)
                .and_then(|mut parent| parent.0.get_mut().unwrap_or_else(PoisonError::into_inner).place.take());
        }
    }
}

/// Opens a handle to an entry. The name is one component, so it cannot lead away; where the host knows how, it is told
/// to see to that as well.
fn open_handle(folder: &Handle, name: &[u8]) -> Result<Arc<Handle>, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let fd = match rustix::fs::openat2(folder, name, HANDLE, Mode::empty(), resolve) {
        // Kernels before 5.6, or a sandbox that does not know the call.
        Err(Errno::NOSYS | Errno::PERM) => rustix::fs::openat(folder, name, HANDLE, Mode::empty())?,
        other => other?,
    };
    Ok(Handle::new(fd))
}

pub(super) fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// The protocol's identity of a file. Files of other file systems below the share's folder get numbers of another kind,
/// for inode numbers are unique in one file system only.
pub(super) fn qid(stat: &Stat, root: Identity) -> Qid {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => 0x80,
        FileType::Symlink => 0x02,
        _ => 0,
    };
    Qid { kind, path: qid_path(stat.st_dev, stat.st_ino, root) }
}

pub(super) fn qid_path(device: u64, inode: u64, root: Identity) -> u64 {
    let other = device ^ root.0;
    inode ^ (other.wrapping_mul(0x9e37_79b9_7f4a_7c15) & 0xffff_0000_0000_0000)
}
