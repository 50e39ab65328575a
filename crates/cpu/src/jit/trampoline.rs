//! The two gates between Rust and emitted code, themselves emitted: one way in, one way out.
//!
//! On the way out all guest registers and flags go to the vCPU, so that Rust finds the complete state; on the way in they
//! come from there. Emitted code leaves by jumping to a trampoline, with the number of a site in ECX that says why: not by a call,
//! which would put the host's prediction of returns out of step.

use super::context::at;
use crate::translate::asm::{Asm, Mem, cond, reg::*};
use platform::x86::gpr;

/// Guest registers that live in a host register: (guest, host).
const RESIDENT: [(usize, u8); 11] = [
    (gpr::RCX, R12),
    (gpr::RDX, RDX),
    (gpr::RBX, RBX),
    (gpr::RSP, R13),
    (gpr::RBP, RBP),
    (gpr::RSI, RSI),
    (gpr::RDI, RDI),
    (8, 8),
    (9, 9),
    (10, 10),
    (11, 11),
];
/// Host registers that the calling convention preserves.
const PRESERVED: [u8; 6] = [RBX, RBP, R12, R13, R14, R15];

/// Arena offsets of the trampolines.
#[derive(Clone, Copy, Default)]
pub(crate) struct Trampolines {
    /// `extern "sysv64" fn(*mut Context, *const u8)`: runs code until it leaves.
    pub(crate) enter: u32,
    /// Runs one operation in the interpreter.
    pub(crate) op: u32,
    /// Binds a direct branch to its target.
    pub(crate) link: u32,
    /// Looks up the target of an indirect branch, in R15.
    pub(crate) branch: u32,
    /// Leaves for an event.
    pub(crate) event: u32,
    /// Loading and saving of 16 vector registers of 256 bits, and of 32 of 512 bits with opmasks; 0 where the host lacks them.
    pub(crate) vectors: [(u32, u32); 2],
}

/// The Rust functions that trampolines call: (context, number of the site) to where to go on, or null to leave.
pub(crate) struct Targets {
    pub(crate) op: usize,
    pub(crate) link: usize,
    pub(crate) branch: usize,
    pub(crate) event: usize,
}

/// Leaves by a trampoline: [`LEAVE`] bytes.
pub(crate) fn leave(asm: &mut Asm, trampoline: u32, site: u32) {
    // MOV ECX, imm32
    asm.u8(0xb9);
    asm.u32(site);
    asm.jmp(trampoline);
}

/// Bytes of [`leave`].
pub(crate) const LEAVE: u32 = 10;

/// Emits the trampolines.
pub(crate) fn emit(asm: &mut Asm, targets: &Targets) -> Trampolines {
    let mut trampolines = Trampolines { enter: asm.here(), ..Default::default() };
    for r in PRESERVED {
        push(asm, r);
    }
    // SUB RSP, 8: aligned for calls.
    asm.put(&[0x48, 0x83, 0xec, 8]);
    asm.store(&Mem::base(RDI, at!(host_rsp)), RSP);
    asm.mov(RSP, RDI);
    asm.mov(RAX, RSI);
    let resume = asm.here();
    emit_resume(asm);
    trampolines.op = emit_leave(asm, targets.op, resume);
    trampolines.link = emit_leave(asm, targets.link, resume);
    trampolines.branch = emit_leave(asm, targets.branch, resume);
    trampolines.event = emit_leave(asm, targets.event, resume);
    let width = super::run::vector_width();
    if width >= 32 {
        trampolines.vectors[0] = (emit_vectors(asm, false, true), emit_vectors(asm, false, false));
    }
    if width >= 64 {
        trampolines.vectors[1] = (emit_vectors(asm, true, true), emit_vectors(asm, true, false));
    }
    trampolines
}

