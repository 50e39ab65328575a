//! The word that emitted code looks at for events, in a page of its own: other threads write to it through one mapping, emitted
//! code reads it through another, at a fixed distance from its context block.
#![allow(unsafe_code)]

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of the mapping.
pub(crate) const PAGE: usize = 4096;
/// Offset of the word: not one of the context block's in its page, since processors compare no more than that first.
pub(crate) const OFFSET: usize = 0xf80;

/// Zero while events are pending; may be zero without.
pub(crate) struct Quiet {
    fd: rustix::fd::OwnedFd,
    word: NonNull<AtomicU32>,
}

// SAFETY: the mapping is owned, lives as long as the value, and is used as an atomic only.
unsafe impl Send for Quiet {}
// SAFETY: as above.
unsafe impl Sync for Quiet {}

impl Quiet {
    /// A word that is zero.
    ///
    /// # Errors
    /// The kernel's, from creating or mapping the memory.
    pub(crate) fn new() -> Result<Self, Errno> {
        let fd = rustix::fs::memfd_create("bhyve-events", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, PAGE as u64)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let word = unsafe { rustix::mm::mmap(ptr::null_mut(), PAGE, prot, flags, &fd, 0) }?;
        Ok(Self { fd, word: NonNull::new(word.cast()).ok_or(Errno::NOMEM)? })
    }

    /// Maps the word for reading at `at`, in place of what was there.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Safety
    /// The page at `at` belongs to the caller and nothing refers to its contents.
    pub(crate) unsafe fn map_at(&self, at: *mut u8) -> Result<(), Errno> {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the caller gives the page away.
        unsafe { rustix::mm::mmap(at.cast(), PAGE, ProtFlags::READ, flags, &self.fd, 0) }.map(drop)
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: mapped, aligned, zeroed memory that lives as long as `self`.
        unsafe { self.word.byte_add(OFFSET).as_ref() }
    }

    pub(crate) fn set(&self, quiet: bool) {
        self.word().store(u32::from(quiet), Ordering::SeqCst);
    }

    pub(crate) fn get(&self) -> bool {
        self.word().load(Ordering::SeqCst) != 0
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: the mapping is the value's own.
        let _ = unsafe { rustix::mm::munmap(self.word.as_ptr().cast(), PAGE) };
    }
}
