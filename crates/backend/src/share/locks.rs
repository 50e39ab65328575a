//! Advisory locks (`lock`, `getlock`) with POSIX meaning: they belong to an owner, an owner's locks never conflict with
//! each other, and a range can be unlocked in parts.
//!
//! The guest's kernel sees to conflicts inside the guest. For conflicts with others on the host the sum of all owners'
//! locks is held on the file itself, by one descriptor for each file.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::node::Identity;
use super::sys::{self, HostLock};

/// Locks of one share, at most. More are refused.
const MAX_LOCKS: usize = 1024;

/// Who holds a lock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Owner {
    pub(super) process: u32,
    pub(super) client: Vec<u8>,
}

/// A lock on bytes `start` to `end`, both included.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Lock {
    /// The fid by which it was taken, and with which it ends.
    pub(super) fid: u32,
    pub(super) owner: Owner,
    pub(super) write: bool,
    pub(super) start: u64,
    pub(super) end: u64,
}

/// What is asked for.
pub(super) struct Request {
    fid: u32,
    pub(super) owner: Owner,
    kind: HostLock,
    pub(super) start: u64,
    end: u64,
}

/// What comes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    Done,
    Blocked,
    Failed,
}

impl Request {
    /// `kind` as in the protocol: 0 read, 1 write, 2 unlock. A length of 0 reaches to the end.
    pub(super) fn new(fid: u32, owner: Owner, kind: u8, start: u64, len: u64) -> Option<Self> {
        let kind = match kind {
            0 => HostLock::Read,
            1 => HostLock::Write,
            2 => HostLock::Unlock,
            _ => return None,
        };
        let end = if len == 0 { u64::MAX } else { start.saturating_add(len - 1) };
        Some(Self { fid, owner, kind, start, end })
    }

    /// The length as in the protocol.
    pub(super) fn len(&self) -> u64 {
        if self.end == u64::MAX { 0 } else { (self.end - self.start).saturating_add(1) }
    }

    fn conflicts(&self, lock: &Lock) -> bool {
        self.kind != HostLock::Unlock
            && lock.owner != self.owner
            && lock.start <= self.end
            && self.start <= lock.end
            && (lock.write || self.kind == HostLock::Write)
    }
}

#[derive(Default)]
struct File {
    locks: Vec<Lock>,
    /// Holds the host's locks.
    host: Option<OwnedFd>,
}

/// All locks of a share.
#[derive(Default)]
pub(super) struct Locks(HashMap<Identity, File>);

impl Locks {
    /// Sets or takes away a lock. `open` opens the file for the host's locks.
    pub(super) fn set(&mut self, file: Identity, request: Request, open: impl FnOnce() -> Option<OwnedFd>) -> Answer {
        let total: usize = self.0.values().map(|file| file.locks.len()).sum();
        if request.kind == HostLock::Unlock && !self.0.contains_key(&file) {
            return Answer::Done;
        }
        if request.kind != HostLock::Unlock && total >= MAX_LOCKS {
            return Answer::Failed;
        }
        let entry = self.0.entry(file).or_default();
        let answer = if entry.locks.iter().any(|lock| request.conflicts(lock)) {
            Answer::Blocked
        } else {
            if entry.host.is_none() {
                entry.host = open();
            }
            entry.change(&request)
        };
        if entry.locks.is_empty() {
            self.0.remove(&file);
        }
        answer
    }

    /// A lock that is in the way of one.
    pub(super) fn test(&self, file: Identity, request: &Request) -> Option<Lock> {
        let entry = self.0.get(&file)?;
        if let Some(lock) = entry.locks.iter().find(|lock| request.conflicts(lock)) {
            return Some(lock.clone());
        }
        let (kind, start, end) =
            sys::test_lock(entry.host.as_ref()?.as_fd(), request.kind, request.start, request.end)?;
        let owner = Owner { process: 0, client: b"host".to_vec() };
        Some(Lock { fid: request.fid, owner, write: kind == HostLock::Write, start, end })
    }

    /// A fid was given up.
    pub(super) fn release(&mut self, fid: u32) {
        self.0.retain(|_, file| {
            let ended: Vec<_> = file.locks.iter().filter(|lock| lock.fid == fid).cloned().collect();
            for lock in ended {
                let request =
                    Request { fid, owner: lock.owner, kind: HostLock::Unlock, start: lock.start, end: lock.end };
                file.change(&request);
            }
            !file.locks.is_empty()
        });
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// All locks, in a fixed order.
    pub(super) fn all(&self) -> Vec<Lock> {
        let mut all: Vec<_> = self.0.values().flat_map(|file| file.locks.iter().cloned()).collect();
        all.sort_by(|a, b| {
            (a.fid, a.start, &a.owner.client, a.owner.process).cmp(&(b.fid, b.start, &b.owner.client, b.owner.process))
        });
        all
    }
}

impl File {
    /// Puts the owner's locks in the range into the state asked for, here and on the host.
    fn change(&mut self, request: &Request) -> Answer {
        let mut locks = Vec::with_capacity(self.locks.len() + 2);
        for lock in &self.locks {
            if lock.owner != request.owner || lock.end < request.start || request.end < lock.start {
                locks.push(lock.clone());
                continue;
            }
            if lock.start < request.start {
                locks.push(Lock { end: request.start - 1, ..lock.clone() });
            }
            if lock.end > request.end {
                locks.push(Lock { start: request.end + 1, ..lock.clone() });
            }
        }
        if request.kind != HostLock::Unlock {
            let write = request.kind == HostLock::Write;
            let (start, end) = (request.start, request.end);
            locks.push(Lock { fid: request.fid, owner: request.owner.clone(), write, start, end });
        }
        if let Some(host) = &self.host {
            for (start, end) in pieces(&locks, request.start, request.end) {
                let result = sys::set_lock(host.as_fd(), level(&locks, start), start, end);
                if matches!(result, Err(Errno::AGAIN | Errno::ACCESS)) {
                    self.put_back(request);
                    return Answer::Blocked;
                }
            }
        }
        self.locks = locks;
        Answer::Done
    }

    /// Undoes a change that others on the host stood in the way of.
    fn put_back(&self, request: &Request) {
        let Some(host) = &self.host else { return };
        for (start, end) in pieces(&self.locks, request.start, request.end) {
            // Less than was held a moment ago, so nobody can be in the way.
            let _ = sys::set_lock(host.as_fd(), level(&self.locks, start), start, end);
        }
    }
}

/// What all owners together hold at a byte.
fn level(locks: &[Lock], at: u64) -> HostLock {
    let mut level = HostLock::Unlock;
    for lock in locks.iter().filter(|lock| lock.start <= at && at <= lock.end) {
        if lock.write {
            return HostLock::Write;
        }
        level = HostLock::Read;
    }
    level
}

/// `start` to `end`, cut wherever a lock begins or ends.
fn pieces(locks: &[Lock], start: u64, end: u64) -> Vec<(u64, u64)> {
    let edges = locks.iter().flat_map(|lock| [Some(lock.start), lock.end.checked_add(1)]).flatten();
    let mut edges: Vec<_> = edges.filter(|edge| start < *edge && *edge <= end).chain([start]).collect();
    edges.sort_unstable();
    edges.dedup();
    let ends = edges.iter().skip(1).map(|next| next - 1).chain([end]).collect::<Vec<_>>();
    edges.into_iter().zip(ends).collect()
}
