//! [`GuestMemory`]: the handle through which everything but the CPU engines reaches guest RAM.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use platform::GuestRange;
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;
use rustix::mm::Advice;

use crate::map::HostMap;
use crate::pages::PageMap;
use crate::rom::RomState;
use crate::{HIGH_MEMORY_BASE, LOW_MEMORY_LIMIT, PAGE_SIZE, ROM_WINDOW};

/// How guest RAM is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryOptions {
    /// Bytes of RAM; rounded up to whole pages.
    pub size: u64,
    /// Lock all of it into host memory (`-S`).
    pub wired: bool,
    /// Include it in core dumps (`-C`).
    pub in_core: bool,
    /// On a memfd, so that other processes can map it; else this process's own, which the host may put on large pages.
    pub shared: bool,
    /// Where RAM below 4 GiB ends at the latest, a whole page, if the board has other things from there; `None` and what is
    /// beyond [`LOW_MEMORY_LIMIT`] mean that.
    pub low_limit: Option<u64>,
}

/// Why an access or the set-up failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The access is not wholly inside RAM.
    #[error("guest memory access of {len} bytes at {address:#x} is outside RAM")]
    OutsideRam {
        /// First byte of the access.
        address: u64,
        /// Length of the access in bytes.
        len: u64,
    },
    /// An atomic access that is not naturally aligned.
    #[error("guest memory access of {len} bytes at {address:#x} is not aligned")]
    Misaligned {
        /// First byte of the access.
        address: u64,
        /// Length of the access in bytes.
        len: u64,
    },
    /// Size zero, or larger than a guest-physical address space can hold.
    #[error("guest memory of {0} bytes is not possible: it must be between 1 byte and 64 TiB")]
    Size(u64),
    /// Read-only memory that is not whole pages, or not right below what is there already, or outside its window.
    #[error("read-only memory of {size} bytes at {address:#x} is not possible")]
    Rom {
        /// Where it was to be.
        address: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The host refused.
    #[error("cannot {what} {size} bytes of guest memory")]
    Host {
        /// What was being done.
        what: &'static str,
        /// How much memory it concerned, in bytes.
        size: u64,
        /// What the host said.
        source: Errno,
    },
}

const MAX_SIZE: u64 = 64 << 40;

pub(crate) struct Inner {
    pub(crate) map: HostMap,
    fd: Option<OwnedFd>,
    low: u64,
    high: u64,
    pub(crate) pages: PageMap,
    pub(crate) rom: RomState,
}

/// A handle to the guest's RAM; clones share it.
#[derive(Clone)]
pub struct GuestMemory(pub(crate) Arc<Inner>);

macro_rules! scalar_access {
    ($($read:ident $write:ident $load:ident $store:ident $ty:ty, $atomic:ty;)*) => {$(
        #[doc = concat!("Reads a little-endian `", stringify!($ty), "` at any alignment.\n\n# Errors\nNot wholly inside RAM.")]
        #[inline]
        pub fn $read(&self, gpa: u64) -> Result<$ty, MemoryError> {
            let mut bytes = [0; size_of::<$ty>()];
            self.read(gpa, &mut bytes)?;
            Ok(<$ty>::from_le_bytes(bytes))
        }
        #[doc = concat!("Writes a little-endian `", stringify!($ty), "` at any alignment.\n\n# Errors\nNot wholly inside RAM.")]
        #[inline]
        pub fn $write(&self, gpa: u64, value: $ty) -> Result<(), MemoryError> {
            self.write(gpa, &value.to_le_bytes())
        }
        #[doc = concat!("Loads an aligned `", stringify!($ty), "` atomically.\n\n# Errors\nMisaligned or not inside RAM.")]
        #[inline]
        pub fn $load(&self, gpa: u64, order: Ordering) -> Result<$ty, MemoryError> {
            let at = self.aligned(gpa, size_of::<$ty>() as u64)?;
            // SAFETY: `aligned` checked alignment and that the bytes are inside RAM, which lives as long as self.
            Ok(<$ty>::from_le(unsafe { <$atomic>::from_ptr(at.cast()) }.load(order)))
        }
        #[doc = concat!("Stores an aligned `", stringify!($ty), "` atomically.\n\n# Errors\nMisaligned or not inside RAM.")]
        #[inline]
        pub fn $store(&self, gpa: u64, value: $ty, order: Ordering) -> Result<(), MemoryError> {
            let at = self.aligned(gpa, size_of::<$ty>() as u64)?;
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(at.cast()) }.store(value.to_le(), order);
            self.0.pages.note_write(gpa, size_of::<$ty>() as u64);
            Ok(())
        }
    )*};
}

