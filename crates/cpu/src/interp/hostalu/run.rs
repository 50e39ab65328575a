//! The handlers of instructions that run as stubs.
#![allow(unsafe_code)]

use iced_x86::{EncodingKind, Instruction, Mnemonic};
use platform::x86::{gpr, rflags, seg};

use super::super::fpu::FpuState;
use super::super::gate::{Avx, Avx512, Gate, Mmx, Sse, SseMmx, X87};
use super::super::operand::stack_error;
use super::plan::{Class, Memory, Plan, name};
use crate::decode::{Choice, Decoding, Handler, Op, next, op_flag};
use crate::state::ZERO;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// Where results go that nobody wants: an unused entry of the register file.
pub(super) const SINK: u8 = 31;

/// What the general handlers have to do, in `op.r3`.
pub(super) mod detail {
    pub(crate) const LOAD: u8 = 1 << 0;
    pub(crate) const STORE: u8 = 1 << 1;
    /// The memory operand must be aligned.
    pub(crate) const ALIGNED: u8 = 1 << 2;
    /// The memory operand must be aligned unless MXCSR.MM is set.
    pub(crate) const ALIGNED_SSE: u8 = 1 << 3;
    pub(crate) const MXCSR: u8 = 1 << 4;
    pub(crate) const READS_FLAGS: u8 = 1 << 5;
    pub(crate) const WRITES_FLAGS: u8 = 1 << 6;
    /// PCMPESTRI, PCMPESTRM.
    pub(crate) const LENGTHS: u8 = 1 << 7;
}

/// Beside the scale in `op.scale` of x87 operations: the CPU notes FDP on unmasked exceptions only (CPUID.07H.0:EBX[6]).
const FDP_EXCEPTIONS_ONLY: u8 = 1 << 7;

/// MXCSR.MM: AMD's misaligned-SSE mode.
const MXCSR_MM: u32 = 1 << 17;

/// Calls the stub at `address`.
#[inline(always)]
fn call(address: u64, fpu: &mut FpuState, a: u64, b: u64) -> u64 {
    // SAFETY: callers pass an address that `HostAlu` made for a block that is still cached: the arena is only reset
    // together with the block cache. A stub reads and writes the context alone, and leaves control registers as they were.
    unsafe {
        let stub = std::mem::transmute::<u64, unsafe extern "sysv64" fn(*mut FpuState, u64, u64) -> u64>(address);
        stub(fpu, a, b)
    }
}

/// Registers only, and neither MXCSR nor flags.
fn plain<G: Gate>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    G::place(&mut vcpu.fpu);
    let a = vcpu.regs[usize::from(op.r1 & 31)];
    vcpu.regs[usize::from(op.r2 & 31)] = call(op.imm, &mut vcpu.fpu, a, 0);
    Ok(())
}

/// A memory source of `N` bytes, and neither MXCSR nor flags.
fn plain_load<G: Gate, const N: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let linear = vcpu.linear(op, N as u64, false)?;
    check_alignment(vcpu, op, linear)?;
    vcpu.load_block::<N>(linear, |fpu| &mut fpu.bounce).map_err(|trap| stack_error(op, trap))?;
    G::place(&mut vcpu.fpu);
    vcpu.regs[usize::from(op.r2 & 31)] = call(op.imm, &mut vcpu.fpu, 0, 0);
    Ok(())
}

/// Everything but x87 and masked memory operands.
fn general<G: Gate>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let mut linear = 0;
    if op.r3 & (detail::LOAD | detail::STORE) != 0 {
        linear = vcpu.linear(op, u64::from(op.osize), op.r3 & detail::STORE != 0)?;
        check_alignment(vcpu, op, linear)?;
        if op.r3 & detail::LOAD != 0 {
            load_operand(vcpu, op, linear)?;
        } else {
            // MMX instructions change x87 state in the stub: the store must be known to succeed.
            vcpu.probe_write(linear, u64::from(op.osize)).map_err(|trap| stack_error(op, trap))?;
        }
    }
    G::place(&mut vcpu.fpu);
    let result = call_general(vcpu, op).inspect_err(|_| G::faulted(&mut vcpu.fpu))?;
    if op.r3 & detail::STORE != 0 {
        store_operand(vcpu, op, linear)?;
    }
    commit(vcpu, op, result);
    Ok(())
}

