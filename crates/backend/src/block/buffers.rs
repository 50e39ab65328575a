//! Guest memory as the kernel's vectored I/O wants it.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use memory::{GuestMemory, MemoryError};
use platform::GuestRange;

use super::sys::{self, Direction, IoVec};

/// A scatter list of guest memory, checked, as host addresses. The guest may change the contents at any time.
pub struct HostBuffers {
    memory: GuestMemory,
    ranges: Vec<GuestRange>,
    pieces: Vec<IoVec>,
    len: u64,
}

// SAFETY: the addresses lie in guest RAM, which `memory` keeps mapped, and which any thread may access raw.
unsafe impl Send for HostBuffers {}
// SAFETY: as above.
unsafe impl Sync for HostBuffers {}

impl HostBuffers {
    /// Checks `ranges`.
    ///
    /// # Errors
    /// One of them is not wholly in RAM.
    pub fn new(memory: &GuestMemory, ranges: Vec<GuestRange>) -> Result<Self, MemoryError> {
        let mut len = 0u64;
        let mut pieces = Vec::with_capacity(ranges.len());
        for range in ranges.iter().filter(|range| range.size > 0) {
            let base = memory.host_address(range.start.0, range.size)?;
            pieces.push(IoVec { iov_base: base.cast(), iov_len: range.size as usize });
            len = len.saturating_add(range.size);
        }
        Ok(Self { memory: memory.clone(), ranges, pieces, len })
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes from `start` on, as far as it exists.
    pub(super) fn part(&self, start: u64, len: u64) -> Result<Self, MemoryError> {
        let (mut skip, mut left) = (start, len);
        let mut ranges = Vec::new();
        for range in &self.ranges {
            let skipped = skip.min(range.size);
            skip -= skipped;
            let here = left.min(range.size - skipped);
            left -= here;
            if here > 0 {
                // Both are inside a range that was checked.
                ranges.push(GuestRange::new(range.start.0.wrapping_add(skipped), here));
            }
        }
        Self::new(&self.memory, ranges)
    }

    /// The pieces as the kernel takes them. They stay where they are as long as these buffers live.
    pub(crate) fn pieces(&self) -> &[IoVec] {
        &self.pieces
    }

    /// Tells that the pieces were written: code that the guest may have had there is no longer what was decoded.
    pub(crate) fn note_written(&self) {
        for range in &self.ranges {
            self.memory.pages().note_write(range.start.0, range.size);
        }
    }

    /// Copies the contents, as far as there is room.
    pub(super) fn copy_to(&self, mut bytes: &mut [u8]) -> Result<(), MemoryError> {
        for range in &self.ranges {
            let len = bytes.len().min(range.size as usize);
            let (here, rest) = std::mem::take(&mut bytes).split_at_mut(len);
            self.memory.read(range.start.0, here)?;
            bytes = rest;
        }
        Ok(())
    }

    /// The pieces as slices, for libraries that hand them to the kernel.
    pub(super) fn io_slices(&self) -> Vec<IoSlice<'_>> {
        // SAFETY: the pieces lie in guest RAM, which `memory` keeps mapped. This process holds no reference to them
        // otherwise; the guest's changes come through raw accesses and are as if a device made them.
        let slice = |piece: &IoVec| unsafe { std::slice::from_raw_parts(piece.iov_base.cast(), piece.iov_len) };
        self.pieces.iter().map(|piece| IoSlice::new(slice(piece))).collect()
    }