impl GuestMemory {
    /// Makes RAM of `options.size` bytes, all zero, without taking host memory for it yet.
    ///
    /// # Errors
    /// A size of zero or beyond 64 TiB, or the host cannot map, or (when wired) cannot lock it.
    pub fn new(options: MemoryOptions) -> Result<Self, MemoryError> {
        let size = options.size.checked_next_multiple_of(PAGE_SIZE).filter(|size| (1..=MAX_SIZE).contains(size));
        let size = size.ok_or(MemoryError::Size(options.size))?;
        let host = |what| move |source| MemoryError::Host { what, size, source };
        let low = size.min(LOW_MEMORY_LIMIT).min(options.low_limit.unwrap_or(LOW_MEMORY_LIMIT));
        let high = size - low;
        let fd = if options.shared {
            let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(host("create a file for"))?;
            rustix::fs::ftruncate(&fd, size).map_err(host("size the file for"))?;
            Some(fd)
        } else {
            None
        };
        let map = HostMap::reserve(HIGH_MEMORY_BASE + high).map_err(host("reserve addresses for"))?;
        let pieces = [(0, low, 0), (HIGH_MEMORY_BASE, high, low)];
        for (start, len, fd_offset) in pieces.into_iter().filter(|piece| piece.1 > 0) {
            map.place(start, len, fd.as_ref().map(|fd| (fd, fd_offset))).map_err(host("map"))?;
            map.dump(start, len, options.in_core).map_err(host("set the core-dump policy of"))?;
            if options.wired {
                map.wire(start, len).map_err(host("lock (-S; see `ulimit -l`)"))?;
            }
        }
        // The window for read-only memory adjoins high memory.
        let window = HIGH_MEMORY_BASE - ROM_WINDOW;
        let pages = PageMap::new(low, ROM_WINDOW, window + high).map_err(host("keep books of"))?;
        // Nothing there may be taken for pages of zeroes.
        pages.note_write(ROM_WINDOW, window);
        Ok(Self(Arc::new(Inner { map, fd, low, high, pages, rom: RomState::default() })))
    }

    /// Bytes of RAM from address 0.
    pub fn low_size(&self) -> u64 {
        self.0.low
    }

    /// Bytes of RAM from 4 GiB.
    pub fn high_size(&self) -> u64 {
        self.0.high
    }

    /// Bytes of RAM in all.
    pub fn size(&self) -> u64 {
        self.0.low + self.0.high
    }

    /// The one or two ranges of RAM.
    pub fn ranges(&self) -> impl Iterator<Item = GuestRange> {
        let all = [GuestRange::new(0, self.0.low), GuestRange::new(HIGH_MEMORY_BASE, self.0.high)];
        all.into_iter().filter(|range| range.size > 0)
    }

