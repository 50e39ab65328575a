//! The host mapping under guest RAM: one reserved span with pieces of memory placed in it.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong, c_void};
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// A reserved span of host addresses with memory mapped at chosen offsets; unmapped when dropped.
pub(crate) struct HostMap {
    /// Aligned to [`LARGE_PAGE`].
    base: *mut u8,
    span: usize,
    /// What was reserved around it.
    reserved: (*mut u8, usize),
}

/// More nodes than Linux can be built for.
const MAX_NODES: u32 = 1024;

/// MPOL_MF_MOVE of mbind(2): pages that lie elsewhere move.
const MOVE_PAGES: c_ulong = 1 << 1;

/// A set of the host's NUMA nodes, as mbind(2) takes it.
pub(crate) struct NodeMask([u64; MAX_NODES as usize / 64]);

impl NodeMask {
    /// `None` if there is a node that no host has.
    pub(crate) fn new(nodes: &[u32]) -> Option<Self> {
        let mut mask = [0; MAX_NODES as usize / 64];
        for node in nodes {
            *mask.get_mut(*node as usize / 64)? |= 1 << (node % 64);
        }
        Some(Self(mask))
    }
}

/// Size of the host's large pages: guest memory can have them only where host addresses and file offsets agree about their
/// boundaries.
const LARGE_PAGE: usize = 2 << 20;

// SAFETY: the mapping is plain memory that outlives every access (accesses borrow the HostMap); all
// access to its contents goes through raw-pointer copies and atomics, which may race by design.
unsafe impl Send for HostMap {}
// SAFETY: as above.
unsafe impl Sync for HostMap {}

impl HostMap {
    /// Reserves `span` bytes of addresses that fault on access.
    pub(crate) fn reserve(span: u64) -> Result<Self, Errno> {
        let span = usize::try_from(span).map_err(|_| Errno::NOMEM)?;
        let size = span.checked_add(LARGE_PAGE).ok_or(Errno::NOMEM)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                size,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let reserved: *mut u8 = reserved.cast();
        let base = reserved.wrapping_add((reserved as usize).wrapping_neg() % LARGE_PAGE);
        Ok(Self { base, span, reserved: (reserved, size) })
    }

    /// Maps `size` bytes at `offset` of the span: of a file from an offset, or of this process's own, where the host uses large
    /// pages even if its settings keep them from files in memory.
    pub(crate) fn place(&self, offset: u64, size: u64, file: Option<(&OwnedFd, u64)>) -> Result<(), Errno> {
        let at = self.at(offset, size).ok_or(Errno::INVAL)?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: `at` checked that the piece lies inside our own reserved span, so MAP_FIXED replaces only our reservation.
        unsafe {
            match file {
                Some((fd, from)) => {
                    rustix::mm::mmap(at.cast(), size as usize, rights, flags | MapFlags::SHARED, fd, from)
                }
                None => rustix::mm::mmap_anonymous(at.cast(), size as usize, rights, flags | MapFlags::PRIVATE),
            }
        }?;
        // Fewer misses of the host's TLB, where the host's settings allow it.
        // SAFETY: the advice changes no contents, and the piece is ours.
        let _ = unsafe { rustix::mm::madvise(at.cast(), size as usize, Advice::LinuxHugepage) };
        Ok(())
    }

    /// Includes or excludes a piece from core dumps.
    pub(crate) fn dump(&self, offset: u64, size: u64, include: bool) -> Result<(), Errno> {
        let at = self.at(offset, size).ok_or(Errno::INVAL)?;
        let advice = if include { Advice::LinuxDoDump } else { Advice::LinuxDontDump };
        // SAFETY: the advice changes no contents, and the piece is ours.
        unsafe { rustix::mm::madvise(at.cast::<c_void>(), size as usize, advice) }
    }

    /// Locks a piece into host memory.
    pub(crate) fn wire(&self, offset: u64, size: u64) -> Result<(), Errno> {
        let at = self.at(offset, size).ok_or(Errno::INVAL)?;
        // SAFETY: locking changes no contents, and the piece is ours.
        unsafe { rustix::mm::mlock(at.cast::<c_void>(), size as usize) }
    }

    /// Sets the host's NUMA policy of a piece, a mode of mbind(2), and moves what is there already.
    pub(crate) fn bind(&self, offset: u64, size: u64, mode: c_int, nodes: &NodeMask) -> Result<(), Errno> {
        let at = self.at(offset, size).ok_or(Errno::INVAL)?;
        // The kernel takes one bit less than it is told.
        let bits = c_ulong::from(MAX_NODES) + 1;
        // SAFETY: the policy changes no contents, the piece is ours, and the kernel reads the mask alone, of MAX_NODES bits.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                at,
                size as c_ulong,
                c_ulong::from(mode.unsigned_abs()),
                nodes.0.as_ptr(),
                bits,
                MOVE_PAGES,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
        }
    }

    /// Host address of `offset`, if `len` bytes from there lie inside the span.
    #[inline]
    pub(crate) fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: `end` is inside the span, so the address is inside the mapping.
        (end <= self.span as u64).then(|| unsafe { self.base.add(offset as usize) })
    }

    /// Host address of offset 0.
    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for HostMap {
    fn drop(&mut self) {
        // SAFETY: `reserved` is what mmap gave; nobody can hold a checked access any more.
        // A failure would leave the addresses reserved, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.reserved.0.cast(), self.reserved.1) };
    }
}
