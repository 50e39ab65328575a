//! Messages about open files: open, create, read, write, list, sync, lock.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::fids::{Fid, Kind, NewAttribute, OpenFile};
use super::locks::{Answer, Owner, Request};
use super::node::{Handle, Node, qid, qid_path};
use super::server::Server;
use super::wire::{QID_LEN, Qid, Reader, Writer};

/// Open flags of the protocol, which are Linux' on x86.
mod flag {
    pub(super) const ACCESS: u32 = 3;
    pub(super) const WRITE_ONLY: u32 = 1;
    pub(super) const READ_WRITE: u32 = 2;
    pub(super) const EXCLUSIVE: u32 = 0o200;
    pub(super) const TRUNCATE: u32 = 0o1000;
    pub(super) const APPEND: u32 = 0o2000;
    pub(super) const DATA_SYNC: u32 = 0o10000;
    pub(super) const DIRECTORY: u32 = 0o200000;
    pub(super) const SYNC: u32 = 0o4010000;
}

/// Bytes of a folder's entries that are read from the host at a time.
const ENTRIES: usize = 32 << 10;

/// The host's flags for those of the guest. What is about the guest's own caches and descriptors stays with it.
fn host_flags(flags: u32) -> OFlags {
    let mut host = match flags & flag::ACCESS {
        flag::WRITE_ONLY => OFlags::WRONLY,
        flag::READ_WRITE => OFlags::RDWR,
        _ => OFlags::RDONLY,
    };
    for (bit, with) in [
        (flag::TRUNCATE, OFlags::TRUNC),
        (flag::APPEND, OFlags::APPEND),
        (flag::DATA_SYNC, OFlags::DSYNC),
        (flag::SYNC, OFlags::SYNC),
        (flag::DIRECTORY, OFlags::DIRECTORY),
    ] {
        if flags & bit == bit {
            host |= with;
        }
    }
    host
}

fn would_write(flags: u32) -> bool {
    flags & flag::ACCESS != 0 || flags & flag::TRUNCATE != 0
}

/// How a file is opened again after a restore.
pub(super) fn flags_again(flags: u32) -> OFlags {
    host_flags(flags & !flag::TRUNCATE)
}