/// A function that loads or saves the vector registers. Uses RCX when loading, RAX and RCX when saving; keeps flags.
fn emit_vectors(asm: &mut Asm, wide: bool, load: bool) -> u32 {
    use crate::interp::fpu::FpuState;
    let start = asm.here();
    // The caller's return address is on the stack.
    let field = |disp: i32| Mem::context(disp + 8);
    asm.load(RCX, &field(at!(fpu)));
    let vectors = std::mem::offset_of!(FpuState, vectors) as u32;
    let opcode = if load { 0x10 } else { 0x11 };
    let mut loaded = None;
    if load {
        or_upper_parts(asm, wide, vectors);
        let narrow = asm.jrcxz();
        let full = asm.jmp_forward();
        asm.bind(narrow);
        // VZEROUPPER: nothing else lets a Zen 4 forget that there were upper parts, in whichever register.
        asm.put(&[0xc5, 0xf8, 0x77]);
        asm.load(RCX, &field(at!(fpu)));
        for n in 0..16u8 {
            // VMOVUPS of an XMM register, [RCX + disp32]
            asm.put(&[0xc5, (!n >> 3 & 1) << 7 | 0x78, 0x10, 0x81 | (n & 7) << 3]);
            asm.u32(vectors + 64 * u32::from(n));
        }
        loaded = Some(asm.jmp_forward());
        asm.bind(full);
        asm.load(RCX, &field(at!(fpu)));
    }
    for n in 0..16u8 {
        move_register(asm, wide, opcode, n, vectors);
    }
    if let Some(loaded) = loaded {
        asm.bind(loaded);
    }
    for n in 16..if wide { 32u8 } else { 16 } {
        move_register(asm, wide, opcode, n, vectors);
    }
    if wide {
        let masks = std::mem::offset_of!(FpuState, opmasks) as u32;
        for n in 0..8u8 {
            // KMOVQ
            asm.put(&[0xc4, 0xe1, 0xf8, if load { 0x90 } else { 0x91 }, 0x81 | n << 3]);
            asm.u32(masks + 8 * u32::from(n));
        }
    }
    if load {
        // LDMXCSR of the guest's
        asm.op_mem(false, &[0x0f, 0xae], 2, &field(at!(mxcsr)));
        // MOV ECX, 0
        asm.mov_imm(RCX, 0);
        asm.store(&field(at!(unloaded)), RCX);
    } else {
        // STMXCSR, LDMXCSR of the host's, VZEROUPPER
        asm.op_mem(false, &[0x0f, 0xae], 3, &field(at!(mxcsr)));
        asm.op_mem(false, &[0x0f, 0xae], 2, &field(at!(host_mxcsr)));
        asm.put(&[0xc5, 0xf8, 0x77]);
    }
    asm.u8(0xc3);
    start
}

/// VMOVUPS of a YMM or ZMM register, [RCX + disp32].
fn move_register(asm: &mut Asm, wide: bool, opcode: u8, n: u8, vectors: u32) {
    if wide {
        asm.put(&[0x62, (!n >> 3 & 1) << 7 | 0x60 | (!n >> 4 & 1) << 4 | 1, 0x7c, 0x48]);
    } else {
        asm.put(&[0xc5, (!n >> 3 & 1) << 7 | 0x7c]);
    }
    asm.put(&[opcode, 0x81 | (n & 7) << 3]);
    asm.u32(vectors + 64 * u32::from(n));
}

/// RCX = 0 if bits from 128 on of the first 16 vector registers at [RCX] are zero. Such registers are better loaded without
/// these bits: the CPU knows then that they are zero, and that an SSE instruction need not wait for what its destination held.
fn or_upper_parts(asm: &mut Asm, wide: bool, vectors: u32) {
    for n in 0..16u32 {
        // VMOVDQU64 ZMM0, [RCX + disp32] or VMOVUPS YMM0; VPORQ ZMM0, ZMM0 or VORPS YMM0, YMM0
        match (wide, n) {
            (true, 0) => asm.put(&[0x62, 0xf1, 0xfe, 0x48, 0x6f, 0x81]),
            (true, _) => asm.put(&[0x62, 0xf1, 0xfd, 0x48, 0xeb, 0x81]),
            (false, 0) => asm.put(&[0xc5, 0xfc, 0x10, 0x81]),
            (false, _) => asm.put(&[0xc5, 0xfc, 0x56, 0x81]),
        }
        asm.u32(vectors + 64 * n);
    }
    if wide {
        // VPTESTMQ K1, ZMM0, ZMM0; KSHIFTRW K1, K1, 2; KMOVW ECX, K1
        asm.put(&[0x62, 0xf2, 0xfd, 0x48, 0x27, 0xc8]);
        asm.put(&[0xc4, 0xe3, 0xf9, 0x30, 0xc9, 2, 0xc5, 0xf8, 0x93, 0xc9]);
    } else {
        // VEXTRACTF128 XMM0, YMM0, 1; VPUNPCKHQDQ XMM1, XMM0, XMM0; VPOR XMM0, XMM0, XMM1; VMOVQ RCX, XMM0
        asm.put(&[0xc4, 0xe3, 0x7d, 0x19, 0xc0, 1, 0xc5, 0xf9, 0x6d, 0xc8]);
        asm.put(&[0xc5, 0xf9, 0xeb, 0xc1, 0xc4, 0xe1, 0xf9, 0x7e, 0xc1]);
    }
}

