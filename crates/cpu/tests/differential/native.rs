//! The host CPU as reference: a child process in which programs run directly.
//!
//! The child never runs anything but one signal handler. Every program ends in an exception, at the latest
//! in the INT3 behind its last instruction; the kernel delivers it as a signal with all registers in the
//! signal frame. The handler saves them, puts the next program's registers into the same frame and returns
//! into it. So a program costs one signal, and a batch of programs one round trip between the processes.
//!
//! Before the first program the child gives up all system calls but `read`, `write` and the return from
//! signals (strict seccomp), so that a program that runs wild hurts nobody.
#![allow(unsafe_code)]

use std::arch::{asm, naked_asm};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, addr_of_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::layout::*;

/// Programs per batch.
pub(crate) const BATCH: usize = 128;

/// Memory that both processes see.
#[repr(C)]
struct Shared {
    facts: Facts,
    /// The program that runs.
    position: AtomicU32,
    images: [[u8; MEMORY_LEN]; IMAGES + 1],
    constants: [u8; PAGE as usize],
    inputs: [Input; BATCH],
    outcomes: [Outcome; BATCH],
}

/// What the child finds out about its host.
#[repr(C)]
struct Facts {
    /// 0 while unknown, 1 once the child is ready, else the number of the step that failed plus 100.
    state: AtomicU32,
    error: AtomicU32,
    has_ldt: AtomicU32,
    has_fsgsbase: AtomicU32,
    xsave_len: AtomicU32,
    xfeatures: AtomicU64,
}

/// How a batch failed.
pub(crate) struct Died {
    /// The program that ran.
    pub(crate) position: usize,
    /// The status that the child ended with; none if it hung.
    status: Option<i32>,
}

impl std::fmt::Display for Died {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status {
            Some(status) => write!(f, "the sandbox process died (wait status {status:#x})"),
            None => write!(f, "the sandbox process hung"),
        }
    }
}

/// The parent's end.
pub(crate) struct Sandbox {
    shared: *mut Shared,
    child: libc::pid_t,
    go: OwnedFd,
    done: OwnedFd,
}

