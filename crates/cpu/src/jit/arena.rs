//! Memory for emitted code: one memfd mapped twice, writable here and executable there, so that no page is ever both.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// The arena. Offsets in it are `u32`s.
pub(crate) struct Arena {
    writable: *mut u8,
    executable: *const u8,
    size: usize,
    used: usize,
    /// Offsets below stay when the arena is emptied.
    keep: usize,
}

// SAFETY: the mappings belong to the arena alone; the vCPU that owns it moves between threads as a whole.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps an arena of `size` bytes.
    ///
    /// # Errors
    /// The kernel's, from creating or mapping the memory (executable mappings may be forbidden).
    pub(crate) fn new(size: usize) -> Result<Self, rustix::io::Errno> {
        let size = size.clamp(1 << 20, 1 << 30).next_multiple_of(4096);
        let fd = rustix::fs::memfd_create("bhyve-code", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, size as u64)?;
        let map = |prot| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { rustix::mm::mmap(ptr::null_mut(), size, prot, MapFlags::SHARED | MapFlags::NORESERVE, &fd, 0) }
        };
        let writable: *mut c_void = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(at) => at,
            Err(error) => {
                // SAFETY: mapped just above, and nothing refers to it.
                let _ = unsafe { rustix::mm::munmap(writable, size) };
                return Err(error);
            }
        };
        Ok(Self { writable: writable.cast(), executable: executable.cast(), size, used: 0, keep: 0 })
    }

    /// Where the next code will be put.
    pub(crate) fn next(&self) -> u32 {
        self.used as u32
    }

    /// Whether `len` more bytes fit.
    pub(crate) fn has_room(&self, len: usize) -> bool {
        self.size - self.used >= len
    }

    /// Appends code; it must have been made for [`Arena::next`], and fit.
    pub(crate) fn append(&mut self, code: &[u8]) {
        assert!(self.has_room(code.len() + 64), "the code arena was checked for room");
        // SAFETY: the range lies in the writable mapping, by the assertion.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(self.used), code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16);
    }

    /// Overwrites bytes.
    pub(crate) fn patch(&mut self, at: u32, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.used);
        // SAFETY: the range lies in the used part, by the assertion. No code of the arena runs meanwhile: its vCPU is here.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable.add(at as usize), bytes.len()) };
    }

    /// Makes what is in the arena survive [`Arena::clear`].
    pub(crate) fn keep(&mut self) {
        self.keep = self.used;
    }

    /// Drops everything but what is kept.
    pub(crate) fn clear(&mut self) {
        self.used = self.keep;
    }

    /// The address at which the code at an offset executes.
    pub(crate) fn address(&self, offset: u32) -> *const u8 {
        self.executable.wrapping_add(offset as usize)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings are the arena's own, and the vCPU that would run code in them is gone.
        unsafe {
            let _ = rustix::mm::munmap(self.writable.cast(), self.size);
            let _ = rustix::mm::munmap(self.executable.cast_mut().cast(), self.size);
        }
    }
}