/// Runs the stub; an unmasked floating-point exception leaves everything but MXCSR as it was.
pub(super) fn call_general(vcpu: &mut Vcpu, op: &Op) -> Step<u64> {
    if op.r3 & detail::READS_FLAGS != 0 {
        vcpu.fpu.stub_flags = vcpu.rflags() & rflags::ARITHMETIC | rflags::FIXED;
    }
    let (a, b) = if op.r3 & detail::LENGTHS != 0 {
        (vcpu.regs[gpr::RAX], vcpu.regs[gpr::RDX])
    } else {
        (vcpu.regs[usize::from(op.r1 & 31)], 0)
    };
    let result = call(op.imm, &mut vcpu.fpu, a, b);
    if op.r3 & detail::MXCSR != 0 && vcpu.fpu.raised & vcpu.fpu.unmasked != 0 {
        return Err(numeric_fault(vcpu, op, a, b));
    }
    Ok(result)
}

/// Makes flags and the general-purpose result visible.
pub(super) fn commit(vcpu: &mut Vcpu, op: &Op, result: u64) {
    if op.r3 & detail::MXCSR != 0 {
        let raised = vcpu.fpu.raised;
        vcpu.fpu.raise_mxcsr(raised);
    }
    if op.r3 & detail::WRITES_FLAGS != 0 {
        let flags = vcpu.fpu.stub_flags;
        vcpu.flags.set_arithmetic(flags);
    }
    vcpu.regs[usize::from(op.r2 & 31)] = result;
}

/// #XM (#UD without CR4.OSXMMEXCPT), with the flags that come with it.
#[cold]
fn numeric_fault(vcpu: &mut Vcpu, op: &Op, a: u64, b: u64) -> Trap {
    /// Invalid, denormal, divide by zero: found before the result is computed, so that no other flag comes with them.
    const PRE_COMPUTATION: u32 = 0x7;
    const UNDERFLOW: u32 = 0x10;
    const INEXACT: u32 = 0x20;
    let (raised, unmasked) = (vcpu.fpu.raised, vcpu.fpu.unmasked);
    let reported = if raised & unmasked & PRE_COMPUTATION != 0 {
        raised & PRE_COMPUTATION
    } else if raised & unmasked & UNDERFLOW != 0 {
        // The stub flushed tiny results to zero, which is inexact; whether the real ones are, another run tells.
        raised & !INEXACT | raised_unflushed(&mut vcpu.fpu, op, a, b) & INEXACT
    } else {
        raised
    };
    vcpu.fpu.raise_mxcsr(reported);
    if vcpu.cr4 & platform::x86::cr4::OSXMMEXCPT != 0 { Trap::fault(vector::XM) } else { Trap::ud() }
}

/// Runs the stub again without flushing to zero, and without effects. Returns the exceptions that it raised.
fn raised_unflushed(fpu: &mut FpuState, op: &Op, a: u64, b: u64) -> u32 {
    let saved = (fpu.vectors, fpu.opmasks, fpu.legacy, fpu.status, fpu.bounce, fpu.stub_flags);
    let flushing = std::mem::replace(&mut fpu.underflow_mxcsr, fpu.report_mxcsr);
    call(op.imm, fpu, a, b);
    fpu.underflow_mxcsr = flushing;
    (fpu.vectors, fpu.opmasks, fpu.legacy, fpu.status, fpu.bounce, fpu.stub_flags) = saved;
    fpu.raised
}

#[inline(always)]
pub(super) fn check_alignment(vcpu: &Vcpu, op: &Op, linear: u64) -> Step {
    let misaligned = linear & u64::from(op.osize).wrapping_sub(1) != 0;
    if op.r3 & (detail::ALIGNED | detail::ALIGNED_SSE) == 0 || !misaligned {
        return Ok(());
    }
    if op.r3 & detail::ALIGNED_SSE != 0 && vcpu.fpu.mxcsr() & MXCSR_MM != 0 {
        return Ok(());
    }
    Err(Trap::gp(0))
}

/// Copies the memory operand to the buffer.
pub(super) fn load_operand(vcpu: &mut Vcpu, op: &Op, linear: u64) -> Step {
    macro_rules! block {
        ($n:literal) => {
            vcpu.load_block::<$n>(linear, |fpu| &mut fpu.bounce)
        };
    }
    match op.osize {
        4 => block!(4),
        8 => block!(8),
        16 => block!(16),
        32 => block!(32),
        64 => block!(64),
        2 => block!(2),
        1 => block!(1),
        10 => block!(10),
        _ => Err(Trap::ud()),
    }
    .map_err(|trap| stack_error(op, trap))
}

