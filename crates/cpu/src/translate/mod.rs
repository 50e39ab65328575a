//! The translator: from a run of guest instructions to host code that is mostly the same instructions.
//!
//! | file        | what it decides                                                             |
//! |-------------|-----------------------------------------------------------------------------|
//! | [`asm`]     | how host instructions are written                                           |
//! | [`course`]  | which instructions a block has, and where it ends                            |
//! | [`block`]   | in what order they are emitted                                               |
//! | [`classify`]| which instructions run natively, and which in the interpreter                |
//! | [`flags`]   | which arithmetic flags the manuals leave undefined                          |
//! | [`memory`]  | addresses and the inline TLB check                                          |
//! | [`rewrite`] | a guest instruction with its registers and memory operand exchanged          |
//! | [`held`]    | which of guest R12–R15 scratch registers hold                                |
//! | [`loose`]   | which checks need not keep the flags                                         |
//! | [`control`] | branches, calls, returns, and how blocks hang together                       |
//! | [`share`]   | which accesses need one check together                                       |
//! | [`ahead`]   | loops whose accesses are checked for many iterations at once                |
//! | [`values`]  | what is known of register contents, for that                                 |
//! | [`stack`]   | PUSH, POP, LEAVE                                                            |
//! | [`legacy`]  | what differs outside 64-bit mode                                            |
//! | [`divide`]  | DIV, IDIV                                                                   |
//! | [`string`]  | MOVS, STOS, LODS                                                            |
//! | [`exchange`]| wide compare and exchange, bit strings                                      |
//! | [`system`]  | system instructions that need not leave emitted code                         |
//! | [`vector`]  | MMX, SSE, AVX, AVX-512 with the registers in place                          |
//! | [`x87`]     | x87 with the registers in place                                             |
//!
//! Registers: guest RAX, RDX, RBX, RBP, RSI, RDI, R8–R11 are in the host registers of the same name, guest RCX in R12, guest
//! RSP in R13, guest R12–R15 in the context block. RCX, R14, R15 are scratch, RSP points to the context block. Guest
//! arithmetic flags are the host's.
//!
//! A block does not know its linear address, only its offset in the page, so that it serves every mapping of the page: the
//! address of the page that runs is in the context block.
//!
//! Outside 64-bit mode registers, addresses and stack words have 32 bits, and host registers hold zeroes above them.
//!
//! Whatever is emitted around the guest's instructions leaves the flags alone, or can bring them back ([`loose`]), so that they are
//! right wherever emitted code is left, in a fault's frame too.

mod ahead;
pub(crate) mod asm;
pub(crate) mod block;
mod classify;
mod control;
pub(crate) mod course;
mod divide;
mod exchange;
pub(crate) mod flags;
mod held;
mod legacy;
mod loose;
mod memory;
mod rewrite;
pub(crate) mod share;
mod stack;
mod string;
pub(crate) mod system;
mod values;
pub(crate) mod vector;
mod x87;

use crate::decode::Op;

/// A place where emitted code calls a trampoline, and why. Offsets are relative to the page of the block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    pub(crate) kind: SiteKind,
    /// Access mode that the block was made for.
    pub(crate) access: u8,
    pub(crate) block: u32,
    /// The code behind it expects the x87 registers in the host's.
    pub(crate) x87: bool,
}

/// See [`Site`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum SiteKind {
    /// An operation for the interpreter.
    Op {
        op: Op,
        /// Offset of the instruction.
        start: u32,
        /// Arena offset of the code behind the instruction.
        resume: u32,
        /// The instruction ends its block.
        ends: bool,
        /// The linear address of a memory access is in the context block.
        memory: bool,
        /// What follows in the block takes the vector registers to be loaded, if they were.
        vectors: bool,
        /// What instruction it is, for statistics.
        code: iced_x86::Code,
    },
    /// A direct branch inside the page.
    Link {
        /// Arena offset of the branch's displacement.
        patch: u32,
        target: u32,
        /// If not 0: to a version of so many instructions from `target` on, where every access has its own check.
        alone: u8,
    },
    /// An indirect branch: the target is in the context block.
    Branch {
        /// Offset of the instruction.
        start: u32,
        /// To be added to RSP if the target turns out to be impossible.
        undo: i32,
    },
    /// An event interrupts a loop; execution goes on at an offset.
    Event { target: u32 },
}

/// Host register of a guest register, if it has one.
pub(crate) fn resident(guest: u8) -> Option<u8> {
    match guest {
        1 => Some(asm::reg::R12),
        4 => Some(asm::reg::R13),
        0..=11 => Some(guest),
        _ => None,
    }
}

/// The context field of a guest register without a host register.
pub(crate) fn spilled(guest: u8) -> asm::Mem {
    asm::Mem::context(crate::jit::context::at!(r12) + 8 * (i32::from(guest & 15) - 12))
}
