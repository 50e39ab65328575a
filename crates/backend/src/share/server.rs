//! The messages: versions, attaching, walking, and who answers what.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::fids::{Fid, Fids, Kind};
use super::locks::Locks;
use super::node::{Handle, Identity, Node, qid};
use super::wire::{MAX_MESSAGE, MIN_MESSAGE, NO_FID, NO_ID, Reader, Writer, header, message};
use super::{ShareError, ShareOptions};

const VERSION: &[u8] = b"9P2000.L";
/// Names in one walk, at most (the protocol's MAXWELEM).
const MAX_NAMES: u16 = 16;

/// A share between two resets: what its clients have agreed and opened.
pub(super) struct Server {
    pub(super) root: Arc<Node>,
    pub(super) root_identity: Identity,
    /// `/proc/self/fd`, where files are opened by their handles.
    handles: OwnedFd,
    pub(super) read_only: bool,
    /// Whether this process may give files away.
    may_chown: bool,
    pub(super) msize: AtomicU32,
    pub(super) fids: Fids,
    pub(super) locks: Mutex<Locks>,
    /// Held by whoever moves files about.
    pub(super) moving: Mutex<()>,
}

impl Server {
    pub(super) fn open(options: &ShareOptions) -> Result<Self, ShareError> {
        let path = || options.path.clone();
        if !options.path.is_absolute() {
            return Err(ShareError::NotAbsolute { path: path() });
        }
        super::node::handle_limit();
        let failed = |doing| move |source: Errno| ShareError::Host { doing, path: path(), source: source.into() };
        // Symbolic links to the folder itself are the host's and followed.
        let folder = rustix::fs::open(&options.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let folder = folder.map_err(failed("open the folder"))?;
        let stat = rustix::fs::fstat(&folder).map_err(failed("look at the folder"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(ShareError::NotFolder { path: path() });
        }
        let handles = rustix::fs::open("/proc/self/fd", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        Ok(Self {
            root: Node::root(folder).map_err(failed("look at the folder"))?,
            root_identity: super::node::identity(&stat),
            handles: handles.map_err(failed("open /proc/self/fd"))?,
            read_only: options.read_only,
            may_chown: rustix::process::geteuid().is_root(),
            msize: AtomicU32::new(MAX_MESSAGE as u32),
            fids: Fids::default(),
            locks: Mutex::default(),
            moving: Mutex::default(),
        })
    }

    /// Answers one message. `room` is what the client has for the answer, in bytes.
    pub(super) fn answer(&self, request: &[u8], reply: &mut Vec<u8>, room: usize) {
        let limit = room.min(self.msize.load(Ordering::Relaxed) as usize);
        let mut writer = Writer::new(reply, limit);
        let (kind, tag, result) = match header(request) {
            Some((size, kind, tag)) => {
                let body = request.get(super::HEADER..size as usize);
                (
                    kind,
                    tag,
                    body.ok_or(Errno::PROTO).and_then(|body| self.dispatch(kind, &mut Reader(body), &mut writer)),
                )
            }
            None => (0, 0xffff, Err(Errno::PROTO)),
        };
        writer.finish(kind, tag, result);
    }

    fn dispatch(&self, kind: u8, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        match kind {
            message::VERSION => self.version(r, w),
            message::ATTACH => self.attach(r, w),
            message::WALK => self.walk(r, w),
            message::CLUNK => self.clunk(r),
            message::REMOVE => self.remove(r),
            message::STATFS => self.statfs(r, w),
            message::LOPEN => self.open_file(r, w),
            message::LCREATE => self.create_file(r, w),
            message::READ => self.read(r, w),
            message::WRITE => self.write(r, w),
            message::READDIR => self.read_folder(r, w),
            message::FSYNC => self.sync(r),
            message::LOCK => self.lock(r, w),
            message::GETLOCK => self.test_lock(r, w),
            message::GETATTR => self.get_attributes(r, w),
            message::SETATTR => self.set_attributes(r),
            message::XATTRWALK => self.read_attribute(r, w),
            message::XATTRCREATE => self.write_attribute(r),
            message::READLINK => self.read_link(r, w),
            message::SYMLINK => self.make_symlink(r, w),
            message::MKNOD => self.make_node(r, w),
            message::MKDIR => self.make_folder(r, w),
            message::LINK => self.link(r),
            message::RENAME => self.rename(r),
            message::RENAMEAT => self.rename_at(r),
            message::UNLINKAT => self.unlink_at(r),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn version(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (msize, version) = (r.u32()?, r.string()?);
        self.fids.clear();
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).clear();
        if msize < MIN_MESSAGE {
            return Err(Errno::MSGSIZE);
        }
        let msize = msize.min(MAX_MESSAGE as u32);
        self.msize.store(msize, Ordering::Relaxed);
        w.u32(msize);
        w.string(if version == VERSION { VERSION } else { b"unknown" })
    }

    fn attach(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, auth, _name, place, user) = (r.u32()?, r.u32()?, r.string()?, r.string()?, r.u32()?);
        if auth != NO_FID {
            return Err(Errno::INVAL);
        }
        // What some clients call the whole share.
        let mut node = self.root.clone();
        for name in place.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            node = if super::wire::is_name(name) { node.find(name)? } else { return Err(Errno::INVAL) };
        }
        let stat = node.stat()?;
        self.fids.insert(number, Fid { node, user, kind: Kind::Path })?;
        w.qid(qid(&stat, self.root_identity));
        Ok(())
    }

    fn walk(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, new, count) = (r.u32()?, r.u32()?, r.u16()?);
        let fid = self.fids.get(number)?;
        if count > MAX_NAMES || !matches!(fid.kind, Kind::Path) && count > 0 {
            return Err(Errno::INVAL);
        }
        let names: Vec<_> = (0..count).map(|_| r.string()).collect::<Result<_, _>>()?;
        let mut node = fid.node;
        let mut qids = Vec::new();
        for name in names {
            match self.step(&node, name).and_then(|next| Ok((next.stat()?, next))) {
                Ok((stat, next)) => {
                    qids.push(qid(&stat, self.root_identity));
                    node = next;
                }
                // The client is told how far it got.
                Err(why) if qids.is_empty() => return Err(why),
                Err(_) => break,
            }
        }
        if qids.len() == usize::from(count) {
            let fid = Fid { node, user: fid.user, kind: Kind::Path };
            if new == number { self.fids.replace(number, fid)? } else { self.fids.insert(new, fid)? }
        }
        w.u16(qids.len() as u16);
        qids.into_iter().for_each(|qid| w.qid(qid));
        Ok(())
    }

    /// One step of a walk.
    fn step(&self, from: &Arc<Node>, name: &[u8]) -> Result<Arc<Node>, Errno> {
        match name {
            b"." => Ok(from.clone()),
            // The parent of the share's folder is the share's folder.
            b".." => Ok(from.place().map_or_else(|| from.clone(), |(parent, _)| parent)),
            name if super::wire::is_name(name) => from.find(name),
            _ => Err(Errno::INVAL),
        }
    }

    fn clunk(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let number = r.u32()?;
        let fid = self.fids.remove(number)?;
        self.release(number);
        match fid.kind {
            Kind::NewAttribute(attribute) => self.finish_attribute(&fid.node, &attribute),
            _ => Ok(()),
        }
    }

    fn remove(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let number = r.u32()?;
        // The fid is given up, whatever comes of the removal.
        let fid = self.fids.remove(number)?;
        self.release(number);
        self.remove_node(&fid.node)
    }

    /// Locks taken through a fid end with it.
    fn release(&self, number: u32) {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).release(number);
    }

