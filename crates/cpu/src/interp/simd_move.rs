//! Plain moves of vector registers: what string functions and register saves consist of, done without the host's ALU.

use iced_x86::{EncodingKind, Instruction, Mnemonic};

use super::gate::{Avx, Avx512, Gate, Sse};
use super::operand::stack_error;
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::{Step, Trap, Vcpu};

/// Loads `N` bytes into vector register `r1` and zeroes what the encoding says.
fn load<G: Gate, const N: usize, const ALIGNED: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let linear = vcpu.linear(op, N as u64, false)?;
    check_aligned::<N, ALIGNED>(linear)?;
    let r = usize::from(op.r1 & 31);
    vcpu.load_block::<N>(linear, |fpu| &mut fpu.vectors[r]).map_err(|trap| stack_error(op, trap))?;
    zero_above::<G, N>(vcpu, op.r1);
    Ok(())
}

/// Stores the low `N` bytes of vector register `r1`.
fn store<G: Gate, const N: usize, const ALIGNED: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let linear = vcpu.linear(op, N as u64, true)?;
    check_aligned::<N, ALIGNED>(linear)?;
    let bytes = vector::<N>(vcpu, op.r1);
    vcpu.store_block::<N>(linear, &bytes).map_err(|trap| stack_error(op, trap))
}

/// Copies the low `N` bytes of `r2` to `r1`.
fn copy<G: Gate, const N: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let bytes = vector::<N>(vcpu, op.r2);
    set_vector::<G, N>(vcpu, op.r1, &bytes);
    Ok(())
}

/// MOVSS and MOVSD between registers: only the low element changes.
fn merge<const N: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    Sse::check(vcpu)?;
    let bytes = vector::<N>(vcpu, op.r2);
    vcpu.fpu.vectors[usize::from(op.r1 & 31)][..N].copy_from_slice(&bytes);
    Ok(())
}

/// MOVD, MOVQ from a general-purpose register.
fn from_gpr<G: Gate, const N: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let bytes = vcpu.regs[usize::from(op.r2 & 31)].to_le_bytes();
    let bytes: [u8; N] = std::array::from_fn(|i| bytes[i]);
    set_vector::<G, N>(vcpu, op.r1, &bytes);
    Ok(())
}

/// MOVD, MOVQ to a general-purpose register.
fn to_gpr<G: Gate, const N: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let mut bytes = [0; 8];
    bytes[..N].copy_from_slice(&vector::<N>(vcpu, op.r2));
    vcpu.regs[usize::from(op.r1 & 31)] = u64::from_le_bytes(bytes);
    Ok(())
}

/// VZEROUPPER (from byte 16) and VZEROALL (from byte 0): registers 0–15, or 0–7 outside 64-bit mode.
fn zero<const FROM: usize>(vcpu: &mut Vcpu, _: &Op) -> Step {
    Avx::check(vcpu)?;
    let registers = if vcpu.in_64bit() { 16 } else { 8 };
    vcpu.fpu.zero_vectors(0..registers, FROM);
    Ok(())
}

#[inline(always)]
fn vector<const N: usize>(vcpu: &Vcpu, r: u8) -> [u8; N] {
    let register = &vcpu.fpu.vectors[usize::from(r & 31)];
    std::array::from_fn(|i| register[i])
}

#[inline(always)]
fn set_vector<G: Gate, const N: usize>(vcpu: &mut Vcpu, r: u8, bytes: &[u8; N]) {
    vcpu.fpu.vectors[usize::from(r & 31)][..N].copy_from_slice(bytes);
    zero_above::<G, N>(vcpu, r);
}

#[inline(always)]
fn zero_above<G: Gate, const N: usize>(vcpu: &mut Vcpu, r: u8) {
    if N < G::ZERO_TO {
        vcpu.fpu.vectors[usize::from(r & 31)][N..G::ZERO_TO].fill(0);
    }
}

#[inline(always)]
fn check_aligned<const N: usize, const ALIGNED: bool>(linear: u64) -> Step {
    if ALIGNED && linear & (N as u64 - 1) != 0 { Err(Trap::gp(0)) } else { Ok(()) }
}

/// `handler::<gate, size, ...>` for a gate and a size known at decode time.
macro_rules! form {
    ($encoding:expr, $size:expr, $handler:ident $(, $param:tt)*) => {
        match ($encoding, $size) {
            (EncodingKind::Legacy, 4) => $handler::<Sse, 4 $(, $param)*> as Handler,
            (EncodingKind::Legacy, 8) => $handler::<Sse, 8 $(, $param)*>,
            (EncodingKind::Legacy, 16) => $handler::<Sse, 16 $(, $param)*>,
            (EncodingKind::VEX, 4) => $handler::<Avx, 4 $(, $param)*>,
            (EncodingKind::VEX, 8) => $handler::<Avx, 8 $(, $param)*>,
            (EncodingKind::VEX, 16) => $handler::<Avx, 16 $(, $param)*>,
            (EncodingKind::VEX, 32) => $handler::<Avx, 32 $(, $param)*>,
            (EncodingKind::EVEX, 4) => $handler::<Avx512, 4 $(, $param)*>,
            (EncodingKind::EVEX, 8) => $handler::<Avx512, 8 $(, $param)*>,
            (EncodingKind::EVEX, 16) => $handler::<Avx512, 16 $(, $param)*>,
            (EncodingKind::EVEX, 32) => $handler::<Avx512, 32 $(, $param)*>,
            (EncodingKind::EVEX, 64) => $handler::<Avx512, 64 $(, $param)*>,
            _ => return None,
        }
    };
}

