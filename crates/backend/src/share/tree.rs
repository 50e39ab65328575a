//! Messages that change folders: make, link, rename, unlink.

use std::sync::{Arc, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::node::{Node, qid};
use super::server::Server;
use super::wire::{Reader, Writer};

/// `AT_REMOVEDIR` in the protocol.
const REMOVE_FOLDER: u32 = 0x200;

impl Server {
    /// Answers with the identity of what has just been made, after giving it to its owner.
    fn made(
        &self,
        w: &mut Writer<'_>,
        folder: &Arc<Node>,
        name: &[u8],
        (user, group): (u32, u32),
    ) -> Result<(), Errno> {
        let node = folder.find(name)?;
        self.give(&node, user, group)?;
        w.qid(qid(&node.stat()?, self.root_identity));
        Ok(())
    }

    pub(super) fn make_folder(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, name, mode, group) = (r.u32()?, r.name()?, r.u32()?, r.u32()?);
        self.writable()?;
        let fid = self.fids.get(number)?;
        rustix::fs::mkdirat(&*fid.node.handle()?, name, Mode::from_raw_mode(mode & 0o7777))?;
        self.made(w, &fid.node, name, (fid.user, group))
    }

    pub(super) fn make_symlink(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, name, target, group) = (r.u32()?, r.name()?, r.string()?, r.u32()?);
        self.writable()?;
        let fid = self.fids.get(number)?;
        rustix::fs::symlinkat(target, &*fid.node.handle()?, name)?;
        self.made(w, &fid.node, name, (fid.user, group))
    }

    pub(super) fn make_node(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let (number, name, mode, major, minor, group) = (r.u32()?, r.name()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        self.writable()?;
        let kind = match FileType::from_raw_mode(mode) {
            FileType::Unknown if mode & 0o170000 == 0 => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            // What overlay file systems mark deleted files with; it is no device.
            kind @ FileType::CharacterDevice if (major, minor) == (0, 0) => kind,
            // A device of the host, by the name of a file that others on the host may reach.
            _ => return Err(Errno::PERM),
        };
        let fid = self.fids.get(number)?;
        rustix::fs::mknodat(&*fid.node.handle()?, name, kind, Mode::from_raw_mode(mode & 0o7777), 0)?;
        self.made(w, &fid.node, name, (fid.user, group))
    }

    pub(super) fn read_link(&self, r: &mut Reader<'_>, w: &mut Writer<'_>) -> Result<(), Errno> {
        let fid = self.fids.get(r.u32()?)?;
        let target = rustix::fs::readlinkat(&*fid.node.handle()?, "", Vec::new()).map_err(|why| match why {
            Errno::NOENT => Errno::INVAL,
            other => other,
        })?;
        w.string(target.as_bytes())
    }

    pub(super) fn link(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (folder, number, name) = (r.u32()?, r.u32()?, r.name()?);
        self.writable()?;
        let (folder, fid) = (self.fids.get(folder)?, self.fids.get(number)?);
        let to = folder.node.handle()?;
        self.by_handle(&*fid.node.handle()?, |handles, handle| {
            rustix::fs::linkat(handles, handle, &*to, name, AtFlags::SYMLINK_FOLLOW)
        })
    }

    pub(super) fn rename(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (number, folder, name) = (r.u32()?, r.u32()?, r.name()?);
        self.writable()?;
        let (fid, folder) = (self.fids.get(number)?, self.fids.get(folder)?);
        let (parent, old) = fid.node.place().ok_or(Errno::BUSY)?;
        fid.node.is_at(&parent, &old)?;
        self.move_entry((&parent, &old), (&folder.node, name))
    }

    pub(super) fn rename_at(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (from, old, to, new) = (r.u32()?, r.name()?, r.u32()?, r.name()?);
        self.writable()?;
        let (from, to) = (self.fids.get(from)?, self.fids.get(to)?);
        self.move_entry((&from.node, old), (&to.node, new))
    }

    fn move_entry(&self, from: (&Arc<Node>, &[u8]), to: (&Arc<Node>, &[u8])) -> Result<(), Errno> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known_as(from.0, from.1)?;
        rustix::fs::renameat(&*from.0.handle()?, from.1, &*to.0.handle()?, to.1)?;
        known.into_iter().for_each(|node| node.moved(to.0.clone(), to.1));
        Ok(())
    }

    /// Those who know an entry by its place, to be told of a new one.
    fn known_as(&self, folder: &Arc<Node>, name: &[u8]) -> Result<Vec<Arc<Node>>, Errno> {
        let (file, folder) = (folder.find(name)?.identity()?, folder.identity()?);
        let mut known = Vec::new();
        for (_, fid) in self.fids.all() {
            let mut at = Some(fid.node);
            while let Some(node) = at {
                let place = node.place();
                if let Some((parent, last)) = &place
                    && last == name
                    && parent.identity() == Ok(folder)
                    && node.identity() == Ok(file)
                {
                    known.push(node);
                }
                at = place.map(|(parent, _)| parent);
            }
        }
        Ok(known)
    }

    pub(super) fn unlink_at(&self, r: &mut Reader<'_>) -> Result<(), Errno> {
        let (number, name, flags) = (r.u32()?, r.name()?, r.u32()?);
        self.writable()?;
        let fid = self.fids.get(number)?;
        let flags = if flags & REMOVE_FOLDER == 0 { AtFlags::empty() } else { AtFlags::REMOVEDIR };
        rustix::fs::unlinkat(&*fid.node.handle()?, name, flags)
    }
}
