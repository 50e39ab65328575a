//! What the guest's numbers for files stand for.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::node::{Handle, Node};

/// Fids of one share, at most.
const MAX_FIDS: usize = 1 << 20;

/// A file opened by the guest.
pub(super) struct OpenFile {
    /// None if it could not be opened again after a restore.
    pub(super) file: Option<Arc<Handle>>,
    /// Linux' open flags, as the guest gave them.
    pub(super) flags: u32,
    /// Held while the position in a folder is in use.
    pub(super) position: Mutex<()>,
}

impl OpenFile {
    pub(super) fn new(file: Option<OwnedFd>, flags: u32) -> Arc<Self> {
        Arc::new(Self { file: file.map(Handle::new), flags, position: Mutex::new(()) })
    }

    pub(super) fn file(&self) -> Result<&Handle, Errno> {
        self.file.as_deref().ok_or(Errno::STALE)
    }
}

/// An attribute that is being written: it is set when the fid is given up.
pub(super) struct NewAttribute {
    pub(super) name: Vec<u8>,
    pub(super) size: usize,
    pub(super) flags: u32,
    pub(super) value: Mutex<Vec<u8>>,
}

/// What can be done with a fid.
#[derive(Clone)]
pub(super) enum Kind {
    /// Walk, open, ask.
    Path,
    /// Read and write a file, or list a folder.
    Open(Arc<OpenFile>),
    /// Read the value of an extended attribute, or the list of names.
    Attribute(Arc<Vec<u8>>),
    /// Write one.
    NewAttribute(Arc<NewAttribute>),
}

/// A file as the guest knows it.
#[derive(Clone)]
pub(super) struct Fid {
    pub(super) node: Arc<Node>,
    /// The user that attached; new files will be theirs.
    pub(super) user: u32,
    pub(super) kind: Kind,
}

/// All of them.
#[derive(Default)]
pub(super) struct Fids(Mutex<HashMap<u32, Fid>>);

impl Fids {
    fn map(&self) -> MutexGuard<'_, HashMap<u32, Fid>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, number: u32) -> Result<Fid, Errno> {
        self.map().get(&number).cloned().ok_or(Errno::BADF)
    }

    /// A number that must be free.
    pub(super) fn insert(&self, number: u32, fid: Fid) -> Result<(), Errno> {
        let mut map = self.map();
        if map.contains_key(&number) || number == super::wire::NO_FID {
            return Err(Errno::BADF);
        }
        if map.len() >= MAX_FIDS {
            return Err(Errno::NFILE);
        }
        map.insert(number, fid);
        if Handle::too_many() {
            map.values().for_each(|fid| fid.node.relax());
        }
        Ok(())
    }

    /// Gives a number that is in use another meaning.
    pub(super) fn replace(&self, number: u32, fid: Fid) -> Result<(), Errno> {
        let mut map = self.map();
        let slot = map.get_mut(&number).ok_or(Errno::BADF)?;
        let old = std::mem::replace(slot, fid);
        drop(map);
        // A file is closed here, which may take a while.
        drop(old);
        Ok(())
    }

    pub(super) fn remove(&self, number: u32) -> Result<Fid, Errno> {
        self.map().remove(&number).ok_or(Errno::BADF)
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.map());
        drop(all);
    }

    /// All of them, by number.
    pub(super) fn all(&self) -> Vec<(u32, Fid)> {
        let mut all: Vec<_> = self.map().iter().map(|(number, fid)| (*number, fid.clone())).collect();
        all.sort_by_key(|(number, _)| *number);
        all
    }
}