/// Copies the buffer to the memory operand.
pub(super) fn store_operand(vcpu: &mut Vcpu, op: &Op, linear: u64) -> Step {
    macro_rules! block {
        ($n:literal) => {{
            let bytes: [u8; $n] = std::array::from_fn(|i| vcpu.fpu.bounce[i]);
            vcpu.store_block::<$n>(linear, &bytes)
        }};
    }
    match op.osize {
        4 => block!(4),
        8 => block!(8),
        16 => block!(16),
        32 => block!(32),
        64 => block!(64),
        2 => block!(2),
        1 => block!(1),
        10 => block!(10),
        _ => Err(Trap::ud()),
    }
    .map_err(|trap| stack_error(op, trap))
}

/// x87. `r1` and `r2` hold the opcode for FOP.
fn x87<const POINTERS: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    X87::check(vcpu)?;
    let mut linear = 0;
    if op.r3 & (detail::LOAD | detail::STORE) != 0 {
        linear = vcpu.linear(op, u64::from(op.osize), op.r3 & detail::STORE != 0)?;
        if op.r3 & detail::LOAD != 0 {
            load_operand(vcpu, op, linear)?;
        } else {
            vcpu.probe_write(linear, u64::from(op.osize)).map_err(|trap| stack_error(op, trap))?;
        }
    }
    if op.r3 & detail::READS_FLAGS != 0 {
        vcpu.fpu.stub_flags = vcpu.rflags() & rflags::ARITHMETIC | rflags::FIXED;
    }
    vcpu.fpu.unpark();
    call(op.imm, &mut vcpu.fpu, 0, 0);
    if POINTERS {
        note_pointers(vcpu, op);
    }
    if op.r3 & detail::WRITES_FLAGS != 0 {
        let flags = vcpu.fpu.stub_flags;
        vcpu.flags.set_arithmetic(flags);
    }
    if op.r3 & detail::STORE != 0 && stores(&vcpu.fpu) {
        store_operand(vcpu, op, linear)?;
    }
    Ok(())
}

/// Whether a store really stored: an unmasked invalid, overflow or underflow exception keeps the destination as it was.
fn stores(fpu: &FpuState) -> bool {
    const IE_OE_UE: u16 = 0x19;
    fpu.fsw() & !fpu.fcw() & IE_OE_UE == 0
}

/// Notes the instruction, and its memory operand, for FNSTENV (SDM vol. 1, 8.1.8). The host's own pointers never show.
fn note_pointers(vcpu: &mut Vcpu, op: &Op) {
    vcpu.fpu.fop = u16::from(op.r1) << 8 | u16::from(op.r2);
    vcpu.fpu.fip = vcpu.rip().wrapping_sub(u64::from(op.len)) & if vcpu.in_64bit() { u64::MAX } else { 0xffff_ffff };
    vcpu.fpu.fcs = vcpu.segments[seg::CS].selector;
    let has_operand = op.r3 & (detail::LOAD | detail::STORE) != 0;
    if has_operand && (op.scale & FDP_EXCEPTIONS_ONLY == 0 || vcpu.fpu.x87_pending()) {
        vcpu.fpu.fdp = vcpu.offset(op);
        vcpu.fpu.fds = vcpu.segments[usize::from(op.scale >> 4 & 7).min(5)].selector;
    }
}

/// Chooses the handler.
pub(super) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let mut plan = Plan::new(d.instruction, d.host_alu.stubs.factory())?;
    if d.features.amd && d.instruction.mnemonic() == Mnemonic::Cvtpi2ps && plan.memory == Memory::Load {
        // On AMD's processors x87 state has no part in this form.
        plan.class = Class::Sse;
    }
    if !super::available(d) {
        return None;
    }
    let memory_size = d.instruction.memory_size().size();
    if plan.memory != Memory::None && !matches!(memory_size, 1 | 2 | 4 | 8 | 10 | 16 | 32 | 64) {
        return None;
    }
    d.op.imm = d.host_alu.stubs.get(&plan)?;
    d.op.osize = memory_size as u8;
    d.op.r1 = plan.gpr_in.unwrap_or(ZERO as u8);
    d.op.r2 = plan.gpr_out.unwrap_or(SINK);
    d.op.r3 = details(&plan, d.instruction, d.features.amd);
    if plan.class == Class::X87 {
        return next(x87_form(d));
    }
    if let Some(run) = super::mask::form(d, &plan) {
        return next(run);
    }
    let simple = d.op.r3 & !(detail::LOAD | detail::ALIGNED | detail::ALIGNED_SSE) == 0;
    next(match plan.class {
        Class::Sse => form::<Sse>(&plan, simple, memory_size),
        Class::SseMmx => form::<SseMmx>(&plan, simple, memory_size),
        Class::Avx => form::<Avx>(&plan, simple, memory_size),
        Class::Avx512 => form::<Avx512>(&plan, simple, memory_size),
        Class::Mmx | Class::X87 => form::<Mmx>(&plan, simple, memory_size),
    })
}