impl Sandbox {
    /// Starts a child. `images` are the memory images, `constants` the content of the read-only page.
    pub(crate) fn start(images: &[[u8; MEMORY_LEN]; IMAGES + 1], constants: &[u8; PAGE as usize]) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice.
        let shared = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let shared = shared.cast::<Shared>();
        // SAFETY: the mapping has the size of Shared, and all zeros are valid in it.
        unsafe {
            (*shared).images = *images;
            (*shared).constants = *constants;
        }
        let (go_read, go) = pipe()?;
        let (done, done_write) = pipe()?;
        let mut sandbox = Self { shared, child: 0, go, done };
        // SAFETY: the child calls nothing that another thread of this process may hold a lock for.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => child_main(shared, go_read.as_raw_fd(), done_write.as_raw_fd()),
            pid => sandbox.child = pid,
        }
        drop((go_read, done_write));
        let ready = sandbox.await_done();
        let facts = &sandbox.shared().facts;
        match (ready, facts.state.load(Ordering::SeqCst)) {
            (Ok(()), 1) => Ok(sandbox),
            (_, state) => {
                let error = io::Error::from_raw_os_error(facts.error.load(Ordering::SeqCst) as i32);
                Err(io::Error::other(format!("the sandbox process failed in step {state}: {error}")))
            }
        }
    }

    fn shared(&self) -> &Shared {
        // SAFETY: mapped since `start`; the child writes only what the protocol says, while nobody looks.
        unsafe { &*self.shared }
    }

    /// Whether programs can use the local descriptor table.
    pub(crate) fn has_ldt(&self) -> bool {
        self.shared().facts.has_ldt.load(Ordering::SeqCst) != 0
    }

    /// Whether programs can use RDFSBASE and WRFSBASE.
    pub(crate) fn has_fsgsbase(&self) -> bool {
        self.shared().facts.has_fsgsbase.load(Ordering::SeqCst) != 0
    }

    /// Size of the kernel's XSAVE area, and the state components in it.
    pub(crate) fn xsave(&self) -> (usize, u64) {
        let facts = &self.shared().facts;
        (facts.xsave_len.load(Ordering::SeqCst) as usize, facts.xfeatures.load(Ordering::SeqCst))
    }

    /// Sets the memory image [`OWN_IMAGE`].
    pub(crate) fn set_own_image(&mut self, image: &[u8; MEMORY_LEN]) {
        // SAFETY: as for `shared`; the child waits.
        unsafe { (*self.shared).images[OWN_IMAGE] = *image };
    }

    /// Starts the programs `inputs`, at most [`BATCH`].
    pub(crate) fn submit<'a>(&mut self, inputs: impl Iterator<Item = &'a Input>) {
        let mut count = 0u8;
        // SAFETY: as for `shared`; the child waits.
        let slots = unsafe { &mut (*addr_of_mut!((*self.shared).inputs)) };
        for (slot, input) in slots.iter_mut().zip(inputs) {
            slot.clone_from(input);
            count += 1;
        }
        // SAFETY: a byte to a pipe.
        unsafe { libc::write(self.go.as_raw_fd(), (&raw const count).cast(), 1) };
    }

    /// Waits for the batch to end.
    pub(crate) fn wait(&mut self) -> Result<&[Outcome; BATCH], Died> {
        self.await_done()?;
        Ok(&self.shared().outcomes)
    }

    fn await_done(&mut self) -> Result<(), Died> {
        const PATIENCE_MS: i32 = 20_000;
        let mut fd = libc::pollfd { fd: self.done.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut byte = 0u8;
        // SAFETY: one descriptor, one byte.
        let got = unsafe {
            libc::poll(&raw mut fd, 1, PATIENCE_MS) == 1 && libc::read(fd.fd, (&raw mut byte).cast(), 1) == 1
        };
        if got {
            return Ok(());
        }
        let hung = fd.revents == 0;
        let status = self.end();
        Err(Died {
            position: self.shared().position.load(Ordering::SeqCst) as usize,
            status: (!hung).then_some(status),
        })
    }

    fn end(&mut self) -> i32 {
        let mut status = 0;
        if self.child != 0 {
            // SAFETY: our own child, not yet waited for.
            unsafe {
                libc::kill(self.child, libc::SIGKILL);
                libc::waitpid(self.child, &raw mut status, 0);
            }
            self.child = 0;
        }
        status
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.end();
        // SAFETY: mapped in `start` with this size; the child is gone.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: two descriptors are written; they are ours.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

// ---------------------------------------------------------------- the child

struct Child {
    shared: *mut Shared,
    code_alias: *mut u8,
    go: i32,
    done: i32,
    /// Programs in this batch, and the one that runs.
    count: usize,
    index: usize,
    running: bool,
    fsgsbase: bool,
}

static mut CHILD: Child = Child {
    shared: ptr::null_mut(),
    code_alias: ptr::null_mut(),
    go: -1,
    done: -1,
    count: 0,
    index: 0,
    running: false,
    fsgsbase: false,
};

/// Signals that exceptions arrive as.
const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];
const SIGNAL_STACK: usize = 256 << 10;

fn child_main(shared: *mut Shared, go: i32, done: i32) -> ! {
    // SAFETY: single-threaded from here on; only system calls. Whatever fails is reported and ends the process.
    unsafe {
        CHILD.shared = shared;
        CHILD.go = go;
        CHILD.done = done;
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let facts = &(*shared).facts;
        if let Err(step) = prepare(facts) {
            facts.error.store(*libc::__errno_location() as u32, Ordering::SeqCst);
            facts.state.store(100 + step, Ordering::SeqCst);
            libc::_exit(1);
        }
        // Into the handler, for ever.
        asm!("ud2", options(noreturn));
    }
}

unsafe fn prepare(facts: &Facts) -> Result<(), u32> {
    // SAFETY: maps fixed ranges that must be free; everything else is plain system calls.
    unsafe {
        let memfd = libc::memfd_create(c"code".as_ptr(), libc::MFD_CLOEXEC);
        if memfd < 0 || libc::ftruncate(memfd, CODE_LEN as i64) != 0 {
            return Err(1);
        }
        let (rw, rx) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
        CHILD.code_alias = map(0, CODE_LEN, rw, memfd).ok_or(2u32)?;
        map(CODE, CODE_LEN, rx, memfd).ok_or(3u32)?;
        map(WRITABLE_CODE, CODE_LEN, rw | rx, memfd).ok_or(11u32)?;
        map(DATA, DATA_LEN, rw, -1).ok_or(4u32)?;
        map(STACK, STACK_LEN, rw, -1).ok_or(5u32)?;
        let constants = map(CONSTANTS, PAGE as usize, rw, -1).ok_or(6u32)?;
        constants.copy_from(addr_of_mut!((*CHILD.shared).constants).cast(), PAGE as usize);
        if libc::mprotect(constants.cast(), PAGE as usize, libc::PROT_READ) != 0 {
            return Err(7);
        }
        let stack = map(0, SIGNAL_STACK, rw, -1).ok_or(8u32)?;
        let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: SIGNAL_STACK };
        if libc::sigaltstack(&raw const stack, ptr::null_mut()) != 0 {
            return Err(9);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in SIGNALS {
            if libc::sigaction(signal, &raw const action, ptr::null_mut()) != 0 {
                return Err(10);
            }
        }
        facts.has_ldt.store(u32::from(set_ldt()), Ordering::SeqCst);
        const HWCAP2_FSGSBASE: u64 = 1 << 1;
        CHILD.fsgsbase = libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0;
        facts.has_fsgsbase.store(u32::from(CHILD.fsgsbase), Ordering::SeqCst);
        if !CHILD.fsgsbase {
            const ARCH_SET_GS: i32 = 0x1001;
            const ARCH_SET_FS: i32 = 0x1002;
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE);
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_FS, FS_BASE);
        }
        // Best effort: without it a program that runs wild could do more than crash.
        libc::prctl(libc::PR_SET_SECCOMP, 1);
        Ok(())
    }
}

