//! Stops a vCPU from another thread, or makes it look at itself, without losing a request.
//!
//! A stop request sets the flag `immediate_exit` in the page that the vCPU shares with the kernel, then signals the vCPU's
//! thread. If the thread has not entered the kernel yet, the kernel sees the flag on entry; if it has, the signal ends its stay.
//! Either way KVM_RUN returns EINTR, after completing what the last exit left to do.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::engine::{EngineError, VcpuHandle};

/// The page that a vCPU shares with the kernel, mapped a second time: what is here is reached through this mapping alone, so
/// that it never aliases the references that `VcpuFd` gives out.
pub(super) struct RunPage {
    start: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the mapping belongs to this struct and stays until it is dropped. The one field that several threads touch is only
// touched atomically; the others are read by the vCPU's thread between two runs, when the kernel does not write.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

/// What the kernel says about an internal error.
#[derive(Clone, Copy)]
pub(super) struct InternalError {
    pub(super) kind: u32,
    /// Number of valid entries in `data`.
    count: usize,
    data: [u64; 16],
}

impl InternalError {
    pub(super) fn data(&self) -> &[u64] {
        &self.data[..self.count.min(self.data.len())]
    }
}

impl RunPage {
    fn map(fd: &VcpuFd, size: usize) -> Result<Self, EngineError> {
        debug_assert!(size >= size_of::<kvm_run>());
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        match NonNull::new(start.cast::<kvm_run>()) {
            Some(page) if start != libc::MAP_FAILED => Ok(Self { start: page, size }),
            _ => {
                let source = std::io::Error::last_os_error();
                Err(EngineError::Host { what: "map the run page of a vCPU".into(), source })
            }
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the field is inside the mapping, which lives as long as self; this process only touches it atomically.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().byte_add(offset_of!(kvm_run, immediate_exit)).cast()) }
    }

    /// Width in bytes of the port access that KVM_RUN just reported.
    pub(super) fn port_width(&self) -> usize {
        // SAFETY: the union is inside the mapping, and any bits are a valid byte; the vCPU does not run.
        usize::from(unsafe { ptr::addr_of!((*self.start.as_ptr()).__bindgen_anon_1.io.size).read_volatile() })
    }

    /// The internal error that KVM_RUN just reported.
    pub(super) fn internal_error(&self) -> InternalError {
        // SAFETY: the union is inside the mapping, and any bits are valid integers; the vCPU does not run.
        let internal = unsafe { ptr::addr_of!((*self.start.as_ptr()).__bindgen_anon_1.internal).read_volatile() };
        InternalError { kind: internal.suberror, count: internal.ndata as usize, data: internal.data }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: start and size are what mmap gave, and nobody borrows from self any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// What a vCPU found when it was asked to look at itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Life {
    /// It runs or can go on by itself.
    Alive,
    /// Only another vCPU could wake it.
    Dead,
}

/// Reaches a vCPU from other threads.
pub(super) struct Kick {
    page: RunPage,
    stop: AtomicBool,
    /// Somebody asks for the vCPU's [`Life`].
    asked: AtomicBool,
    /// The answer is [`Life::Dead`].
    dead: AtomicBool,
    /// The thread inside [`Kick::enter`]'s scope.
    thread: Mutex<Option<libc::pthread_t>>,
}

/// The calling thread runs the vCPU, until dropped.
pub(super) struct Inside<'a>(&'a Kick);

impl Kick {
    pub(super) fn new(fd: &VcpuFd, run_size: usize) -> Result<Self, EngineError> {
        install_handler();
        Ok(Self {
            page: RunPage::map(fd, run_size)?,
            stop: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            thread: Mutex::new(None),
        })
    }

    pub(super) fn page(&self) -> &RunPage {
        &self.page
    }

    fn thread(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces that the calling thread runs the vCPU now.
    pub(super) fn enter(&self) -> Inside<'_> {
        unblock();
        // SAFETY: pthread_self has no preconditions.
        *self.thread() = Some(unsafe { libc::pthread_self() });
        Inside(self)
    }

    /// After KVM_RUN returned EINTR: whether that was a stop request, which is taken. `look` answers a question that may have
    /// been asked.
    pub(super) fn take_stop<E>(&self, look: impl FnOnce() -> Result<Life, E>) -> Result<bool, E> {
        // In this order: a request made after the looks below sets the flag after it is cleared here.
        self.page.immediate_exit().store(0, Ordering::SeqCst);
        if self.asked.swap(false, Ordering::SeqCst) {
            self.dead.store(look()? == Life::Dead, Ordering::SeqCst);
        }
        Ok(self.stop.swap(false, Ordering::SeqCst))
    }

    /// Makes the vCPU look at itself soon, if it runs.
    pub(super) fn ask(&self) {
        self.dead.store(false, Ordering::SeqCst);
        self.asked.store(true, Ordering::SeqCst);
        self.interrupt();
    }

    /// The answer to the last [`Kick::ask`]; alive, if there is none yet.
    pub(super) fn answer(&self) -> Life {
        if self.dead.load(Ordering::SeqCst) { Life::Dead } else { Life::Alive }
    }

    /// Makes KVM_RUN return EINTR, now or when it is next called.
    fn interrupt(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        if let Some(thread) = *self.thread() {
            // SAFETY: the thread has not left `Inside`, whose drop waits for the lock held here, so it exists. A failure means
            // that it is about to end.
            unsafe { libc::pthread_kill(thread, signal()) };
        }
    }
}

impl VcpuHandle for Kick {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.interrupt();
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        *self.0.thread() = None;
    }
}

/// The signal that ends KVM_RUN. Its handler does nothing: arriving is all.
fn signal() -> c_int {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: c_int) {}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the structure is plain data; zero is a valid value of each field.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        // SAFETY: the handler is async-signal-safe, since it does nothing, and has the signature that these flags ask for.
        unsafe { libc::sigaction(signal(), &action, ptr::null_mut()) };
    });
}

/// Lets the calling thread receive the signal: it may have inherited a mask that blocks all.
fn unblock() {
    // SAFETY: the set is initialised by sigemptyset before it is used; changing this thread's mask harms nobody.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}
