//! Messages about attributes: mode, owner, size, times, and extended attributes.

use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::fids::{Fid, Kind, NewAttribute};
use super::node::{Node, qid};
use super::server::Server;
use super::wire::{NO_FID, NO_ID, Reader, Writer};

/// What the answer to `getattr` holds: everything up to the number of blocks.
const BASIC: u64 = 0x7ff;
/// Longest value of an extended attribute in bytes, as in Linux.
const MAX_VALUE: usize = 64 << 10;

/// What `setattr` is to change.
mod change {
    pub(super) const MODE: u32 = 1;
    pub(super) const USER: u32 = 2;
    pub(super) const GROUP: u32 = 4;
    pub(super) const SIZE: u32 = 8;
    pub(super) const ATIME: u32 = 0x10;
    pub(super) const MTIME: u32 = 0x20;
    pub(super) const CTIME: u32 = 0x40;
    pub(super) const ATIME_SET: u32 = 0x80;
    pub(super) const MTIME_SET: u32 = 0x100;
}

impl Server {
    pub(super) fn get_attributes(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, _wanted) = (r.u32()?, r.u64()?);
        let stat = self.fids.get(number)?.node.stat()?;
        w.u64(BASIC);
        w.qid(qid(&stat, self.root_identity));
        w.u32(stat.st_mode);
        w.u32(stat.st_uid);
        w.u32(stat.st_gid);
        #[allow(clippy::unnecessary_cast, reason = "the width of these differs between architectures")]
        let (links, block) = (stat.st_nlink as u64, stat.st_blksize as u64);
        for value in [links, stat.st_rdev, stat.st_size as u64, block, stat.st_blocks as u64] {
            w.u64(value);
        }
        for (seconds, nanoseconds) in [
            (stat.st_atime, stat.st_atime_nsec),
            (stat.st_mtime, stat.st_mtime_nsec),
            (stat.st_ctime, stat.st_ctime_nsec),
        ] {
            w.u64(seconds as u64);
            w.u64(nanoseconds);
        }
        // Time of birth, generation, version of the content: not known.
        (0..4).for_each(|_| w.u64(0));
        Ok(())
    }

    pub(super) fn set_attributes(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (number, valid, mode, user, group, size) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u64()?);
        let mut time =
            || -> Result<Timespec, Errno> { Ok(Timespec { tv_sec: r.u64()? as i64, tv_nsec: r.u64()? as _ }) };
        let (atime, mtime) = (time()?, time()?);
        self.writable()?;
        let node = self.fids.get(number)?.node;
        let has = |bits: u32| valid & bits != 0;
        if has(change::USER | change::GROUP | change::CTIME) {
            // Without user and group it sets the time of the last change, as asked.
            let pick = |bit, id| if has(bit) { id } else { NO_ID };
            self.chown(&node, pick(change::USER, user), pick(change::GROUP, group))?;
        }
        // After the owner, for a new owner takes set-user-id away.
        if has(change::MODE) {
            self.by_handle(&*node.handle()?, |handles, name| {
                rustix::fs::chmodat(handles, name, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
            })?;
        }
        if has(change::SIZE) {
            rustix::fs::ftruncate(self.reopen(&node, OFlags::WRONLY)?, size)?;
        }
        if has(change::ATIME | change::MTIME) {
            let pick = |change, set, time| match (has(change), has(set)) {
                (false, _) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT as _ },
                (true, false) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW as _ },
                (true, true) => time,
            };
            let times = Timestamps {
                last_access: pick(change::ATIME, change::ATIME_SET, atime),
                last_modification: pick(change::MTIME, change::MTIME_SET, mtime),
            };
            self.by_handle(&*node.handle()?, |handles, name| {
                rustix::fs::utimensat(handles, name, &times, AtFlags::empty())
            })?;
        }
        Ok(())
    }

    pub(super) fn read_attribute(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, new, name) = (r.u32()?, r.u32()?, r.string()?);
        let fid = self.fids.get(number)?;
        let value = self.with_path(&fid.node, |path| {
            let mut value = vec![0; MAX_VALUE];
            let len = if name.is_empty() {
                rustix::fs::listxattr(path, &mut value[..])?
            } else {
                rustix::fs::getxattr(path, name, &mut value[..])?
            };
            value.truncate(len);
            value.shrink_to_fit();
            Ok(value)
        })?;
        w.u64(value.len() as u64);
        let kind = Kind::Attribute(Arc::new(value));
        let reading = Fid { kind, ..fid };
        if new == number { self.fids.replace(number, reading) } else { self.fids.insert(new, reading) }
    }

    pub(super) fn write_attribute(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (number, name, size, flags) = (r.u32()?, r.string()?, r.u64()?, r.u32()?);
        self.writable()?;
        let fid = self.fids.get(number)?;
        if !matches!(fid.kind, Kind::Path) || name.is_empty() || number == NO_FID {
            return Err(Errno::INVAL);
        }
        let size = usize::try_from(size).ok().filter(|size| *size <= MAX_VALUE).ok_or(Errno::TOOBIG)?;
        let attribute = NewAttribute { name: name.to_vec(), size, flags, value: Mutex::default() };
        self.fids.replace(number, Fid { kind: Kind::NewAttribute(Arc::new(attribute)), ..fid })
    }

    /// Sets an attribute whose value is complete; one without value is taken away.
    pub(super) fn finish_attribute(&self, node: &Arc<Node>, attribute: &NewAttribute) -> Result<(), Errno> {
        self.writable()?;
        let value = attribute.value.lock().unwrap_or_else(PoisonError::into_inner);
        if value.len() != attribute.size {
            return Err(Errno::INVAL);
        }
        self.with_path(node, |path| {
            if value.is_empty() {
                return rustix::fs::removexattr(path, &attribute.name[..]);
            }
            let flags = XattrFlags::from_bits_truncate(attribute.flags);
            rustix::fs::setxattr(path, &attribute.name[..], &value, flags)
        })
    }

    /// Does something by a path that leads to the file behind a handle.
    fn with_path<T>(&self, node: &Arc<Node>, act: impl FnOnce(&str) -> Result<T, Errno>) -> Result<T, Errno> {
        self.by_handle(&*node.handle()?, |_, name| act(&format!("/proc/self/fd/{name}")))
    }
}