/// Maps at `at`, or anywhere if that is 0.
unsafe fn map(at: u64, len: usize, protection: i32, fd: i32) -> Option<*mut u8> {
    let place = if at != 0 { libc::MAP_FIXED_NOREPLACE } else { 0 };
    let kind = if fd >= 0 { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
    // SAFETY: the caller's range, replacing nothing.
    let got = unsafe { libc::mmap(at as *mut libc::c_void, len, protection, kind | place | libc::MAP_POPULATE, fd, 0) };
    (got != libc::MAP_FAILED && (at == 0 || got as u64 == at)).then_some(got.cast())
}

/// Fills the local descriptor table. A container's policy may forbid it.
unsafe fn set_ldt() -> bool {
    LDT.iter().enumerate().all(|(index, entry)| {
        // struct user_desc of the kernel.
        let contents = u32::from(entry.kind >> 2 & 3);
        let read_exec_only = u32::from(entry.kind & 2 == 0);
        let flags =
            u32::from(entry.big) | contents << 1 | read_exec_only << 3 | u32::from(!entry.present) << 5 | 1 << 6;
        let descriptor = [index as u32, entry.base, entry.limit, flags];
        const WRITE_NEW: i32 = 0x11;
        // SAFETY: the kernel reads the 16 bytes.
        unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE_NEW, descriptor.as_ptr(), 16usize) == 0 }
    })
}