    /// The memfd behind RAM that was made to be shared: low memory first, then high memory, without the hole.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.fd.as_ref().map(OwnedFd::as_fd)
    }

    /// The code tracking of these pages.
    #[inline]
    pub fn pages(&self) -> &PageMap {
        &self.0.pages
    }

    /// Host address of guest-physical address 0. `base + gpa` is the host address of every byte of RAM; everything
    /// else in that span faults. For CPU engines and vectored I/O only, which check with [`GuestMemory::is_ram`] first.
    #[inline]
    pub fn base(&self) -> *mut u8 {
        self.0.map.base()
    }

    /// Whether `len` bytes from `gpa` lie inside one range of RAM.
    #[inline]
    pub fn is_ram(&self, gpa: u64, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else { return false };
        end <= self.0.low || (gpa >= HIGH_MEMORY_BASE && end - HIGH_MEMORY_BASE <= self.0.high)
    }

    /// Host address of `len` bytes of RAM at `gpa`, for handing to the kernel in vectored I/O. Whoever writes through it
    /// calls [`PageMap::note_write`] afterwards.
    ///
    /// # Errors
    /// Not wholly inside RAM.
    #[inline]
    pub fn host_address(&self, gpa: u64, len: u64) -> Result<*mut u8, MemoryError> {
        let outside = MemoryError::OutsideRam { address: gpa, len };
        if self.is_ram(gpa, len) { self.0.map.at(gpa, len).ok_or(outside) } else { Err(outside) }
    }

    #[inline]
    fn aligned(&self, gpa: u64, len: u64) -> Result<*mut u8, MemoryError> {
        if gpa.is_multiple_of(len) {
            self.host_address(gpa, len)
        } else {
            Err(MemoryError::Misaligned { address: gpa, len })
        }
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// Not wholly inside RAM or readable read-only memory; nothing is copied then.
    #[inline]
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        let outside = MemoryError::OutsideRam { address: gpa, len };
        let at = if self.is_readable(gpa, len) { self.0.map.at(gpa, len).ok_or(outside) } else { Err(outside) }?;
        // SAFETY: the source is inside the mapping and cannot overlap a Rust slice; a race with the guest gives the guest's
        // own mixed bytes, of a type for which every bit pattern is valid.
        unsafe { ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies bytes into guest memory.
    ///
    /// # Errors
    /// Not wholly inside RAM; nothing is copied then.
    #[inline]
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let at = self.host_address(gpa, bytes.len() as u64)?;
        // SAFETY: as for `read`, in the other direction.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        self.0.pages.note_write(gpa, bytes.len() as u64);
        Ok(())
    }

    /// Fills guest memory with one byte value.
    ///
    /// # Errors
    /// Not wholly inside RAM; nothing is written then.
    pub fn fill(&self, gpa: u64, len: u64, value: u8) -> Result<(), MemoryError> {
        let at = self.host_address(gpa, len)?;
        // SAFETY: as for `write`.
        unsafe { ptr::write_bytes(at, value, len as usize) };
        self.0.pages.note_write(gpa, len);
        Ok(())
    }

    /// Gives the host's memory behind whole pages in a range back; they read as zeroes afterwards.
    ///
    /// # Errors
    /// Not wholly inside RAM, or the host refuses.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        self.host_address(gpa, len)?;
        let start = gpa.next_multiple_of(PAGE_SIZE);
        let end = (gpa + len) & !(PAGE_SIZE - 1);
        if start >= end {
            return Ok(());
        }
        let result = match &self.0.fd {
            Some(fd) => {
                let offset = if start >= HIGH_MEMORY_BASE { start - HIGH_MEMORY_BASE + self.0.low } else { start };
                rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, end - start)
            }
            None => {
                let at = self.host_address(start, end - start)?;
                // SAFETY: the pages are guest RAM, which is only ever reached by raw or atomic accesses that take any
                // bytes for what they are; zeroes are the guest's own bytes from here on.
                unsafe { rustix::mm::madvise(at.cast(), (end - start) as usize, Advice::LinuxDontNeed) }
            }
        };
        result.map_err(|source| MemoryError::Host { what: "give back", size: end - start, source })?;
        self.0.pages.note_write(start, end - start);
        Ok(())
    }

    scalar_access! {
        read_u8 write_u8 load_u8 store_u8 u8, AtomicU8;
        read_u16 write_u16 load_u16 store_u16 u16, AtomicU16;
        read_u32 write_u32 load_u32 store_u32 u32, AtomicU32;
        read_u64 write_u64 load_u64 store_u64 u64, AtomicU64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(size: u64) -> GuestMemory {
        GuestMemory::new(MemoryOptions { size, ..Default::default() }).unwrap()
    }

    #[test]
    fn splits_at_three_gigabytes() {
        let memory = ram(5 << 30);
        assert_eq!((memory.low_size(), memory.high_size()), (3 << 30, 2 << 30));
        memory.write_u32(0xbfff_fffc, 0x1234_5678).unwrap();
        memory.write_u32(0x1_0000_0000, 0x9abc_def0).unwrap();
        assert_eq!(memory.read_u32(0xbfff_fffc).unwrap(), 0x1234_5678);
        assert_eq!(memory.read_u32(0x1_0000_0000).unwrap(), 0x9abc_def0);
        assert!(memory.read_u32(0xbfff_fffd).is_err(), "straddles the end of low memory");
        assert!(memory.read_u8(0xc000_0000).is_err());
        assert!(memory.read_u8(0xffff_ffff).is_err());
        assert!(memory.read_u64(0x1_7fff_fff9).is_err(), "straddles the end of high memory");
        assert!(memory.read_u8(u64::MAX).is_err());
    }

    #[test]
    fn may_be_larger_than_the_host() {
        let memory = ram(16 << 40);
        let last = HIGH_MEMORY_BASE + memory.high_size() - 8;
        memory.write_u64(last, 7).unwrap();
        assert_eq!(memory.read_u64(last).unwrap(), 7);
    }

    #[test]
    fn refuses_absurd_sizes() {
        for size in [0, u64::MAX, MAX_SIZE + 1] {
            assert!(matches!(
                GuestMemory::new(MemoryOptions { size, ..Default::default() }),
                Err(MemoryError::Size(s)) if s == size
            ));
        }
    }

    #[test]
    fn atomics_want_alignment() {
        let memory = ram(0x2000);
        memory.store_u16(0x1ffe, 0xbeef, Ordering::Release).unwrap();
        assert_eq!(memory.load_u16(0x1ffe, Ordering::Acquire).unwrap(), 0xbeef);
        assert!(matches!(memory.load_u32(2, Ordering::Acquire), Err(MemoryError::Misaligned { .. })));
        assert!(matches!(memory.load_u32(0x2000, Ordering::Acquire), Err(MemoryError::OutsideRam { .. })));
    }

    #[test]
    fn discarded_pages_are_zeroes_and_no_code() {
        let shared = GuestMemory::new(MemoryOptions { size: 4 << 30, shared: true, ..Default::default() }).unwrap();
        for (memory, base) in
            [ram(4 << 30), shared].iter().flat_map(|memory| [(memory, 0x4000), (memory, HIGH_MEMORY_BASE)])
        {
            memory.fill(base, 0x4000, 7).unwrap();
            let tag = memory.pages().mark_code(base + 0x1000).unwrap();
            memory.discard(base + 0x800, 0x2000).unwrap();
            let byte = |at: u64| memory.read_u8(base + at).unwrap();
            assert_eq!([byte(0xfff), byte(0x1000), byte(0x1fff), byte(0x2000)], [7, 0, 0, 7]);
            assert!(!memory.pages().is_current(base + 0x1000, tag));
            memory.discard(base + 0x100, 0x200).unwrap();
            assert_eq!(byte(0x100), 7, "no whole page");
            assert!(memory.discard(memory.low_size() - 0x1000, 0x2000).is_err());
            assert!(memory.discard(u64::MAX, 2).is_err());
        }
    }

    #[test]
    fn writes_end_code_tags() {
        let memory = ram(0x4000);
        for write in [
            (|m: &GuestMemory| m.write(0x1ffe, &[1; 4]).unwrap()) as fn(&GuestMemory),
            |m| m.fill(0x2000, 1, 9).unwrap(),
            |m| m.store_u8(0x2fff, 1, Ordering::SeqCst).unwrap(),
        ] {
            let tag = memory.pages().mark_code(0x2000).unwrap();
            write(&memory);
            assert!(!memory.pages().is_current(0x2000, tag));
        }
    }
}