    /// The pieces as slices to be filled. Follow up with [`note_written`](Self::note_written).
    pub(super) fn io_slices_mut(&self) -> Vec<IoSliceMut<'_>> {
        // SAFETY: as above; a guest that lists one piece twice gets either data.
        let slice = |piece: &IoVec| unsafe { std::slice::from_raw_parts_mut(piece.iov_base.cast(), piece.iov_len) };
        self.pieces.iter().map(|piece| IoSliceMut::new(slice(piece))).collect()
    }

    /// Fills the buffers from `file` at `offset`.
    ///
    /// # Errors
    /// What the kernel says, or that the file ends before. The buffers may be partly filled.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let result = self.transfer(file, Direction::Read(offset));
        self.note_written();
        result
    }

    /// Fills the buffers from `file` at `offset` if the host's page cache has everything; returns whether it had.
    ///
    /// # Errors
    /// What the kernel says, also that the file system cannot tell. The buffers may be partly filled.
    pub(super) fn read_cached(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<bool> {
        match self.step(file, Direction::ReadCached(offset), &self.pieces) {
            Ok(moved) => {
                self.note_written();
                Ok(moved == self.len)
            }
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(why) => Err(why),
        }
    }

    /// Fills the buffers with what was received already, and from a stream with the rest; returns how much it took of
    /// `received`.
    ///
    /// # Errors
    /// What the kernel says, or that the stream ends before. The buffers may be partly filled.
    pub(super) fn receive_from(&self, received: &[u8], stream: BorrowedFd<'_>) -> io::Result<usize> {
        let mut taken = 0;
        for range in &self.ranges {
            let here = (range.size as usize).min(received.len() - taken);
            self.memory.write(range.start.0, &received[taken..taken + here]).map_err(io::Error::other)?;
            taken += here;
        }
        if (taken as u64) < self.len {
            let rest = self.part(taken as u64, self.len - taken as u64).map_err(io::Error::other)?;
            let result = rest.transfer(stream, Direction::Receive);
            rest.note_written();
            result?;
        }
        Ok(taken)
    }

    /// Writes the buffers to `file` at `offset`; with `durable`, on to stable storage.
    ///
    /// # Errors
    /// What the kernel says. The file may be partly written.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64, durable: bool) -> io::Result<()> {
        self.transfer(file, Direction::Write(offset, durable))
    }

    fn transfer(&self, file: BorrowedFd<'_>, direction: Direction) -> io::Result<()> {
        let mut done = self.step(file, direction, &self.pieces)?;
        if done == self.len {
            return Ok(());
        }
        // The kernel stopped half-way (a limit of its own, a signal): go on with what is left.
        let mut pieces = self.pieces.clone();
        let mut rest = pieces.as_mut_slice();
        let mut total = done;
        while total < self.len {
            rest = advance(rest, done);
            let next = match direction {
                Direction::Read(offset) => Direction::Read(offset.saturating_add(total)),
                Direction::ReadCached(offset) => Direction::ReadCached(offset.saturating_add(total)),
                Direction::Write(offset, durable) => Direction::Write(offset.saturating_add(total), durable),
                Direction::Receive => Direction::Receive,
            };
            done = self.step(file, next, rest)?;
            total += done;
        }
        Ok(())
    }

    /// One system call that moves at least one byte.
    fn step(&self, file: BorrowedFd<'_>, direction: Direction, pieces: &[IoVec]) -> io::Result<u64> {
        if pieces.is_empty() {
            return Ok(0);
        }
        loop {
            // SAFETY: the pieces were checked to lie in guest RAM, which `self.memory` keeps mapped; guest RAM is only
            // ever accessed raw.
            match unsafe { sys::transfer(file, direction, pieces) } {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => return Ok(moved as u64),
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(why),
            }
        }
    }
}