fn form<G: Gate>(plan: &Plan, simple: bool, size: usize) -> Handler {
    match (plan.memory, size) {
        (Memory::None, _) if simple => plain::<G>,
        (Memory::Load, 4) if simple => plain_load::<G, 4>,
        (Memory::Load, 8) if simple => plain_load::<G, 8>,
        (Memory::Load, 16) if simple => plain_load::<G, 16>,
        (Memory::Load, 32) if simple => plain_load::<G, 32>,
        (Memory::Load, 64) if simple => plain_load::<G, 64>,
        _ => general::<G>,
    }
}

fn x87_form(d: &mut Decoding<'_>) -> Handler {
    use Mnemonic as N;
    let opcode = d.bytes.iter().position(|byte| (0xd8..=0xdf).contains(byte)).unwrap_or(0);
    d.op.r1 = d.bytes.get(opcode).map_or(0, |byte| byte & 7);
    d.op.r2 = d.bytes.get(opcode + 1).copied().unwrap_or(0);
    // The scale of an index takes two bits; the segment of the operand goes beside it.
    if let Some(segment) = operand_segment(d) {
        d.op.scale |= (segment & 7) << 4;
    }
    if d.features.leaf(7, 0)[1] >> 6 & 1 != 0 {
        d.op.scale |= FDP_EXCEPTIONS_ONLY;
    }
    match d.instruction.mnemonic() {
        // On AMD's processors these count as instructions like any other.
        N::Fnop | N::Fincstp | N::Fdecstp | N::Ffree | N::Ffreep if !d.features.amd => x87::<false>,
        _ => x87::<true>,
    }
}

/// Number of the memory operand's segment register. 64-bit mode ignores overrides but those by FS and GS.
fn operand_segment(d: &Decoding<'_>) -> Option<u8> {
    use iced_x86::Register as R;
    let segment = match d.instruction.memory_segment() {
        R::None => return None,
        segment @ (R::FS | R::GS) => segment,
        segment if d.instruction.code_size() != iced_x86::CodeSize::Code64 => segment,
        _ if d.op.flags & op_flag::STACK != 0 => R::SS,
        _ => R::DS,
    };
    Some(segment.number() as u8)
}

fn details(plan: &Plan, instruction: &Instruction, amd: bool) -> u8 {
    let bit = |set: bool, mask: u8| if set { mask } else { 0 };
    let aligned = plan.memory != Memory::None && must_align(instruction, amd);
    let legacy = instruction.encoding() == EncodingKind::Legacy && plan.memory == Memory::Load;
    bit(plan.memory == Memory::Load, detail::LOAD)
        | bit(plan.memory == Memory::Store, detail::STORE)
        | bit(aligned && !legacy, detail::ALIGNED)
        | bit(aligned && legacy, detail::ALIGNED_SSE)
        | bit(plan.uses_mxcsr, detail::MXCSR)
        | bit(plan.reads_flags, detail::READS_FLAGS)
        | bit(plan.writes_flags, detail::WRITES_FLAGS)
        | bit(plan.lengths, detail::LENGTHS)
}

/// Whether the memory operand must be aligned to its size (SDM vol. 2, 2.4, exception classes 1 to 4).
fn must_align(instruction: &Instruction, amd: bool) -> bool {
    use Mnemonic as N;
    match instruction.encoding() {
        EncodingKind::Legacy => {
            let relaxed = matches!(instruction.mnemonic(), N::Movups | N::Movupd | N::Movdqu | N::Lddqu)
                || ["pcmpestr", "pcmpistr"].iter().any(|prefix| name(instruction).starts_with(prefix))
                // Against its manual, AMD's processors do not ask it of these.
                || amd && name(instruction).starts_with("sha");
            instruction.memory_size().size() == 16 && !relaxed
        }
        _ => matches!(
            instruction.mnemonic(),
            N::Vmovaps
                | N::Vmovapd
                | N::Vmovdqa
                | N::Vmovdqa32
                | N::Vmovdqa64
                | N::Vmovntps
                | N::Vmovntpd
                | N::Vmovntdq
                | N::Vmovntdqa
        ),
    }
}
