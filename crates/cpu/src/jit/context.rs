//! The context block: what emitted code reaches from its one fixed register, RSP.
//!
//! ```text
//!  low addresses   [ stack for calls into trampolines and for signal handlers ]
//!  RSP ->          [ Context                                                  ]
//!                  [ per access mode: TLB (read, write, addend), jump cache   ]
//!                  [ per access mode: jump cache of other than 64-bit code    ]
//!                  [ a word that says that events are pending                 ]
//! ```

use crate::Vcpu;

/// Entries of a TLB table and of a jump cache: indexed by 16 bits.
pub(crate) const ENTRIES: usize = 1 << 16;
/// Access modes that have tables: supervisor, user, supervisor with SMAP out of force.
pub(crate) const MODES: usize = 3;
/// Bytes of stack below the context block: signal handlers of the process may run there.
pub(crate) const STACK: usize = 256 << 10;
/// Where the tables begin, from the context block.
const TABLES: usize = 0x1000;
const TABLE: usize = ENTRIES * 8;
const JUMPS: usize = ENTRIES * 16;
const MODE_STRIDE: usize = 3 * TABLE + JUMPS;
/// Jump caches: per access mode one for 64-bit code, and from number [`MODES`] on one for other code.
pub(crate) const JUMP_CACHES: usize = 2 * MODES;
/// Bytes of the whole allocation.
pub(crate) const SIZE: usize = STACK + TABLES + MODES * MODE_STRIDE + MODES * JUMPS + super::quiet::PAGE;
/// Where [`super::quiet::Quiet`] is, from the context block.
pub(crate) const QUIET: i32 = (SIZE - STACK - super::quiet::PAGE + super::quiet::OFFSET) as i32;

/// Offsets of the tables of one access mode from the context block.
pub(crate) mod table {
    use super::{JUMPS, MODE_STRIDE, MODES, TABLE, TABLES};
    /// Negated linear address of the page that may be read.
    pub(crate) const fn read(mode: usize) -> i32 {
        (TABLES + mode * MODE_STRIDE) as i32
    }
    /// Negated linear address of the page that may be written.
    pub(crate) const fn write(mode: usize) -> i32 {
        read(mode) + TABLE as i32
    }
    /// Host address minus linear address.
    pub(crate) const fn addend(mode: usize) -> i32 {
        read(mode) + 2 * TABLE as i32
    }
    /// Pairs of negated RIP and host code: of 64-bit code by its access mode, of other code by that plus [`MODES`].
    pub(crate) const fn jumps(cache: usize) -> i32 {
        if cache < MODES { read(cache) + 3 * TABLE as i32 } else { read(MODES) + ((cache - MODES) * JUMPS) as i32 }
    }
}

/// The fields. Emitted code uses their offsets; the first sixteen fit a one-byte displacement.
#[repr(C)]
pub(crate) struct Context {
    /// Linear address of the code page that runs.
    pub(crate) page: u64,
    /// Guest registers that have no host register of their own.
    pub(crate) r12: [u64; 4],
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    /// All ones but the offset in a page.
    pub(crate) page_mask: u64,
    /// Zero while the guest's vector registers and MXCSR are in the host's.
    pub(crate) unloaded: u64,
    /// R15 when a trampoline was called: a linear address or the target of an indirect branch.
    pub(crate) linear: u64,
    /// Arithmetic flags: AH as LAHF stores it in bits 15:8, OF in bit 0.
    pub(crate) flags: u64,
    pub(crate) scratch: u64,
    pub(crate) scratch2: u64,
    /// Iterations of a loop until its accesses are to be checked (again): see [`crate::translate::ahead`].
    pub(crate) left: u64,
    /// Guest register file in the vCPU.
    pub(crate) regs: u64,
    pub(crate) host_rsp: u64,
    pub(crate) target: u64,
    /// Number of the site where a trampoline was taken.
    pub(crate) site: u64,
    pub(crate) vcpu: *mut Vcpu,
    /// As `page_mask`, with the low bits of an aligned offset.
    pub(crate) page_mask16: u64,
    pub(crate) page_mask32: u64,
    pub(crate) page_mask64: u64,
    /// Address of the vCPU's vector registers' struct, and of the code that loads and saves them.
    pub(crate) fpu: u64,
    pub(crate) load: u64,
    pub(crate) save: u64,
    /// MXCSR of the guest and of the host.
    pub(crate) mxcsr: u64,
    pub(crate) host_mxcsr: u64,
    /// Distances between host and linear addresses that groups of accesses share while a block runs.
    pub(crate) addends: [u64; crate::translate::share::SLOTS],
    /// RFLAGS.DF.
    pub(crate) backward: u64,
    /// Outside 64-bit mode: 0 if FS is writable data up to 4 GiB from its base, else what makes every address miss. The same for GS.
    pub(crate) fs_closed: u64,
    pub(crate) gs_closed: u64,
    pub(crate) calls: super::calls::FastCalls,
    /// [`crate::HostCounter`]: negated base, and address of the highest value read.
    pub(crate) tsc_base: u64,
    pub(crate) tsc_highest: u64,
}

/// Offset of a field.
macro_rules! at {
    ($field:ident) => {
        std::mem::offset_of!($crate::jit::context::Context, $field) as i32
    };
}
pub(crate) use at;