    fn statfs(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let fid = self.fids.get(r.u32()?)?;
        let handle = fid.node.handle()?;
        let stat = rustix::fs::fstatfs(&*handle)?;
        let limits = rustix::fs::fstatvfs(&*handle)?;
        w.u32(stat.f_type as u32);
        w.u32(stat.f_bsize as u32);
        for value in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree, limits.f_fsid] {
            w.u64(value);
        }
        w.u32(limits.f_namemax as u32);
        Ok(())
    }

    /// Fails where nothing may be changed.
    pub(super) fn writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Opens the file behind a handle. Only regular files and folders: what a device or FIFO does when it is opened is
    /// not for guests to start.
    pub(super) fn reopen(&self, node: &Arc<Node>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let handle = node.handle()?;
        match FileType::from_raw_mode(rustix::fs::fstat(&*handle)?.st_mode) {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::OPNOTSUPP),
        }
        self.by_handle(&handle, |folder, name| {
            rustix::fs::openat(folder, name, flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())
        })
    }

    /// Does something by the name that a handle has under `/proc/self/fd`, which leads to that very file.
    pub(super) fn by_handle<T>(
        &self,
        handle: &Handle,
        act: impl FnOnce(&OwnedFd, &str) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        act(&self.handles, &handle.as_fd().as_raw_fd().to_string())
    }

    /// Gives a new file to the user and group that the guest names, where this process may.
    pub(super) fn give(&self, node: &Arc<Node>, user: u32, group: u32) -> Result<(), Errno> {
        if !self.may_chown {
            return Ok(());
        }
        self.chown(node, user, group)
    }

    /// Changes user and group; [`NO_ID`] leaves one as it is.
    pub(super) fn chown(&self, node: &Arc<Node>, user: u32, group: u32) -> Result<(), Errno> {
        let user = (user != NO_ID).then(|| rustix::fs::Uid::from_raw(user));
        let group = (group != NO_ID).then(|| rustix::fs::Gid::from_raw(group));
        rustix::fs::chownat(&*node.handle()?, "", user, group, rustix::fs::AtFlags::EMPTY_PATH)
    }
}