/// Where the kernel delivers signals to. What the program left in the flags and in the segment registers would
/// disturb compiled code, or be lost when it runs.
#[unsafe(naked)]
unsafe extern "C" fn entry() {
    naked_asm!(
        "push 2",
        "popfq",
        "sub rsp, 40",
        "mov eax, es",
        "mov [rsp], eax",
        "mov eax, ds",
        "mov [rsp + 4], eax",
        "mov eax, fs",
        "mov [rsp + 8], eax",
        "mov eax, gs",
        "mov [rsp + 12], eax",
        "mov rdi, rdx",
        "mov rsi, rsp",
        "call {handler}",
        "add rsp, 40",
        "ret",
        handler = sym on_signal,
    )
}

/// Places of RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15 in a signal frame.
const GPR: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];

unsafe extern "C" fn on_signal(context: *mut libc::ucontext_t, selectors: *const [u32; 4]) {
    // SAFETY: the kernel's frame and the one child of this process. Nothing here may touch thread-local storage, which
    // lies wherever a program's FS base points to.
    unsafe {
        let child = &mut *addr_of_mut!(CHILD);
        let shared = child.shared;
        if child.running {
            let use_xsave = (*shared).inputs.as_ptr().add(child.index).read_use_xsave();
            let outcome = addr_of_mut!((*shared).outcomes).cast::<Outcome>().add(child.index);
            save(child, &mut *outcome, context, &*selectors, use_xsave);
            child.index += 1;
        } else {
            note_xsave(&(*shared).facts, context);
            (*shared).facts.state.store(1, Ordering::SeqCst);
            child.running = true;
            child.count = 0;
        }
        while child.index >= child.count {
            let mut byte = 0u8;
            raw_syscall(libc::SYS_write, child.done, &raw mut byte);
            if raw_syscall(libc::SYS_read, child.go, &raw mut byte) != 1 {
                raw_syscall(libc::SYS_exit, 0, ptr::null_mut());
            }
            child.count = usize::from(byte);
            child.index = 0;
        }
        (*shared).position.store(child.index as u32, Ordering::SeqCst);
        let input = addr_of_mut!((*shared).inputs).cast::<Input>().add(child.index);
        load(child, &*input, context);
    }
}

trait ReadField {
    unsafe fn read_use_xsave(self) -> bool;
}
impl ReadField for *const Input {
    unsafe fn read_use_xsave(self) -> bool {
        // SAFETY: the caller's promise that it points to an input.
        unsafe { (*self).use_xsave != 0 }
    }
}