fn push(asm: &mut Asm, r: u8) {
    if r > 7 {
        asm.u8(0x41);
    }
    asm.u8(0x50 | r & 7);
}

fn pop(asm: &mut Asm, r: u8) {
    if r > 7 {
        asm.u8(0x41);
    }
    asm.u8(0x58 | r & 7);
}

/// Loads the guest's registers and goes to the code in RAX.
fn emit_resume(asm: &mut Asm) {
    asm.store(&Mem::context(at!(target)), RAX);
    // Code that was left with the vector registers loaded goes on with them loaded.
    asm.load(RCX, &Mem::context(at!(unloaded)));
    let load = asm.jrcxz();
    let skip = asm.jmp_forward();
    asm.bind(load);
    asm.op_mem(false, &[0xff], 2, &Mem::context(at!(load)));
    asm.bind(skip);
    asm.load(RAX, &Mem::context(at!(flags)));
    // ADD AL, 127 gives OF = bit 0; SAHF leaves it.
    asm.put(&[0x04, 0x7f, 0x9e]);
    asm.load(RCX, &Mem::context(at!(regs)));
    for i in 0..4 {
        asm.load(R14, &Mem::base(RCX, 8 * (12 + i)));
        asm.store(&Mem::context(at!(r12) + 8 * i), R14);
    }
    for (guest, host) in RESIDENT {
        asm.load(host, &Mem::base(RCX, 8 * guest as i32));
    }
    asm.load(RAX, &Mem::base(RCX, 0));
    asm.load(R15, &Mem::context(at!(linear)));
    // JMP [target]
    asm.op_mem(false, &[0xff], 4, &Mem::context(at!(target)));
}

/// Stores the guest's registers, calls `function`, and resumes or returns to whoever entered.
fn emit_leave(asm: &mut Asm, function: usize, resume: u32) -> u32 {
    let start = asm.here();
    let field = Mem::context;
    asm.store(&field(at!(site)), RCX);
    asm.store(&field(at!(scratch)), RAX);
    // LAHF; SETO AL
    asm.put(&[0x9f, 0x0f, 0x90, 0xc0]);
    asm.store(&field(at!(flags)), RAX);
    asm.load(RCX, &field(at!(regs)));
    for (guest, host) in RESIDENT {
        asm.store(&Mem::base(RCX, 8 * guest as i32), host);
    }
    asm.load(RAX, &field(at!(scratch)));
    asm.store(&Mem::base(RCX, 0), RAX);
    for i in 0..4 {
        asm.load(RAX, &field(at!(r12) + 8 * i));
        asm.store(&Mem::base(RCX, 8 * (12 + i)), RAX);
    }
    asm.store(&field(at!(linear)), R15);
    asm.load(RCX, &field(at!(unloaded)));
    let save = asm.jrcxz();
    let skip = asm.jmp_forward();
    asm.bind(save);
    asm.op_mem(false, &[0xff], 2, &field(at!(save)));
    asm.bind(skip);
    asm.load32(RSI, &field(at!(site)));
    asm.mov(RDI, RSP);
    asm.mov(RBX, RSP);
    asm.load(RSP, &Mem::base(RDI, at!(host_rsp)));
    asm.mov_imm(RAX, function as u64);
    // CALL RAX; TEST RAX, RAX
    asm.put(&[0xff, 0xd0, 0x48, 0x85, 0xc0]);
    let out = asm.jcc_short(cond::Z);
    asm.mov(RSP, RBX);
    asm.jmp(resume);
    asm.bind(out);
    // ADD RSP, 8
    asm.put(&[0x48, 0x83, 0xc4, 8]);
    for r in PRESERVED.into_iter().rev() {
        pop(asm, r);
    }
    asm.u8(0xc3);
    start
}