/// As [`form`], for sizes 4 and 8.
macro_rules! gpr_form {
    ($encoding:expr, $size:expr, $handler:ident) => {
        match ($encoding, $size) {
            (EncodingKind::Legacy, 4) => $handler::<Sse, 4> as Handler,
            (EncodingKind::Legacy, _) => $handler::<Sse, 8>,
            (EncodingKind::VEX, 4) => $handler::<Avx, 4>,
            (EncodingKind::VEX, _) => $handler::<Avx, 8>,
            (EncodingKind::EVEX, 4) => $handler::<Avx512, 4>,
            (EncodingKind::EVEX, _) => $handler::<Avx512, 8>,
            _ => return None,
        }
    };
}

/// How a mnemonic moves.
enum Kind {
    /// Whole registers; whether memory must be aligned.
    Whole { aligned: bool },
    /// The low element, the rest zeroed.
    Low,
    /// MOVSS, MOVSD: zeroes the rest on a load, merges between registers.
    Scalar,
}

fn kind(instruction: &Instruction) -> Option<Kind> {
    use Mnemonic as N;
    Some(match instruction.mnemonic() {
        N::Movups | N::Movupd | N::Movdqu | N::Lddqu => Kind::Whole { aligned: false },
        N::Vmovups | N::Vmovupd | N::Vmovdqu | N::Vlddqu => Kind::Whole { aligned: false },
        N::Vmovdqu8 | N::Vmovdqu16 | N::Vmovdqu32 | N::Vmovdqu64 => Kind::Whole { aligned: false },
        N::Movaps | N::Movapd | N::Movdqa | N::Movntdqa => Kind::Whole { aligned: true },
        N::Movntps | N::Movntpd | N::Movntdq => Kind::Whole { aligned: true },
        N::Vmovaps | N::Vmovapd | N::Vmovdqa | N::Vmovntdqa => Kind::Whole { aligned: true },
        N::Vmovdqa32 | N::Vmovdqa64 => Kind::Whole { aligned: true },
        N::Vmovntps | N::Vmovntpd | N::Vmovntdq => Kind::Whole { aligned: true },
        N::Movd | N::Movq | N::Vmovd | N::Vmovq => Kind::Low,
        N::Movss | N::Movsd | N::Vmovss | N::Vmovsd => Kind::Scalar,
        _ => return None,
    })
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let instruction = d.instruction;
    match instruction.mnemonic() {
        Mnemonic::Vzeroupper if super::hostalu::available(d) => return next(zero::<16>),
        Mnemonic::Vzeroall if super::hostalu::available(d) => return next(zero::<0>),
        _ => {}
    }
    let kind = kind(instruction)?;
    let ops = instruction.op_count();
    let has_mmx = (0..ops).any(|i| instruction.op_register(i).is_mm());
    if instruction.has_op_mask() || ops != 2 || has_mmx || instruction.is_string_instruction() {
        return None;
    }
    if !super::hostalu::available(d) {
        return None;
    }
    let encoding = instruction.encoding();
    let bytes = instruction.memory_size().size();
    let run: Handler = match (kind, d.shape[0], d.shape[1]) {
        (Kind::Whole { aligned: true }, Slot::Other, Slot::Mem) => form!(encoding, bytes, load, true),
        (Kind::Whole { aligned: true }, Slot::Mem, Slot::Other) => form!(encoding, bytes, store, true),
        (_, Slot::Other, Slot::Mem) => form!(encoding, bytes, load, false),
        (_, Slot::Mem, Slot::Other) => form!(encoding, bytes, store, false),
        (Kind::Whole { .. }, Slot::Other, Slot::Other) => {
            form!(encoding, instruction.op0_register().size(), copy)
        }
        (Kind::Low, Slot::Other, Slot::Other) => form!(encoding, 8, copy),
        (Kind::Low, Slot::Other, Slot::Reg) => gpr_form!(encoding, instruction.op1_register().size(), from_gpr),
        (Kind::Low, Slot::Reg, Slot::Other) => gpr_form!(encoding, instruction.op0_register().size(), to_gpr),
        (Kind::Scalar, Slot::Other, Slot::Other) if encoding == EncodingKind::Legacy => {
            if instruction.mnemonic() == Mnemonic::Movss { merge::<4> } else { merge::<8> }
        }
        _ => return None,
    };
    next(run)
}