/// A system call on one byte; `libc`'s would write `errno`.
unsafe fn raw_syscall(number: i64, fd: i32, byte: *mut u8) -> i64 {
    let result;
    // SAFETY: the kernel reads or writes one byte.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") fd, in("rsi") byte, in("rdx") 1,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Software-reserved bytes of the kernel's FXSAVE image.
const SW_RESERVED: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;

/// Length of the XSAVE area in a signal frame.
unsafe fn frame_xsave(context: *mut libc::ucontext_t) -> (*mut u8, usize, u64) {
    // SAFETY: the kernel's frame.
    unsafe {
        let area = (*context).uc_mcontext.fpregs.cast::<u8>();
        let magic = area.add(SW_RESERVED).cast::<u32>().read_unaligned();
        if magic != FP_XSTATE_MAGIC1 {
            return (area, 512, 3);
        }
        let features = area.add(SW_RESERVED + 8).cast::<u64>().read_unaligned();
        let len = area.add(SW_RESERVED + 16).cast::<u32>().read_unaligned();
        (area, (len as usize).min(XSAVE_LEN), features)
    }
}

unsafe fn note_xsave(facts: &Facts, context: *mut libc::ucontext_t) {
    // SAFETY: the caller's.
    let (_, len, features) = unsafe { frame_xsave(context) };
    facts.xsave_len.store(len as u32, Ordering::SeqCst);
    facts.xfeatures.store(features, Ordering::SeqCst);
}

unsafe fn save(
    child: &Child,
    outcome: &mut Outcome,
    context: *mut libc::ucontext_t,
    selectors: &[u32; 4],
    use_xsave: bool,
) {
    // SAFETY: the kernel's frame; the areas are mapped.
    unsafe {
        let frame = &(*context).uc_mcontext.gregs;
        for (value, place) in outcome.gpr.iter_mut().zip(GPR) {
            *value = *frame.as_ptr().add(place) as u64;
        }
        outcome.rip = frame[16] as u64;
        outcome.rflags = frame[17] as u64;
        let cs_ss = frame[18] as u64;
        outcome.error = frame[19] as u64;
        outcome.vector = frame[20] as u64;
        outcome.cr2 = frame[22] as u64;
        let [es, ds, fs, gs] = *selectors;
        outcome.selectors = [es as u16, cs_ss as u16, (cs_ss >> 48) as u16, ds as u16, fs as u16, gs as u16];
        (outcome.fs_base, outcome.gs_base) = (FS_BASE, GS_BASE);
        if child.fsgsbase {
            asm!("rdfsbase {0}", "rdgsbase {1}", out(reg) outcome.fs_base, out(reg) outcome.gs_base, options(nostack));
        }
        let memory = outcome.memory.as_mut_ptr();
        ptr::copy_nonoverlapping(DATA as *const u8, memory, DATA_LEN);
        ptr::copy_nonoverlapping(STACK as *const u8, memory.add(DATA_LEN), STACK_LEN);
        outcome.has_xsave = u16::from(use_xsave);
        if use_xsave {
            let (area, len, _) = frame_xsave(context);
            ptr::copy_nonoverlapping(area, outcome.xsave.as_mut_ptr(), len);
        }
    }
}

unsafe fn load(child: &mut Child, input: &Input, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel's frame; the areas are mapped; the parent keeps lengths in bounds.
    unsafe {
        // All of it: the last program may have written beyond its own code.
        child.code_alias.write_bytes(FILLER, CODE_LEN);
        let place = child.code_alias.add(input.code_at as usize);
        place.copy_from_nonoverlapping(input.code.as_ptr(), input.code_len as usize);
        let image = addr_of_mut!((*child.shared).images).cast::<u8>().add(usize::from(input.image) * MEMORY_LEN);
        ptr::copy_nonoverlapping(image, DATA as *mut u8, DATA_LEN);
        ptr::copy_nonoverlapping(image.add(DATA_LEN), STACK as *mut u8, STACK_LEN);
        if input.use_xsave != 0 {
            let (area, len, _) = frame_xsave(context);
            area.copy_from_nonoverlapping(input.xsave.as_ptr(), SW_RESERVED);
            if len > 512 {
                area.add(512).copy_from_nonoverlapping(input.xsave.as_ptr().add(512), len - 512);
            }
        }
        let frame = &mut (*context).uc_mcontext.gregs;
        for (value, place) in input.gpr.iter().zip(GPR) {
            *frame.as_mut_ptr().add(place) = *value as i64;
        }
        frame[16] = input.rip as i64;
        frame[17] = input.rflags as i64;
        let [es, cs, ss, ds, fs, gs] = input.selectors;
        frame[18] = (u64::from(cs) | u64::from(ss) << 48) as i64;
        // UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS.
        const UC_FLAGS: u64 = 7;
        ptr::write((&raw mut (*context).uc_flags).cast::<u64>(), UC_FLAGS);
        asm!("mov es, {0:e}", "mov ds, {1:e}", "mov fs, {2:e}", "mov gs, {3:e}",
            in(reg) u32::from(es), in(reg) u32::from(ds), in(reg) u32::from(fs), in(reg) u32::from(gs), options(nostack));
        if child.fsgsbase && fs == 0 && gs == 0 {
            asm!("wrfsbase {0}", "wrgsbase {1}", in(reg) input.fs_base, in(reg) input.gs_base, options(nostack));
        }
    }
}
