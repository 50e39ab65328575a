//! What of a share survives a snapshot: what the guest has open, by path.

use std::sync::{Arc, Mutex, PoisonError};

use std::sync::atomic::Ordering;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::fids::{Fid, Kind, NewAttribute, OpenFile};
use super::files::flags_again;
use super::locks::{Owner, Request};
use super::node::Node;
use super::server::Server;
use super::wire::{MAX_MESSAGE, MIN_MESSAGE, is_name};

/// The state of a share: message size, fids, locks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShareState {
    msize: u32,
    fids: Vec<FidState>,
    locks: Vec<LockState>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct FidState {
    number: u32,
    user: u32,
    path: Vec<Vec<u8>>,
    kind: KindState,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum KindState {
    Path,
    Open { flags: u32 },
    Attribute(Vec<u8>),
    NewAttribute { name: Vec<u8>, size: u32, flags: u32, value: Vec<u8> },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct LockState {
    fid: u32,
    process: u32,
    client: Vec<u8>,
    write: bool,
    start: u64,
    end: u64,
}

/// Longest message size of a state that was never negotiated.
const UNSET: u32 = MAX_MESSAGE as u32;

impl Server {
    pub(super) fn state(&self) -> ShareState {
        let fids = self.fids.all().into_iter().map(|(number, fid)| FidState {
            number,
            user: fid.user,
            path: fid.node.path(),
            kind: match fid.kind {
                Kind::Path => KindState::Path,
                Kind::Open(open) => KindState::Open { flags: open.flags },
                Kind::Attribute(value) => KindState::Attribute(value.to_vec()),
                Kind::NewAttribute(new) => KindState::NewAttribute {
                    name: new.name.clone(),
                    size: new.size as u32,
                    flags: new.flags,
                    value: new.value.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                },
            },
        });
        let locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner).all().into_iter().map(|lock| LockState {
            fid: lock.fid,
            process: lock.owner.process,
            client: lock.owner.client,
            write: lock.write,
            start: lock.start,
            end: lock.end,
        });
        ShareState { msize: self.msize.load(Ordering::Relaxed), fids: fids.collect(), locks: locks.collect() }
    }

    /// Takes over a state, untrusted. Files that are not there any more are an error for the guest when it uses them.
    pub(super) fn restore(&self, state: ShareState) -> Result<(), String> {
        if !(MIN_MESSAGE..=UNSET).contains(&state.msize) {
            return Err(format!("messages of {} bytes", state.msize));
        }
        self.msize.store(state.msize, Ordering::Relaxed);
        for fid in state.fids {
            if let Some(name) = fid.path.iter().find(|name| !is_name(name)) {
                return Err(format!("{:?} is no name of a file", String::from_utf8_lossy(name)));
            }
            let node = fid.path.iter().fold(self.root.clone(), |node, name| Node::at(node, name));
            let kind = self.restored(&node, fid.kind)?;
            let number = fid.number;
            self.fids
                .insert(number, Fid { node, user: fid.user, kind })
                .map_err(|_| format!("fid {number} twice, or too many"))?;
        }
        state.locks.into_iter().try_for_each(|lock| self.restore_lock(lock))
    }

    fn restored(&self, node: &Arc<Node>, kind: KindState) -> Result<Kind, String> {
        Ok(match kind {
            KindState::Path => Kind::Path,
            KindState::Open { flags } => Kind::Open(OpenFile::new(self.reopen_saved(node, flags).ok(), flags)),
            KindState::Attribute(value) => Kind::Attribute(Arc::new(value)),
            KindState::NewAttribute { name, size, flags, value } => {
                let size = size as usize;
                if value.len() > size || size > MAX_MESSAGE || name.contains(&0) {
                    return Err("an attribute that is longer than itself".into());
                }
                Kind::NewAttribute(Arc::new(NewAttribute { name, size, flags, value: Mutex::new(value) }))
            }
        })
    }

    fn reopen_saved(&self, node: &Arc<Node>, flags: u32) -> Result<std::os::fd::OwnedFd, Errno> {
        let flags = flags_again(flags);
        if flags.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR) {
            self.writable()?;
        }
        self.reopen(node, flags)
    }

    fn restore_lock(&self, lock: LockState) -> Result<(), String> {
        let invalid = || format!("a lock on fid {}, bytes {} to {}", lock.fid, lock.start, lock.end);
        let fid = self.fids.get(lock.fid).map_err(|_| invalid())?;
        let len = lock.end.checked_sub(lock.start).ok_or_else(invalid)?;
        let len = if lock.end == u64::MAX { 0 } else { len + 1 };
        let owner = Owner { process: lock.process, client: lock.client.clone() };
        let request = Request::new(lock.fid, owner, u8::from(lock.write), lock.start, len).ok_or_else(invalid)?;
        // Locks on files that are gone, or that others hold by now, are lost.
        if let Ok(identity) = fid.node.identity() {
            self.locks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .set(identity, request, || self.reopen(&fid.node, rustix::fs::OFlags::RDWR).ok());
        }
        Ok(())
    }
}