/// The pieces without their first `done` bytes.
fn advance(pieces: &mut [IoVec], done: u64) -> &mut [IoVec] {
    let mut left = done as usize;
    let whole = pieces
        .iter()
        .take_while(|piece| {
            let over = left >= piece.iov_len;
            if over {
                left -= piece.iov_len;
            }
            over
        })
        .count();
    let rest = &mut pieces[whole..];
    if let Some(first) = rest.first_mut() {
        // SAFETY: `left` is less than the piece's length, so the address stays inside the piece.
        first.iov_base = unsafe { first.iov_base.cast::<u8>().add(left) }.cast();
        first.iov_len -= left;
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use memory::MemoryOptions;

    use super::*;

    fn lengths(pieces: &[IoVec]) -> Vec<(usize, usize)> {
        pieces.iter().map(|piece| (piece.iov_base as usize, piece.iov_len)).collect()
    }

    #[test]
    fn advances_inside_and_across_pieces() {
        let memory = GuestMemory::new(MemoryOptions { size: 0x1000, ..Default::default() }).unwrap();
        let base = memory.base() as usize;
        let ranges = [GuestRange::new(0, 4), GuestRange::new(0x100, 0), GuestRange::new(0x200, 8)];
        let pieces = HostBuffers::new(&memory, ranges.to_vec()).unwrap().pieces;
        assert_eq!(lengths(advance(&mut pieces.clone(), 0)), [(base, 4), (base + 0x200, 8)]);
        assert_eq!(lengths(advance(&mut pieces.clone(), 3)), [(base + 3, 1), (base + 0x200, 8)]);
        assert_eq!(lengths(advance(&mut pieces.clone(), 4)), [(base + 0x200, 8)]);
        assert_eq!(lengths(advance(&mut pieces.clone(), 7)), [(base + 0x203, 5)]);
        assert_eq!(lengths(advance(&mut pieces.clone(), 12)), []);
    }

    #[test]
    fn goes_on_where_the_kernel_stopped() {
        // More pieces than the kernel takes at once.
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, ..Default::default() }).unwrap();
        let ranges: Vec<GuestRange> = (0..2500).map(|n| GuestRange::new(n * 16, 7)).collect();
        let data: Vec<u8> = (0..2500 * 7).map(|n| (n % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&data).unwrap();
        let buffers = HostBuffers::new(&memory, ranges.to_vec()).unwrap();
        let tag = memory.pages().mark_code(0x1000).unwrap();
        buffers.read_from(file.as_fd(), 0).unwrap();
        assert!(!memory.pages().is_current(0x1000, tag), "code in the buffers is no longer what was decoded");
        let mut back = [0; 7];
        memory.read(2499 * 16, &mut back).unwrap();
        assert_eq!(back, data[2499 * 7..]);

        let copy = tempfile::tempfile().unwrap();
        buffers.write_to(copy.as_fd(), 0, false).unwrap();
        let mut written = vec![0; data.len()];
        std::os::unix::fs::FileExt::read_exact_at(&copy, &mut written, 0).unwrap();
        assert_eq!(written, data);
    }

    #[test]
    fn parts_and_copies() {
        let memory = GuestMemory::new(MemoryOptions { size: 0x1000, ..Default::default() }).unwrap();
        memory.write(0, &(0..=255).collect::<Vec<u8>>()).unwrap();
        let ranges = vec![GuestRange::new(0x10, 4), GuestRange::new(0x20, 0), GuestRange::new(0x40, 8)];
        let buffers = HostBuffers::new(&memory, ranges).unwrap();
        let bytes = |buffers: &HostBuffers| {
            let mut bytes = vec![0; buffers.len() as usize];
            buffers.copy_to(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(bytes(&buffers), [16, 17, 18, 19, 64, 65, 66, 67, 68, 69, 70, 71]);
        let part = |start, len| bytes(&buffers.part(start, len).unwrap());
        assert_eq!(part(2, 5), [18, 19, 64, 65, 66]);
        assert_eq!(part(4, 2), [64, 65]);
        assert_eq!(part(11, 9), [71]);
        assert!(part(12, 1).is_empty());
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let memory = GuestMemory::new(MemoryOptions { size: 0x1000, ..Default::default() }).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc").unwrap();
        let ranges = [GuestRange::new(0, 4)];
        let error = HostBuffers::new(&memory, ranges.to_vec()).unwrap().read_from(file.as_fd(), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(HostBuffers::new(&memory, vec![GuestRange::new(0xfff, 2)]).is_err());
    }
}