impl Server {
    pub(super) fn open_file(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, flags) = (r.u32()?, r.u32()?);
        let fid = self.fids.get(number)?;
        if !matches!(fid.kind, Kind::Path) {
            return Err(Errno::INVAL);
        }
        if would_write(flags) {
            self.writable()?;
        }
        let file = self.reopen(&fid.node, host_flags(flags))?;
        self.opened(w, number, fid, file, flags)
    }

    fn opened(&self, w: &mut Writer<'_>, number: u32, fid: Fid, file: OwnedFd, flags: u32) -> Result<(), Errno> {
        let stat = rustix::fs::fstat(&file)?;
        self.fids.replace(number, Fid { kind: Kind::Open(OpenFile::new(Some(file), flags)), ..fid })?;
        w.qid(qid(&stat, self.root_identity));
        // No opinion on the size of reads and writes.
        w.u32(0);
        Ok(())
    }

    pub(super) fn create_file(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, name, flags, mode, group) = (r.u32()?, r.name()?, r.u32()?, r.u32()?, r.u32()?);
        self.writable()?;
        let fid = self.fids.get(number)?;
        if !matches!(fid.kind, Kind::Path) {
            return Err(Errno::INVAL);
        }
        let fresh = host_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let (node, file) = match rustix::fs::openat(&*fid.node.handle()?, name, fresh, mode) {
            Ok(file) => {
                let node = self.node_of(&fid.node, name, &file)?;
                self.give(&node, fid.user, group)?;
                (node, file)
            }
            // Somebody was faster. What is there may be anything, so it is opened as carefully as by an open.
            Err(Errno::EXIST) if flags & flag::EXCLUSIVE == 0 => {
                let node = fid.node.find(name)?;
                let file = self.reopen(&node, host_flags(flags))?;
                (node, file)
            }
            Err(why) => return Err(why),
        };
        self.opened(w, number, Fid { node, ..fid }, file, flags)
    }

    /// The node of a file that has just been made in a folder.
    fn node_of(&self, folder: &Arc<Node>, name: &[u8], file: &OwnedFd) -> Result<Arc<Node>, Errno> {
        let file = Handle::new(rustix::io::fcntl_dupfd_cloexec(file, 3)?);
        let handle = self.by_handle(&file, |folder, name| {
            rustix::fs::openat(folder, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        })?;
        Node::opened(folder.clone(), name, Handle::new(handle))
    }

    pub(super) fn read(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
        let fid = self.fids.get(number)?;
        let count = (count as usize).min(w.room().saturating_sub(4));
        w.u32(0);
        let start = w.out.len();
        match &fid.kind {
            Kind::Open(open) => {
                w.out.resize(start + count, 0);
                let read = rustix::io::pread(open.file()?, &mut w.out[start..], offset)?;
                w.out.truncate(start + read);
            }
            Kind::Attribute(value) => {
                let rest = usize::try_from(offset).ok().and_then(|offset| value.get(offset..)).unwrap_or_default();
                w.bytes(&rest[..rest.len().min(count)]);
            }
            _ => return Err(Errno::BADF),
        }
        let read = (w.out.len() - start) as u32;
        w.out[start - 4..start].copy_from_slice(&read.to_le_bytes());
        Ok(())
    }

    pub(super) fn write(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
        let bytes = r.bytes(count as usize)?;
        let fid = self.fids.get(number)?;
        let written = match &fid.kind {
            Kind::Open(open) => {
                self.writable()?;
                rustix::io::pwrite(open.file()?, bytes, offset)?
            }
            Kind::NewAttribute(attribute) => append(attribute, offset, bytes)?,
            _ => return Err(Errno::BADF),
        };
        w.u32(written as u32);
        Ok(())
    }

    pub(super) fn read_folder(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
        let fid = self.fids.get(number)?;
        let Kind::Open(open) = &fid.kind else { return Err(Errno::BADF) };
        let room = (count as usize).min(w.room().saturating_sub(4));
        w.u32(0);
        let start = w.out.len();
        self.entries(&fid.node, open, offset, w, room)?;
        let bytes = w.out.len() - start;
        w.out[start - 4..start].copy_from_slice(&(bytes as u32).to_le_bytes());
        Ok(())
    }

    /// Entries of a folder from `offset` (0, or what an entry said), as many as fit into `room` bytes.
    fn entries(
        &self,
        node: &Arc<Node>,
        open: &OpenFile,
        offset: u64,
        w: &mut Writer<'_>,
        room: usize,
    ) -> Result<(), Errno> {
        let _position = open.position.lock().unwrap_or_else(PoisonError::into_inner);
        let file = open.file()?;
        let device = rustix::fs::fstat(file)?.st_dev;
        let at_root = node.place().is_none();
        rustix::fs::seek(file, SeekFrom::Start(offset & i64::MAX as u64))?;
        let mut buffer = vec![MaybeUninit::uninit(); ENTRIES.min(room.max(512))];
        let mut entries = RawDir::new(file, &mut buffer);
        let mut left = room;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let needed = QID_LEN + 8 + 1 + 2 + name.len();
            if needed > left {
                // A name that never fits would look like the end of the folder.
                return if left == room { Err(Errno::INVAL) } else { Ok(()) };
            }
            left -= needed;
            let path = match name {
                // What is above the share is nobody's business.
                b".." if at_root => qid_path(self.root_identity.0, self.root_identity.1, self.root_identity),
                _ => qid_path(device, entry.ino(), self.root_identity),
            };
            let (kind, number) = entry_kind(entry.file_type());
            w.qid(Qid { kind, path });
            w.u64(entry.next_entry_cookie());
            w.u8(number);
            w.string(name)?;
        }
        Ok(())
    }

    pub(super) fn sync(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (number, data_only) = (r.u32()?, r.u32().unwrap_or(0));
        let fid = self.fids.get(number)?;
        let Kind::Open(open) = &fid.kind else { return Err(Errno::BADF) };
        if data_only == 0 { rustix::fs::fsync(open.file()?) } else { rustix::fs::fdatasync(open.file()?) }
    }

    fn lock_request(&self, r: &mut Reader<'_>, flags: bool) -> Result<(Fid, Request), Errno> {
        let (number, kind) = (r.u32()?, r.u8()?);
        if flags {
            // A client that wants to wait asks again.
            r.u32()?;
        }
        let (start, len, process, client) = (r.u64()?, r.u64()?, r.u32()?, r.string()?);
        let fid = self.fids.get(number)?;
        if !matches!(fid.kind, Kind::Open(_)) {
            return Err(Errno::BADF);
        }
        let owner = Owner { process, client: client.to_vec() };
        Ok((fid, Request::new(number, owner, kind, start, len).ok_or(Errno::INVAL)?))
    }

    pub(super) fn lock(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (fid, request) = self.lock_request(r, true)?;
        let answer =
            self.locks.lock().unwrap_or_else(PoisonError::into_inner).set(fid.node.identity()?, request, || {
                self.reopen(&fid.node, OFlags::RDWR).or_else(|_| self.reopen(&fid.node, OFlags::RDONLY)).ok()
            });
        w.u8(match answer {
            Answer::Done => 0,
            Answer::Blocked => 1,
            Answer::Failed => 2,
        });
        Ok(())
    }

    pub(super) fn test_lock(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (fid, request) = self.lock_request(r, false)?;
        let found = self.locks.lock().unwrap_or_else(PoisonError::into_inner).test(fid.node.identity()?, &request);
        match found {
            Some(lock) => {
                w.u8(u8::from(lock.write));
                w.u64(lock.start);
                w.u64(if lock.end == u64::MAX { 0 } else { (lock.end - lock.start).saturating_add(1) });
                w.u32(lock.owner.process);
                w.string(&lock.owner.client)
            }
            None => {
                w.u8(2);
                w.u64(request.start);
                w.u64(request.len());
                w.u32(request.owner.process);
                w.string(&request.owner.client)
            }
        }
    }

    /// Takes the entry of a file away, if it is where the guest found it.
    pub(super) fn remove_node(&self, node: &Arc<Node>) -> Result<(), Errno> {
        self.writable()?;
        let (parent, name) = node.place().ok_or(Errno::BUSY)?;
        node.is_at(&parent, &name)?;
        let is_folder = FileType::from_raw_mode(node.stat()?.st_mode) == FileType::Directory;
        let flags = if is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&*parent.handle()?, name, flags)
    }
}

/// Adds to an attribute's value; it is written from start to end.
fn append(attribute: &NewAttribute, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let mut value = attribute.value.lock().unwrap_or_else(PoisonError::into_inner);
    if offset != value.len() as u64 || value.len() + bytes.len() > attribute.size {
        return Err(Errno::NOSPC);
    }
    value.extend_from_slice(bytes);
    Ok(bytes.len())
}

/// The kind of an entry as in a qid, and as in Linux' directory entries.
fn entry_kind(kind: FileType) -> (u8, u8) {
    match kind {
        FileType::Fifo => (0, 1),
        FileType::CharacterDevice => (0, 2),
        FileType::Directory => (0x80, 4),
        FileType::BlockDevice => (0, 6),
        FileType::RegularFile => (0, 8),
        FileType::Symlink => (0x02, 10),
        FileType::Socket => (0, 12),
        FileType::Unknown => (0, 0),
    }
}
