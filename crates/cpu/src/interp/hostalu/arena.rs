//! Memory for generated code: one memory file mapped twice, once to write and once to execute.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Size in bytes; pages that are never used take no memory. Tests want to see it full.
pub(super) const SIZE: usize = if cfg!(test) { 1 << 20 } else { 16 << 20 };

pub(super) struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
}

// SAFETY: the mappings belong to the arena alone, and nothing in it depends on the thread.
unsafe impl Send for Arena {}

impl Arena {
    /// # Errors
    /// The host refuses the memory file or an executable mapping of it.
    pub(super) fn new() -> rustix::io::Result<Self> {
        // Kernels before 6.3 do not know the flag; there every memory file may be executed.
        let fd = rustix::fs::memfd_create("cpu-stubs", MemfdFlags::CLOEXEC | MemfdFlags::EXEC)
            .or_else(|_| rustix::fs::memfd_create("cpu-stubs", MemfdFlags::CLOEXEC))?;
        rustix::fs::ftruncate(&fd, SIZE as u64)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe { mmap(std::ptr::null_mut(), SIZE, protection, MapFlags::SHARED, &fd, 0) }?;
            NonNull::new(at.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = map(ProtFlags::READ | ProtFlags::EXEC).inspect_err(|_| {
            // SAFETY: mapped above, used by nobody yet.
            let _ = unsafe { munmap(writable.as_ptr().cast(), SIZE) };
        })?;
        Ok(Self { writable, executable, used: 0 })
    }

    /// Bytes left.
    pub(super) fn room(&self) -> usize {
        SIZE - self.used
    }

    /// Appends code; returns the address at which it can be called. `None` if there is no room.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<u64> {
        let start = self.used.next_multiple_of(16);
        let end = start.checked_add(code.len()).filter(|&end| end <= SIZE)?;
        // SAFETY: start..end lies in the writable mapping, which only this arena writes.
        unsafe { self.writable.as_ptr().add(start).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        self.used = end;
        // SAFETY: start lies in the mapping.
        Some(unsafe { self.executable.as_ptr().add(start) } as u64)
    }

    /// Forgets all code. No address returned before may be called any more.
    pub(super) fn reset(&mut self) {
        self.used = 0;
        // The addresses are written again through another mapping: CPUID serialises the instruction stream (SDM vol. 3, 9.1.3).
        std::hint::black_box(std::arch::x86_64::__cpuid(0));
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both were mapped by `new` with this size, and stubs are only called through the vCPU that owns the arena.
        unsafe {
            let _ = munmap(self.writable.as_ptr().cast(), SIZE);
            let _ = munmap(self.executable.as_ptr().cast(), SIZE);
        }
    }
}
